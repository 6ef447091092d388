"""The measured parts of the guides to communication and outer loops: tables and pictures."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import _results
from benchmarks.markdown import measured, table
from jaxopt_suite.core.figures import PALETTE
from jaxopt_suite.experiments.plots import svg

_INK, _GREY = "#1a1a1a", "#808080"
_Rows = list[dict[str, Any]]

# Steps in which a method sends what the dense one does. Its program holds both stages, and the
# bytes counted in it are those of both.
_WARM_UP = {"1-bit Adam": 40}

# Curves of the picture, in the order of the legend, with the rules' names in the claim's row.
_HETEROGENEOUS = ("exact mean", "EF", "EF21", "EF21-SGDM, b 0.1", "EControl, eta 0.1")


def sections(results: pathlib.Path) -> dict[str, str]:
    """Markdown of every measured part of the guide, by the name of its place."""
    return {
        "task": _task(_newest_task(results)),
        "wire": _wire(_results.load(results / "compressed_bytes.json")),
        "overhead": _overhead(_results.load(results / "compression_overhead.json")),
    }


def outer_loop_sections(results: pathlib.Path) -> dict[str, str]:
    """The same for ``docs/guides/outer-loops.md``."""
    task = _results.latest(_results.load(results / "outer_loop_task.json"), "name")
    return {
        "diloco": _outer_loops(_results.load(results / "outer_loop_bytes.json")),
        "outer_task": _outer_task(list(task.values())),
    }


def fill(text: str, parts: Mapping[str, str]) -> str:
    """The text with what stands between ``<!-- measured: NAME -->`` and ``<!-- end -->`` renewed.

    Raises:
      ValueError: if the text has no place for a part, or one without its end.
    """
    for name, part in parts.items():
        before, begin, rest = text.partition(f"<!-- measured: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (begin and end):
            raise ValueError(f"no place for {name!r} in the text")
        text = f"{before}{begin}\n{part.strip()}\n\n{end}{after}"
    return text


def pictures(results: pathlib.Path) -> dict[str, tuple[str, Callable[[], Figure]]]:
    """File name in ``docs/images`` to a digest of the rows it is drawn from, and how to draw it."""
    found = {}
    for name, rows, draw in (
        ("loss-against-bytes.svg", _newest_task(results), _loss_against_bytes),
        ("workers-that-disagree.svg", _newest_claim(results), _workers_that_disagree),
    ):
        if rows:
            digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
            found[name] = digest, lambda rows=rows, draw=draw: draw(rows)
    return found


def document(digest: str, figure: Figure) -> str:
    """The picture as a file, which says what it was made of."""
    return svg(figure).replace("<svg", f"<!-- made of rows {digest} -->\n<svg", 1)


def is_made_of(path: pathlib.Path, digest: str) -> bool:
    """Whether the file is there and drawn from these rows, by whatever version of matplotlib."""
    return path.is_file() and f"<!-- made of rows {digest} -->" in path.read_text()


def _newest_task(results: pathlib.Path) -> _Rows:
    rows = _results.load(results / "communication_task.json")
    return list(_results.latest(rows, "name").values())


def _newest_claim(results: pathlib.Path) -> _Rows:
    rows = _results.load(results / "claims.json")
    return [r for r in rows if r["name"] == "econtrol-heterogeneous" and not r["quick"]][-1:]


def mean_bytes(row: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """Bytes that a device sends per step, the mean over the run."""
    share = _WARM_UP.get(row["name"], 0) / row["steps"]
    both = row["wire_bytes"]
    return share * dense["wire_bytes"] + (1 - share) * (both - dense["wire_bytes"] * (share > 0))


def _task(rows: _Rows) -> str:
    if not rows:
        return "No measurements yet.\n"
    head = ["method", "rate", "validation loss", "over dense AdamW", "sent per step", "times fewer"]
    sent = {row["name"]: mean_bytes(row, rows[0]) for row in rows}
    cells = [
        [
            f"{row['name']} (`{' '.join([row['optimizer'], *row['words']])}`)",
            f"{row['learning_rate']:g}",
            "diverged" if row["mean"] is None else f"{row['mean']:.3f} ± {row['spread']:.3f}",
            "" if row["over_dense"] is None else f"{100 * (row['over_dense'] - 1):+.1f} %",
            _size(sent[row["name"]]),
            f"{rows[0]['wire_bytes'] / sent[row['name']]:.1f}",
        ]
        for row in rows
    ]
    return table(head, cells) + "\n" + measured(rows[-1])


def _wire(rows: _Rows) -> str:
    if not rows:
        return "No measurements yet.\n"
    parts = []
    for row in _results.latest([_named(row) for row in rows], "place").values():
        head = ["compressor", "exchange", "sent", "closed form", "off", "all-reduce over this"]
        cells = [
            [
                f"`{e['compressor']}`",
                e["exchange"] if e["exchange"] == e["way"] else f"{e['exchange']}: {e['way']}",
                _size(e["sent"]),
                _size(e["closed_form"]),
                f"{100 * e['off']:.2f} %",
                f"{e['times_fewer']:.1f}",
            ]
            for e in row["entries"]
        ]
        title = (
            f"**{row['place']}**: float32 all-reduce {_size(row['entries'][0]['all_reduce'])}.\n"
        )
        parts += [title, table(head, cells)]
    return "\n".join([*parts, measured(rows[-1])])


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "place": f"{row['topology']}, {row['mesh']}"}


def _outer_loops(rows: _Rows) -> str:
    if not rows:
        return "No measurements yet.\n"
    row = rows[-1]
    head = ["method", "per step", "times fewer", "largest step", "every step", "state", "peak"]
    cells = [
        [
            f"{e['method']} (`{e['recipe']}`)",
            _size(e["per_step"]),
            f"{e['times_fewer']:.0f}",
            _size(e["largest_step"]),
            _of_every_step(e["always"]),
            f"{e['arguments'] / e['parameter_bytes']:.2f}",
            _size(e["peak"]),
        ]
        for e in row["entries"]
    ]
    title = (
        f"**{row['topology']}, {row['mesh']}**: {row['parameters'] / 1e6:.0f} million parameters, "
        f"a round of {row['sync_every']} steps.\n"
    )
    return f"{title}\n{table(head, cells)}\n{measured(row)}"


def _outer_task(rows: _Rows) -> str:
    if not rows:
        return "No measurements yet.\n"
    head = ["method", "inner rate", "validation loss", "over AdamW", "sent per step", "times fewer"]
    cells = [
        [
            f"{row['name']} (`{' '.join([row['optimizer'], *row['words'][1::2]])}`)",
            f"{row['learning_rate']:g}",
            "diverged" if row["mean"] is None else f"{row['mean']:.3f} ± {row['spread']:.3f}",
            "" if row["over_dense"] is None else f"{100 * (row['over_dense'] - 1):+.1f} %",
            _size(row["wire_bytes"]),
            f"{row['times_fewer']:.0f}",
        ]
        for row in rows
    ]
    return table(head, cells) + "\n" + measured(rows[-1])


def _of_every_step(always: list[list[Any]]) -> str:
    """The collectives in no branch: their number and bytes."""
    payloads = [payload * times for _, payload, times in always]
    return f"{len(payloads)}, {_size(sum(payloads))}" if payloads else "nothing"


def _overhead(rows: _Rows) -> str:
    if not rows:
        return "No measurements yet.\n"
    row = rows[-1]
    cells = [
        [
            f"`{e['compressor']}`",
            f"{e['ms']:.0f}",
            f"{100 * e['ratio']:.1f} %",
            f"{100 * e['low']:.1f} to {100 * e['high']:.1f} %",
        ]
        for e in row["entries"]
    ]
    head = ["compressor", "ms", "of the step", "quartiles"]
    return table(head, cells) + "\n" + measured(row)


def _size(nbytes: float) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes:.0f} B"


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.grid(visible=True, color=_GREY, alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _loss_against_bytes(rows: _Rows) -> Figure:
    figure, axes = _axes("bytes sent per step and device", "validation loss (nats per byte)")
    drawn = [row for row in rows if row["mean"] is not None]
    axes.axhline(drawn[0]["mean"], color=_GREY, linestyle="--", linewidth=1, zorder=1)
    for i, row in enumerate(drawn):
        color = _GREY if i == 0 else PALETTE[(i - 1) % len(PALETTE)]
        x, y = mean_bytes(row, drawn[0]), row["mean"]
        axes.errorbar(x, y, yerr=row["spread"], fmt="o", color=color, capsize=3, zorder=2)
        axes.annotate(
            row["name"], (x, y), xytext=(6, 4), textcoords="offset points",
            fontsize=8, color=color,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.12)
    return figure


def _workers_that_disagree(rows: _Rows) -> Figure:
    numbers = rows[0]["numbers"]
    figure, axes = _axes("step", "squared norm of the mean gradient")
    for i, rule in enumerate(_HETEROGENEOUS):
        curve = numbers["squared_gradient_norm"][f"{rule}, 10 workers"]
        steps = [numbers["window"] * (j + 0.5) for j in range(len(curve))]
        style = {"color": _GREY, "linestyle": "--"} if i == 0 else {"color": PALETTE[i - 1]}
        axes.plot(steps, curve, label=rule, linewidth=1.8, **style)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9)
    return figure
