"""What a fit says for itself: a table for the terminal, JSON, and a page with the pictures."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from jaxopt_suite.core.plain import plain
from jaxopt_suite.experiments import markup, plots
from jaxopt_suite.experiments.fit_checks import checklist
from jaxopt_suite.experiments.fit_study import Study
from jaxopt_suite.experiments.markup import Block, Code, Grid, Heading, Item, Listing, Paragraph
from jaxopt_suite.scaling_laws import IsoFLOP, summary
from jaxopt_suite.scaling_laws.plots import plot, plot_isoflop

FILES = ("report.html", "report.md", "fit.json", "summary.json")
_ALT = "The runs with the fitted law, the compute-optimal frontier, residuals and extrapolation"


@dataclasses.dataclass(frozen=True)
class Report:
    """A study and what it was made with.

    Attributes:
      study: what was found.
      command: the command line that makes it.
      environment: versions and hardware, to be shown as they are.
    """

    study: Study
    command: str
    environment: Mapping[str, str]

    @property
    def title(self) -> str:
        """The law and the number of runs."""
        return f"{self.study.fit.law.name} fitted to {self.study.fit.table.n} runs"


def coefficients(study: Study) -> Grid:
    """Parameters with standard errors and intervals."""
    fit, level = study.fit, study.config.level
    rows = []
    for name, value in fit.coefficients.items():
        known = fit.draws is not None or fit.degrees > 0
        interval = "held" if name in fit.fixed else "none: no degrees of freedom"
        if name not in fit.fixed and known:
            low, high = fit.interval(name, level)
            interval = f"[{low:.5g}, {high:.5g}]"
        rows.append((name, f"{value:.6g}", f"{fit.standard_errors[name]:.3g}", interval))
    return Grid(("", "value", "std. error", f"{level:.0%} interval"), rows)


def document(report: Report) -> list[Block]:
    """The report as a list of blocks, ready to be written as Markdown or HTML."""
    study = report.study
    blocks: list[Block] = [
        Heading(report.title, level=1),
        Paragraph(study.fit.law.formula),
        coefficients(study),
        Listing([Item(f"WARNING: {text}") for text in summary.warnings(study.fit)])
        if summary.warnings(study.fit)
        else Paragraph(str(study.fit.certificate)),
        *([Paragraph(f"Next: {study.next_run}")] if study.next_run else []),
        _picture(
            "fit.svg", plot(study.fit, ink=plots.PAGE_INK, paper="none"), _ALT, _caption(study)
        ),
        *_slices(study.isoflop),
        Heading("Checks"),
    ]
    for title, parts in checklist(study).items():
        blocks += [Heading(title, level=3), *parts]
    facts = [Item(f"{name}: {value}") for name, value in report.environment.items()]
    return [*blocks, Heading("Made with"), Code(report.command), Listing(facts)]


def _picture(path: str, figure: Figure, alt: str, caption: str) -> markup.Picture:
    return markup.Picture(path, plots.inline_svg(figure), alt, caption)


def _caption(study: Study) -> str:
    bands = "" if study.fit.draws is None else " Bands hold 90 % of the resampled fits."
    return f"Runs and the fitted law; the dotted line is the largest run.{bands}"


def _slices(found: IsoFLOP | str) -> list[Block]:
    blocks: list[Block] = [Heading("Slices of equal compute")]
    if isinstance(found, str):
        return [*blocks, Paragraph(f"None to fit parabolas to: {found}.")]
    figure = plot_isoflop(found, ink=plots.PAGE_INK, paper="none")
    caption = "Parabolas through each slice and their minima; optimal sizes and their line."
    return [
        *blocks,
        _picture("isoflop.svg", figure, "Losses against parameters at each budget", caption),
        Code(str(found)),
    ]


def to_json(report: Report) -> str:
    """Everything beside the fit itself as JSON text; a number that does not exist is ``null``."""
    study = report.study
    runs = study.runs
    content = {
        "rows": list(runs.where),
        "digest": runs.digest,
        "dropped": [dataclasses.asdict(each) for each in runs.dropped],
        "conventions": dataclasses.asdict(runs.conventions),
        "frontier": _dict(study.frontier),
        "next_run": _dict(study.next_run),
        "holdouts": [_dict(split) for split in study.holdouts],
        "sensitivity": [_dict(variant) for variant in study.sensitivity],
        "rivals": [_dict(variant) for variant in study.rivals],
        "isoflop": study.isoflop if isinstance(study.isoflop, str) else _dict(study.isoflop),
        "settings": dataclasses.asdict(study.config),
        "environment": dict(report.environment),
        "command": report.command,
    }
    return json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _dict(value: Any) -> dict[str, Any] | None:
    return None if value is None else dataclasses.asdict(value)


def write(report: Report, folder: pathlib.Path) -> None:
    """Writes the report's files into an existing folder, replacing what an earlier call wrote.

    Args:
      report: what to write.
      folder: gets ``FILES`` and the pictures, ``fit.svg`` and, if there are slices,
        ``isoflop.svg``.
    """
    study, blocks = report.study, document(report)
    texts = {
        "report.html": markup.to_html(blocks, title=report.title),
        "report.md": markup.to_markdown(blocks),
        "fit.json": study.fit.to_json(),
        "summary.json": to_json(report),
        "fit.svg": plots.svg(plot(study.fit)),
    }
    if not isinstance(study.isoflop, str):
        texts["isoflop.svg"] = plots.svg(plot_isoflop(study.isoflop))
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
