"""The report's files: complete, escaped, self-contained, and right about a diverged run."""

import dataclasses
import html.parser
import json
import pathlib
import re

import pytest

from jaxopt_suite.experiments import markup, plots, report
from jaxopt_suite.experiments.table import Rate, Run

STEPS = (0, 10, 20, 30)
HOSTILE = "<script>alert('|`*_x_*`|')</script> & \"quotes\""
SETTINGS = {
    "preset": "nano",
    "steps": 30,
    "batch_size": 4,
    "seq_len": 32,
    "warmup_fraction": 0.1,
    "clip": 1.0,
    "eval_every": 10,
    "eval_batches": 2,
    "seeds": 2,
}


def make_run(optimizer: str, seed: int, factor: float, **changes: object) -> Run:
    losses = tuple(5.5 - factor * step / 10 for step in STEPS)
    seconds = tuple(0.1 * step for step in STEPS)
    run = Run(optimizer, seed, 1e-3, STEPS, seconds, losses, 100.0, 800, 100, load=1.5)
    return dataclasses.replace(run, **changes)


def make_comparison(**changes: object) -> report.Comparison:
    names = ("adamw", "grams", "lion")
    runs = [
        make_run(name, seed, 1.0 + 0.1 * i + 0.05 * seed)
        for i, name in enumerate(names)
        for seed in (0, 1)
    ]
    runs[5] = make_run("lion", 1, 1.0, steps=(0, 10), val_loss=(5.5, 4.5), diverged_at=17)
    trials = tuple(
        make_run("grams", 2, 1.0 + factor, learning_rate=1e-3 * factor) for factor in (0.5, 1.0)
    )
    comparison = report.Comparison(
        runs=tuple(runs),
        rates={
            "adamw": Rate(1e-3, "tuned default"),
            "grams": Rate(1e-3, "swept", trials, at_edge=True),
            "lion": Rate(1e-3, "given"),
        },
        methods=tuple(
            report.Method(name, "A title", 2024, "2412.17107", "2mn", "cosine") for name in names
        ),
        entropy=3.0,
        settings=SETTINGS,
        data={"source": HOSTILE},
        environment={"jax": "0.10.2"},
        command="jaxopt-suite compare --data '```'",
    )
    return dataclasses.replace(comparison, **changes)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("report")
    report.write(make_comparison(), folder)
    return folder


class Outline(html.parser.HTMLParser):
    """Collects the tags and the visible text of a page, and holds it to closing what it opens."""

    VOID = frozenset({"meta", "br", "hr"})

    def __init__(self, page: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_loads_nothing_and_links_only_to_papers(written: pathlib.Path):
    page = (written / "report.html").read_text()
    urls = set(re.findall(r"https?://[^\s\"'<>]+", page))
    assert urls == {"https://arxiv.org/abs/2412.17107"}
    outline = Outline(page)
    assert not outline.open
    assert not outline.tags & {"script", "link", "img", "iframe", "object"}
    assert not [name for name, _ in outline.attributes if name == "src" or name.startswith("on")]
    assert "url(" not in page.replace("url(#", "")
    assert "svg" in outline.tags


def test_html_shows_hostile_text_as_text(written: pathlib.Path):
    assert HOSTILE in Outline((written / "report.html").read_text()).text


def test_html_picture_takes_the_pages_colours_in_dark_and_light(written: pathlib.Path):
    page = (written / "report.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert "currentColor" in page
    assert "#ffffff" not in page[page.index("<svg") : page.index("</svg>")]


def test_markdown_escapes_hostile_text_and_fences_the_command(written: pathlib.Path):
    text = (written / "report.md").read_text()
    assert "<script>" not in text
    assert "\\|" in text
    assert "````\njaxopt-suite compare --data '```'\n````" in text
    rows = [line for line in text.splitlines() if line.startswith("| adamw | 2.4250 ±")]
    assert len(rows) == 1
    assert rows[0].count(" | ") == 7
    assert "(curves.svg)" in text


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_report_says_what_was_measured_and_how(written: pathlib.Path, name: str):
    text = (written / name).read_text()
    for expected in (
        "diverged at step 17 (1 of 2 seeds)",
        "used, at the grid's edge".replace("'", "'" if name == "report.md" else "&#x27;"),
        "same batches in the same order",
        "3.0000 nats per byte",
        "Below it: grams, adamw. Not below it: lion.",
        "jax: 0.10.2",
        "Seed 2, which no final run uses",
        "jaxopt-suite compare",
    ):
        assert expected in text


def test_on_a_mesh_the_report_says_which_and_what_each_device_sends(tmp_path: pathlib.Path):
    runs = [dataclasses.replace(r, mesh="data=8", wire_bytes=4e6) for r in make_comparison().runs]
    report.write(make_comparison(runs=tuple(runs)), tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "over the mesh data=8" in text
        assert "4,000,000" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {row["wire_bytes"] for row in summary["table"]} == {4e6}
    assert "mesh" not in markup.to_markdown(report.document(make_comparison()))


def test_summary_holds_every_number_and_is_strict_json(written: pathlib.Path):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    summary = json.loads((written / "summary.json").read_text(), parse_constant=refuse)
    by_name = {row["optimizer"]: row for row in summary["table"]}
    assert [row["optimizer"] for row in summary["table"]] == ["grams", "adamw", "lion"]
    assert by_name["lion"]["mean"] is None
    assert by_name["lion"]["diverged"] == [[1, 17]]
    assert summary["unigram_entropy"] == 3.0
    assert len(summary["runs"]) == 6
    assert [t["learning_rate"] for t in summary["rates"]["grams"]["trials"]] == [0.0005, 0.001]


def test_pictures_are_written_and_do_not_change_from_one_writing_to_the_next(
    written: pathlib.Path, tmp_path: pathlib.Path
):
    report.write(make_comparison(), tmp_path)
    assert (written / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("curves.svg", "report.html", "report.md", "summary.json"):
        assert (tmp_path / name).read_text() == (written / name).read_text()


def test_a_comparison_in_which_nothing_was_ever_finite_still_has_a_report(tmp_path: pathlib.Path):
    run = make_run("lion", 0, 1.0, steps=(), seconds=(), val_loss=(), diverged_at=0)
    comparison = make_comparison(
        runs=(run,), rates={"lion": Rate(1e-3, "given")}, settings={**SETTINGS, "seeds": 1}
    )
    report.write(comparison, tmp_path)
    assert "diverged at step 0" in (tmp_path / "report.md").read_text()


def test_entropy_is_drawn_only_where_the_curves_are():
    summary = make_comparison().table
    near, far = (
        [text.get_text() for axes in figure.axes for text in axes.texts]
        for figure in (plots.draw(summary, e, tokens_per_step=128) for e in (3.0, 30.0))
    )
    assert "unigram entropy" in near
    assert "unigram entropy" not in far
    assert "lion diverged" in far


def test_curves_are_drawn_against_steps_tokens_seconds_and_where_any_are_sent_bytes():
    labels = lambda figure: [axes.get_xlabel() for axes in figure.axes]
    comparison = make_comparison()
    alone = plots.draw(comparison.table, 3.0, tokens_per_step=128)
    assert labels(alone) == ["step", "training seconds"]
    (above,) = alone.axes[0].child_axes
    assert above.get_xlabel() == "tokens"
    plots.svg(alone)  # drawing sets the limits
    assert above.get_xlim() == pytest.approx([0, 30 * 128])
    sent = {"adamw": 4e6, "grams": 4e4, "lion": 4e6}
    runs = [
        dataclasses.replace(r, mesh="worker=8", wire_bytes=sent[r.optimizer])
        for r in comparison.runs
    ]
    on_mesh = make_comparison(runs=tuple(runs)).table
    figure = plots.draw(on_mesh, 3.0, tokens_per_step=128)
    assert labels(figure) == ["step", "training seconds", "bytes sent per device"]
    assert figure.axes[2].get_xlim() == pytest.approx([10 * 4e4, 30 * 4e6])
    assert figure.axes[2].get_xscale() == "log"


def test_an_outer_loop_around_all_is_said():
    text = markup.to_markdown(report.document(make_comparison()))
    assert "DiLoCo" not in text
    runs = [dataclasses.replace(r, mesh="worker=8", wire_bytes=4.0) for r in make_comparison().runs]
    settings = {**SETTINGS, "diloco_workers": 8}
    inside = make_comparison(runs=tuple(runs), settings=settings)
    assert "the inner one of DiLoCo" in markup.to_markdown(report.document(inside))


def test_constant_schedules_are_named_as_the_exception():
    method = report.Method("lion", "A title", 2024, "", "2mn", "constant")
    text = markup.to_markdown(report.document(make_comparison(methods=(method,))))
    assert "except lion (the same warm-up, then flat)" in text
