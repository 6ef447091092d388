r"""Fine-tuning: the rectified law, and choosing a model by little data (Lin et al., 2024).

$$L(D) = \frac{K}{D_l + D^{\beta}} + E,$$

where $D$ counts samples of fine-tuning and $D_l$, in the unit of $D^\beta$, is what pre-training
was worth. Two phases show in log-log: a curved start while $D^\beta \ll D_l$, then a power law.
$D = 0$ is legal, and gives $K/D_l + E$.

Traps: one curve has few points; a pre-trained model's own loss (no samples) often lies off the law,
and on the 90 released curves the error of the fit nearly doubles with it. A curve that is still in
its first phase determines neither $\beta$ nor $E$, and ``phase`` says so. Zero samples must not
become a small number (the authors' code has 1e-10).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_suite import core
from jaxopt_suite.scaling_laws.law import Arrays, Law, coefficient, exponent, floor, power
from jaxopt_suite.scaling_laws.refusals import TooFewRuns
from jaxopt_suite.scaling_laws.starts import grid

_PAPER = "Selecting Large Language Model to Fine-tune via Rectified Scaling Law, arXiv:2402.02314"
MATTERS = 1.0  # D^beta over D_l from which the power law shows
WITHIN = 5.0  # standardised residual up to which accept_then_stop takes a point
FIRST = 3  # points it begins with


def _predict(p: Arrays, x: Arrays) -> Any:
    none = x["D"] <= 0
    seen = jnp.where(none, 0.0, power(jnp.where(none, 1.0, x["D"]), p["beta"]))
    return p["K"] / (p["D_l"] + seen) + p["E"]


Rectified = Law(
    name="rectified",
    formula="L = K / (D_l + D^beta) + E",
    inputs=("D",),
    parameters=(
        coefficient("K", unit="loss samples^beta", start=(1.0, 1e5)),
        coefficient("D_l", unit="samples^beta", start=(1.0, 1e5)),
        exponent("beta", start=(0.1, 1.2)),
        floor("E"),
    ),
    predict=_predict,
    source=f"{_PAPER}, 2024",
)


def starts(sizes: Any, losses: Any) -> dict[str, np.ndarray]:
    """48 starts for ``fit(Rectified, ...)``: corners at four sizes, four powers, three floors.

    Args:
      sizes: samples of fine-tuning, ``[n]``.
      losses: ``[n]``.
    """
    losses = np.asarray(losses, np.float64)
    sizes = np.asarray(sizes, np.float64)
    if losses.shape != sizes.shape or losses.ndim != 1 or not losses.size:
        raise ValueError(f"sizes and losses must be [n], got {sizes.shape} and {losses.shape}")
    points = grid(beta=(0.2, 0.4, 0.7, 1.0), corner=(2.0, 5.0, 8.0, 11.0), share=(0.05, 0.5, 0.9))
    pre_learned = np.exp(points["beta"] * points["corner"])
    least = points["share"] * losses.min()
    return {
        "K": np.maximum(losses[np.argmin(sizes)] - least, 0.01 * losses.min()) * pre_learned,
        "D_l": pre_learned,
        "beta": points["beta"],
        "E": least,
    }


def phase(values: Mapping[str, float], sizes: Any) -> str:
    """Whether a fitted curve has reached its power law.

    Args:
      values: parameters of ``Rectified``.
      sizes: samples of fine-tuning that were fitted.

    Returns:
      ``"pre-power only"`` if ``D^beta`` is below ``D_l`` at the largest size, so that ``beta`` and
      ``E`` are guesses; ``"power"`` otherwise.
    """
    reached = float(np.max(sizes)) ** values["beta"]
    return "power" if reached > MATTERS * values["D_l"] else "pre-power only"


class Extrapolation(NamedTuple):
    """What ``accept_then_stop`` made of one model's losses."""

    loss: float  # at the full size
    slope: float  # of ln loss in ln size
    used: int  # how many of the largest sizes were accepted


def accept_then_stop(
    sizes: Any, losses: Any, full: float, *, first: int = FIRST, within: float = WITHIN
) -> Extrapolation:
    r"""Extrapolates a model's fine-tuning loss by the line through its largest sizes.

    Starts from the ``first`` largest sizes, fits $\ln L$ on $\ln D$, and takes the next smaller one
    in as long as it is within ``within`` standard deviations of the line's residuals (their root
    mean square, without a correction for degrees of freedom, as the authors have it). Where no size
    is refused, all are used; the authors' code then leaves out the smallest.

    Args:
      sizes: samples, ``[n]``, all above 0.
      losses: ``[n]``.
      full: size to extrapolate to.
      first: sizes to begin with, at least 3: the residuals of two are zero.
      within: standard deviations.

    Raises:
      ValueError: for numbers that are not positive, shapes that differ, or ``first`` below 3.
      TooFewRuns: for fewer sizes than ``first``.
    """
    core.check_int("first", first, low=3)
    core.check_number("within", within, low=0.0, low_open=True)
    core.check_number("full", full, low=0.0, low_open=True)
    sizes, losses = np.asarray(sizes, np.float64), np.asarray(losses, np.float64)
    if sizes.shape != losses.shape or sizes.ndim != 1:
        raise ValueError(f"sizes and losses must be [n], got {sizes.shape} and {losses.shape}")
    if not ((sizes > 0).all() and (losses > 0).all()):
        raise ValueError("sizes and losses must be positive")
    if len(sizes) < first:
        raise TooFewRuns(f"accept_then_stop needs {first} sizes, got {len(sizes)}")
    order = np.argsort(-sizes)
    x, y = np.log(sizes[order]), np.log(losses[order])
    used = first
    line, spread = _line(x[:used], y[:used])
    while used < len(x) and abs(y[used] - np.polyval(line, x[used])) <= within * spread:
        used += 1
        line, spread = _line(x[:used], y[:used])
    return Extrapolation(float(np.exp(np.polyval(line, np.log(full)))), float(line[0]), used)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    line = np.polyfit(x, y, 1)
    return line, float(np.sqrt(np.mean((y - np.polyval(line, x)) ** 2)))


def rank_models(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], full: float, **options: Any
) -> list[tuple[str, Extrapolation]]:
    """Models from the lowest extrapolated loss to the highest.

    Args:
      curves: sizes and losses by model.
      full: size to extrapolate to.
      **options: of ``accept_then_stop``.
    """
    found = {name: accept_then_stop(*curve, full, **options) for name, curve in curves.items()}
    return sorted(found.items(), key=lambda item: item[1].loss)
