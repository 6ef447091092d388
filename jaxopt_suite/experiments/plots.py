"""Loss curves of a comparison: validation loss against steps, seconds and bytes sent."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxopt_suite.core.figures import GREY, PALETTE, dress
from jaxopt_suite.experiments.table import BASELINE, Curve, Table

_STYLES = ("-", "-.", ":")
PAGE_INK = "#010203"  # stands for the page's text colour until the SVG is written
_HIDDEN_SHARE = 0.2  # the first fifth of training may leave the picture at the top
_LABEL_GAP = 0.062  # smallest distance between two labels, in units of the panel's height


Looks = Mapping[str, Mapping[str, Any]]


def _looks(names: Sequence[str]) -> Looks:
    """Colour and line style of each optimizer: AdamW dashed grey, the others in listed order."""
    others = [name for name in names if name != BASELINE]
    looks: dict[str, Mapping[str, Any]] = {
        name: {
            "color": PALETTE[i % len(PALETTE)],
            "linestyle": _STYLES[i // len(PALETTE) % len(_STYLES)],
        }
        for i, name in enumerate(others)
    }
    return looks | {BASELINE: {"color": GREY, "linestyle": "--"}}


def _limits(curves: Mapping[str, Curve]) -> tuple[float, float]:
    """The loss axis: all of every band but the first steep fall, which would flatten the rest."""
    lows = [curve.low.min() for curve in curves.values()]
    start = _HIDDEN_SHARE * max(curve.steps[-1] for curve in curves.values())
    highs = [curve.high[min(np.searchsorted(curve.steps, start), len(curve.high) - 1)]
             for curve in curves.values()]  # fmt: skip
    initial = max(curve.high[0] for curve in curves.values())
    low, high = float(min(lows)), float(min(max(highs), initial))
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Moves label heights, given in ascending order, apart until none are closer than ``gap``."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    # Pushing only upwards lifts a cluster above its lines: lower it by the mean of its moves.
    shift = sum(placed) / len(placed) - sum(heights) / len(heights)
    shift = min(shift, placed[0])
    return [height - shift for height in placed]


def _label(axes: Axes, table: Table, curves: Mapping[str, Curve], looks: Looks) -> None:
    """Writes each optimizer's name and final loss beside its line's end, best at the bottom."""
    diverged = {row.optimizer for row in table.rows if row.diverged}
    bottom, top = axes.get_ylim()
    ends = sorted((float(curve.mean[-1]), name) for name, curve in curves.items())
    wanted = [(min(loss, top) - bottom) / (top - bottom) for loss, _ in ends]
    heights = _spread_out(wanted, _LABEL_GAP)
    for (loss, name), anchor, height in zip(ends, wanted, heights, strict=True):
        color = looks[name]["color"]
        leader = {"arrowstyle": "-", "color": color, "lw": 0.8, "relpos": (0, 0.5), "shrinkA": 2}
        axes.annotate(
            f"{name} diverged" if name in diverged else f"{name} {loss:.3f}",
            xy=(1.0, anchor),
            xytext=(1.05, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=str(color),
            arrowprops=None if name in diverged else leader,
        )


def _panel(axes: Axes, curves: Mapping[str, Curve], looks: Looks, *, against: str) -> None:
    finish = max(curve.steps[-1] for curve in curves.values())
    for name, curve in curves.items():
        x = getattr(curve, against)
        order = 2 if name == BASELINE else 3
        axes.plot(x, curve.mean, linewidth=1.8, zorder=order, **looks[name])
        axes.fill_between(
            x, curve.low, curve.high, color=str(looks[name]["color"]), alpha=0.25, linewidth=0
        )
        if curve.steps[-1] < finish:
            axes.plot(x[-1:], curve.mean[-1:], marker="X", markersize=7, color=looks[name]["color"])
    axes.set_xlim(0, max(float(getattr(curve, against)[-1]) for curve in curves.values()) or 1.0)
    axes.set_ylim(*_limits(curves))


def _count_tokens(axes: Axes, tokens_per_step: int, ink: str) -> None:
    """A second scale above the one of steps."""
    scale = (lambda step: step * tokens_per_step, lambda tokens: tokens / tokens_per_step)
    above = axes.secondary_xaxis("top", functions=scale)
    above.set_facecolor("none")
    above.set_xlabel("tokens", color=ink)
    above.tick_params(colors=ink, labelsize=9)
    above.spines["top"].set_color(ink)


def _bytes_scale(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Logarithmic, from the first evaluation after the start: methods differ by a hundredfold."""
    sent = np.concatenate([curve.sent[curve.sent > 0] for curve in curves.values()])
    axes.set_xscale("log")
    if sent.min() < sent.max():
        axes.set_xlim(sent.min(), sent.max())


def _entropy_line(axes: Axes, entropy: float, ink: str) -> None:
    """A dotted line at the unigram entropy, where it lies inside the panel."""
    bottom, top = axes.get_ylim()
    if not bottom < entropy < top:
        return
    axes.axhline(entropy, color=ink, linestyle=(0, (1, 3)), linewidth=1)
    axes.annotate(
        "unigram entropy",
        xy=(0.99, entropy),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=ink,
    )


def draw(
    table: Table,
    entropy: float,
    *,
    tokens_per_step: int,
    ink: str = "#1a1a1a",
    paper: str = "white",
) -> Figure:
    """The picture of a comparison: mean over seeds as a line, smallest to largest as a band.

    Args:
      table: the comparison's rows and curves.
      entropy: unigram entropy of the data, nats per byte; drawn where it is in range.
      tokens_per_step: for the scale of tokens above that of steps.
      ink: colour of text and axes.
      paper: colour of the background.

    Returns:
      A figure that belongs to no global state, with a panel for bytes sent where any are. Its loss
      axis may leave out the first fifth of training; an optimizer without a finite evaluation is
      not drawn.
    """
    curves = {name: curve for name, curve in table.curves.items() if len(curve.mean)}
    looks = _looks(list(table.curves))
    against = {"steps": "step", "seconds": "training seconds"}
    if any(curve.sent[-1] > 0 for curve in curves.values()):
        against["sent"] = "bytes sent per device"
    width = 5.5 * len(against)
    figure = Figure(figsize=(width, 4.8), facecolor=paper)
    panels = figure.subplots(1, len(against), sharey=True)
    figure.subplots_adjust(
        left=0.7 / width, right=1 - 0.17 / width, top=0.88, bottom=0.13, wspace=0.42
    )
    for axes, (values, xlabel) in zip(panels, against.items(), strict=True):
        if curves:
            _panel(axes, curves, looks, against=values)
            _entropy_line(axes, entropy, ink)
        dress(axes, xlabel, ink=ink)
        axes.tick_params(labelleft=True)
    panels[0].set_ylabel("validation loss (nats per byte)", color=ink)
    if curves:
        _label(panels[0], table, curves, looks)
        _count_tokens(panels[0], tokens_per_step, ink)
    if "sent" in against:
        _bytes_scale(panels[-1], curves)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an SVG document; the same figure gives the same text."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": "jaxopt-suite"}):
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    return buffer.getvalue()


def inline_svg(figure: Figure) -> str:
    """A figure drawn in ``PAGE_INK`` as an ``<svg>`` element for an HTML page, in its colours."""
    document = svg(figure)
    element = document[document.index("<svg") :].replace(PAGE_INK, "currentColor")
    # HTML knows these namespaces by itself, and the picture's size is the style sheet's business.
    return re.sub(r' (?:xmlns(?::xlink)?|width|height)="[^"]*"', "", element, count=4)
