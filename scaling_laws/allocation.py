r"""Regression of optimal sizes on compute: $\ln N^* = \ln G + a \ln C$, and the same for $D^*$.

Optima from slices have errors of different size, and some are only known to lie beyond the sizes
that were trained (censored). With known standard deviations $s_i$ the line maximises the likelihood
of both (Tobin 1958): its EM steps replace a censored value by its expectation under the line, and
fit a weighted line.
"""

import dataclasses
import math

import numpy as np

from jaxopt_suite.scaling_laws.distributions import student_quantile
from jaxopt_suite.scaling_laws.refusals import TooFewSlices

LEAST_SLICES = 3
_EM_STEPS = 200


@dataclasses.dataclass(frozen=True)
class Optima:
    """Logarithms of optimal sizes at budgets of compute.

    Attributes:
      value: ``[..., budgets]``; where censored, the edge it lies beyond.
      side: -1 for below that edge, 1 for above, 0 for known; same shape.
      sd: standard deviations ``[budgets]``, of known values.
    """

    value: np.ndarray
    side: np.ndarray
    sd: np.ndarray


@dataclasses.dataclass(frozen=True)
class Line:
    """``ln size = intercept + slope ln C``; intervals are ``(low, high)`` of ``level``.

    Attributes:
      slope: the exponent.
      intercept: of the logarithms.
      interval: of the slope.
      curvature: coefficient of a quadratic term in ``ln C``; NaN with three budgets.
      curvature_t: the same over its standard error.
      slopes: of redrawn optima, ``[draws]``; empty without.
      intercepts: likewise.
    """

    slope: float
    intercept: float
    interval: tuple[float, float]
    curvature: float
    curvature_t: float
    slopes: np.ndarray
    intercepts: np.ndarray

    def at(self, flops: np.ndarray) -> np.ndarray:
        """Sizes at budgets ``[budgets]``."""
        return np.exp(self.intercept + self.slope * np.log(flops))

    def spread(self, flops: np.ndarray) -> np.ndarray:
        """Sizes by every redrawn line, ``[draws, budgets]``."""
        return np.exp(self.intercepts[:, None] + self.slopes[:, None] * np.log(flops))


def regress(
    flops: np.ndarray, best: np.ndarray, draws: Optima | None, *, floor: float, level: float
) -> Line:
    """A line through optima.

    Args:
      flops: budgets ``[budgets]``.
      best: logarithms of the optima ``[budgets]``.
      draws: of redrawn losses, ``[draws, budgets]``; their spread gives weights and the interval.
        Without them weights are equal and the interval is Student's.
      floor: added in quadrature to every standard deviation, in nats.
      level: of the interval.

    Raises:
      TooFewSlices: with fewer than three budgets.
    """
    if len(flops) < LEAST_SLICES:
        raise TooFewSlices(
            f"a frontier needs at least {LEAST_SLICES} budgets of compute, got {len(flops)}"
        )
    x = np.log(flops)
    middle = x.mean()
    sd = np.ones(len(x)) if draws is None else np.hypot(draws.sd, floor)
    sd = sd if (sd > 0).all() else np.ones(len(x))  # without noise all are known alike
    intercept, slope = _line(x - middle, best[None], sd)[0]
    slopes = intercepts = np.zeros(0)
    if draws is not None:
        lines = censored_lines(x - middle, dataclasses.replace(draws, sd=sd))
        slopes, intercepts = lines[:, 1], lines[:, 0] - lines[:, 1] * middle
        tails = np.quantile(slopes, [(1 - level) / 2, (1 + level) / 2])
        interval = (float(tails[0]), float(tails[1]))
    else:
        interval = _student(x - middle, best, float(slope), level)
    return Line(
        float(slope),
        float(intercept - slope * middle),
        interval,
        *_curvature(x - middle, best, sd),
        slopes,
        intercepts,
    )


def censored_lines(x: np.ndarray, optima: Optima) -> np.ndarray:
    """Intercepts and slopes ``[draws, 2]`` of the likeliest lines through ``[draws, budgets]``."""
    filled, censored = optima.value.copy(), optima.side != 0
    lines = _line(x, filled, optima.sd)
    rows = np.flatnonzero(censored.any(axis=1))
    if not rows.size:
        return lines
    edge, side, sd = optima.value[rows], optima.side[rows], optima.sd
    for _ in range(_EM_STEPS):
        expected = lines[rows, :1] + lines[rows, 1:] * x
        # Of what lies beyond the edge, on its side: the mean of a truncated normal.
        beyond = expected + side * sd * _inverse_mills(side * (edge - expected) / sd)
        filled[rows] = np.where(side != 0, beyond, edge)
        lines[rows] = _line(x, filled[rows], sd)
    return lines


def _line(x: np.ndarray, y: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Weighted least squares of each row of ``y [draws, budgets]``: ``[draws, 2]``."""
    design = np.stack([np.ones_like(x), x], axis=1) / sd[:, None]
    return (y / sd) @ np.linalg.pinv(design).T


_erfc = np.vectorize(math.erfc, otypes=[float])


def _inverse_mills(z: np.ndarray) -> np.ndarray:
    """Density over upper tail of the standard normal; far out, where both vanish, ``z + 1/z``."""
    near = np.clip(z, -30.0, 30.0)
    density = np.exp(-0.5 * near**2) / math.sqrt(2 * math.pi)
    ratio = density / (0.5 * _erfc(near / math.sqrt(2)))
    return np.where(z > 30, z + 1 / np.maximum(z, 1), ratio)


def _student(x: np.ndarray, y: np.ndarray, slope: float, level: float) -> tuple[float, float]:
    degrees = len(x) - 2
    residual = y - y.mean() - slope * x
    error = np.sqrt(residual @ residual / degrees / (x @ x))
    reach = student_quantile(level, degrees) * error
    return float(slope - reach), float(slope + reach)


def _curvature(x: np.ndarray, y: np.ndarray, sd: np.ndarray) -> tuple[float, float]:
    """The quadratic coefficient and its ``t``, from the scatter about the parabola."""
    if len(x) <= LEAST_SLICES:
        return math.nan, math.nan
    design = np.stack([np.ones_like(x), x, x**2], axis=1) / sd[:, None]
    c = np.linalg.pinv(design) @ (y / sd)
    residual = y / sd - design @ c
    variance = residual @ residual / (len(x) - 3) * np.linalg.inv(design.T @ design)[2, 2]
    return float(c[2]), float(c[2] / np.sqrt(variance)) if variance > 0 else math.nan
