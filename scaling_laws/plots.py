"""Pictures of a fit: the runs with the fitted curves, the frontier, residuals, extrapolation.

Every function imports matplotlib when it is called, and returns a figure that belongs to no global
state. ``ink`` and ``paper`` are the colours of text and background.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxopt_suite.core.figures import GREY, PALETTE, dress

if TYPE_CHECKING:
    from jaxopt_suite.scaling_laws.fit_result import Fit
    from jaxopt_suite.scaling_laws.isoflop import IsoFLOP

INK, PAPER = "#1a1a1a", "white"
_LEVEL = 0.9
_BEYOND = 100.0  # factor beyond the largest run that extrapolation is drawn to
_POINTS = 120
_BUDGETS = 24  # at which a frontier is drawn; laws without a closed form search at each
_LINES = 5  # curves of equal compute
_COLOURS = "viridis"


def plot(fit: "Fit", *, ink: str = INK, paper: str = PAPER) -> Any:
    """All pictures of a fit in one figure.

    A law of ``N`` and ``D`` gets losses against both with lines of equal compute, the surface with
    the frontier, optimal sizes, residuals, and the loss along the frontier up to a hundred times
    the largest run; bands are from resampled fits, where there are any. Another law gets
    predictions against observations, and residuals against each input.

    Args:
      fit: to draw.
      ink: colour of text and axes.
      paper: colour of the background.

    Returns:
      A ``matplotlib.figure.Figure``.
    """
    if set(fit.law.inputs) == {"N", "D"}:
        panels: list[Callable[..., None]] = [
            lambda axes, fit, ink: _against(axes, fit, "N", ink),
            lambda axes, fit, ink: _against(axes, fit, "D", ink),
            _surface,
            _frontier,
            _residuals_by_compute,
            _extrapolation,
        ]
    else:
        panels = [_predicted]
        for name in fit.law.inputs:
            panels.append(lambda axes, fit, ink, name=name: _residuals_by(axes, fit, name, ink))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = _figure((4.6 * columns, 3.8 * rows), paper)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        panel(axes, fit, ink)
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


def plot_isoflop(found: "IsoFLOP", *, ink: str = INK, paper: str = PAPER) -> Any:
    """The slices with their curves and minima, and the optimal sizes with their line.

    Args:
      found: by ``isoflop``.
      ink: colour of text and axes.
      paper: colour of the background.

    Returns:
      A ``matplotlib.figure.Figure``.
    """
    figure = _figure((11, 4.4), paper)
    left, right = figure.subplots(1, 2)
    colours = _shades(len(found.slices))
    for colour, one in zip(colours, found.slices, strict=True):
        x = np.linspace(np.log(one.sizes[0]), np.log(one.sizes[-1]), _POINTS)
        left.plot(one.sizes, one.losses, "o", color=colour, markersize=4)
        curve = found.curve.draw(np.log(one.sizes), one.losses, x)
        left.plot(np.exp(x), curve, color=colour, linewidth=1.4, label=f"{one.flops:.2g} FLOP")
        left.plot(one.n, one.loss, marker="v", color=PALETTE[1], markersize=7, linestyle="none")
    left.set_xscale("log")
    left.legend(frameon=False, fontsize=8, labelcolor=ink)
    dress(left, "parameters N", "loss", ink=ink)
    flops = np.array([one.flops for one in found.slices])
    _line_with_band(right, flops, found, ink)
    return figure


def _line_with_band(axes: Any, flops: np.ndarray, found: "IsoFLOP", ink: str) -> None:
    x = np.geomspace(flops.min() / 2, flops.max() * 4, _POINTS)
    axes.plot(x, found.a.at(x), color=PALETTE[0], label=f"N* ~ C^{found.a.slope:.3f}")
    if len(found.a.slopes):
        tails = [(1 - found.level) / 2, (1 + found.level) / 2]
        low, high = np.quantile(found.a.spread(x), tails, axis=0)
        axes.fill_between(x, low, high, color=PALETTE[0], alpha=0.25, linewidth=0)
    for one in found.slices:
        if one.interval is not None:
            ends = np.clip(one.interval, one.sizes[0], one.sizes[-1])
            axes.plot([one.flops, one.flops], ends, color=ink, linewidth=1)
    axes.plot(flops, [s.n for s in found.slices], "o", color=ink, markersize=5)
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False, fontsize=9, labelcolor=ink)
    dress(axes, "compute, FLOP", "optimal parameters N*", ink=ink)


def _figure(size: tuple[float, float], paper: str) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, facecolor=paper, layout="constrained")


def _shades(count: int) -> Any:
    from matplotlib import colormaps

    # Neither end, which are lost on a black and on a white page.
    return colormaps[_COLOURS](np.linspace(0.15, 0.85, count))


def _flops(fit: "Fit") -> np.ndarray:
    return 6 * fit.table.inputs["N"] * fit.table.inputs["D"]


def _against(axes: Any, fit: "Fit", name: str, ink: str) -> None:
    """Losses against one input, and the law along lines of equal compute."""
    x, flops = fit.table.inputs[name], _flops(fit)
    axes.scatter(x, fit.table.observed, c=np.log(flops), cmap=_COLOURS, s=12, zorder=3)
    other = "D" if name == "N" else "N"
    seen = fit.table.inputs[other]
    budgets = np.quantile(flops, np.linspace(0.05, 0.95, _LINES))
    at = np.geomspace(x.min(), x.max(), _POINTS)
    for colour, budget in zip(_shades(_LINES), budgets, strict=True):
        rest = budget / (6 * at)
        inside = (rest >= seen.min()) & (rest <= seen.max())
        if inside.any():
            curve = fit.predict({name: at[inside], other: rest[inside]})
            axes.plot(at[inside], curve, color=colour, linewidth=1.3, label=f"{budget:.1g} FLOP")
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=7, labelcolor=ink)
    axes.set_ylim(*_margins(fit.table.observed))
    label = {"N": "parameters N", "D": "tokens D"}[name]
    dress(axes, label, fit.law.output, ink=ink)


def _margins(values: np.ndarray) -> tuple[float, float]:
    room = 0.05 * np.ptp(values) or 0.1
    return float(values.min() - room), float(values.max() + room)


def _surface(axes: Any, fit: "Fit", ink: str) -> None:
    """Contours of the law over ``N`` and ``D``, the runs, and the frontier."""
    n, d = fit.table.inputs["N"], fit.table.inputs["D"]
    sizes = np.geomspace(n.min() / 2, n.max() * 2, 60)
    tokens = np.geomspace(d.min() / 2, d.max() * 2, 60)
    loss = fit.predict({"N": sizes[None, :], "D": tokens[:, None]})
    lines = axes.contour(
        sizes, tokens, loss, levels=12, cmap=_COLOURS, linewidths=1, negative_linestyles="solid"
    )
    axes.clabel(lines, fontsize=7, fmt="%.2f")
    axes.plot(n, d, "o", color=GREY, markersize=2.5)
    best = _optima(fit, np.geomspace(_flops(fit).min(), _flops(fit).max(), _BUDGETS))
    if best is not None:
        axes.plot(best.n, best.d, color=PALETTE[1], linewidth=1.8, label="compute-optimal")
        axes.legend(frameon=False, fontsize=8, labelcolor=ink)
    axes.set(xscale="log", yscale="log")
    axes.set_xlim(sizes[0], sizes[-1])
    axes.set_ylim(tokens[0], tokens[-1])
    dress(axes, "parameters N", "tokens D", ink=ink)


def _optima(fit: "Fit", flops: np.ndarray) -> Any:
    """The frontier, or ``None`` for a fit that has none."""
    from jaxopt_suite.scaling_laws.refusals import NoInteriorOptimum

    try:
        return fit.compute_optimal(flops, level=_LEVEL)
    except NoInteriorOptimum:
        return None


def _beyond(fit: "Fit") -> np.ndarray:
    flops = _flops(fit)
    return np.geomspace(flops.min(), _BEYOND * flops.max(), _BUDGETS)


def _frontier(axes: Any, fit: "Fit", ink: str) -> None:
    """Optimal parameters and tokens against compute, with bands."""
    found = _optima(fit, _beyond(fit))
    if found is None:
        axes.text(0.5, 0.5, "no optimum inside", ha="center", color=ink, transform=axes.transAxes)
    else:
        for name, label, colour in (("n", "N*", PALETTE[0]), ("d", "D*", PALETTE[1])):
            axes.plot(found.flops, getattr(found, name), color=colour, label=label)
            if name in found.intervals:
                low, high = found.intervals[name].T
                axes.fill_between(found.flops, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.set(xscale="log", yscale="log")
        _mark_largest(axes, fit)
        axes.legend(frameon=False, fontsize=9, labelcolor=ink)
    dress(axes, "compute, FLOP", "optimal parameters and tokens", ink=ink)


def _mark_largest(axes: Any, fit: "Fit") -> None:
    axes.axvline(_flops(fit).max(), color=GREY, linestyle=":", linewidth=1.2, label="largest run")


def _extrapolation(axes: Any, fit: "Fit", ink: str) -> None:
    """The loss along the frontier with its band, and the runs, none of which can be below it."""
    axes.plot(_flops(fit), fit.table.observed, "o", color=GREY, markersize=3, label="runs")
    found = _optima(fit, _beyond(fit))
    if found is not None:
        axes.plot(found.flops, found.output, color=PALETTE[0], label="on the frontier")
        if "output" in found.intervals:
            low, high = found.intervals["output"].T
            axes.fill_between(found.flops, low, high, color=PALETTE[0], alpha=0.25, linewidth=0)
    _mark_largest(axes, fit)
    axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8, labelcolor=ink)
    dress(axes, "compute, FLOP", fit.law.output, ink=ink)


def _residuals(axes: Any, fit: "Fit", x: np.ndarray, label: str, ink: str) -> None:
    axes.axhline(0, color=GREY, linewidth=1)
    axes.plot(x, fit.residuals, "o", color=PALETTE[0], markersize=3.5)
    if (x > 0).all() and x.max() > 10 * x.min():
        axes.set_xscale("log")
    space = "ln predicted - ln observed" if fit.objective.space == "log" else "predicted - observed"
    dress(axes, label, space, ink=ink)


def _residuals_by_compute(axes: Any, fit: "Fit", ink: str) -> None:
    _residuals(axes, fit, _flops(fit), "compute, FLOP", ink)


def _residuals_by(axes: Any, fit: "Fit", name: str, ink: str) -> None:
    _residuals(axes, fit, fit.table.inputs[name], name, ink)


def _predicted(axes: Any, fit: "Fit", ink: str) -> None:
    """Predictions against observations, and the line where they are equal."""
    observed = fit.table.observed
    axes.plot(observed, fit.predict(fit.table.inputs), "o", color=PALETTE[0], markersize=3.5)
    ends = [observed.min(), observed.max()]
    axes.plot(ends, ends, color=GREY, linewidth=1)
    dress(axes, f"{fit.law.output}, observed", f"{fit.law.output}, predicted", ink=ink)
