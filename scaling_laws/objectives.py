r"""What a fit minimises: a sum over runs of a function of the residual.

With prediction $\hat y$ and observation $y$ the residual is $r = \ln\hat y - \ln y$ or
$r = \hat y - y$, and the objective $\sum_i w_i \rho(r_i)$, a sum and never a mean, with

    squares            r^2 / 2
    huber(delta)       r^2 / 2 where |r| <= delta, delta (|r| - delta/2) elsewhere
    absolute()         |r|
    quantile(q)        2 q |r| where y > prediction, 2 (1 - q) |r| elsewhere

The last two are solved with their corner rounded within ``delta`` of zero, like Huber's. ``q`` is
the share of runs that should lie below the curve: 1/11 weighs over-prediction ten times, which
follows the best runs. All tests of the solver are relative, so that the scale of the objective
means nothing.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from jaxopt_suite import core

SPACES = ("log", "linear")
KINDS = ("squares", "huber", "absolute", "quantile")


@dataclasses.dataclass(frozen=True)
class Objective:
    """Identity of an objective; made by ``huber``, ``squares``, ``absolute`` and ``quantile``.

    Attributes:
      kind: one of ``KINDS``.
      space: ``"log"`` for residuals of logarithms, ``"linear"`` for plain differences.
      delta: residual at which the square ends, in the unit of the residual.
      q: share of the weight on under-predictions.
    """

    kind: str
    space: str = "log"
    delta: float = math.inf
    q: float = 0.5

    def __post_init__(self) -> None:
        core.check_choice("kind", self.kind, KINDS)
        core.check_choice("space", self.space, SPACES)
        if not self.delta > 0:
            raise ValueError(f"delta must be positive, got {self.delta!r}")
        core.check_number("q", self.q, low=0.0, high=1.0, low_open=True, high_open=True)

    @property
    def unit(self) -> float:
        """What the rounded sum is divided by for the value to be that of the table above."""
        return self.delta if self.kind in ("absolute", "quantile") else 1.0

    def __str__(self) -> str:
        detail = {"huber": f", delta={self.delta:g}", "quantile": f", q={self.q:g}"}
        return f"sum of {self.kind}({self.space} residual{detail.get(self.kind, '')})"


def huber(delta: float = 1e-3, *, space: str = "log") -> Objective:
    """Squares near zero, absolute values beyond ``delta``.

    Args:
      delta: where the square ends. On log residuals 1e-3 is the custom of Hoffmann et al. (2022);
        it is below the usual scatter of losses, so the fit is close to one by absolute values.
      space: ``"log"`` or ``"linear"``.
    """
    core.check_number("delta", delta, low=0.0, low_open=True)
    return Objective("huber", space, float(delta))


def squares(*, space: str = "log") -> Objective:
    """Least squares."""
    return Objective("squares", space)


def absolute(*, space: str = "log", delta: float = 1e-6) -> Objective:
    """Least absolute values, the corner rounded within ``delta``."""
    core.check_number("delta", delta, low=0.0, low_open=True)
    return Objective("absolute", space, float(delta))


def quantile(q: float, *, space: str = "log", delta: float = 1e-6) -> Objective:
    """The curve below which a share ``q`` of the runs lies, the corner rounded within ``delta``."""
    core.check_number("delta", delta, low=0.0, low_open=True)
    return Objective("quantile", space, float(delta), float(q))


def residual(space: str, predicted: Any, observed: Any) -> Any:
    """Residuals in the objective's space; over-prediction is positive."""
    if space == "log":
        return jnp.log(predicted) - jnp.log(observed)
    return predicted - observed


def sides(r: Any, q: Any) -> Any:
    """The weight of each residual by its sign: 1 for ``q`` of one half."""
    return 2 * jnp.where(r > 0, 1 - q, q)


def rho(r: Any, delta: Any, q: Any) -> Any:
    """The rounded function of the residual; ``delta`` may be infinite."""
    size = jnp.abs(r)
    return sides(r, q) * jnp.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta))


def psi(r: Any, delta: Any, q: Any) -> Any:
    """First derivative of ``rho``."""
    return sides(r, q) * jnp.clip(r, -delta, delta)


def curvature(r: Any, delta: Any, q: Any) -> Any:
    """Second derivative of ``rho``, where it has one."""
    return sides(r, q) * (jnp.abs(r) <= delta)


def majoriser(r: Any, delta: Any, q: Any) -> Any:
    """Curvature of the parabola that touches ``rho`` at ``r`` and lies above it (IRLS weight)."""
    size = jnp.maximum(jnp.abs(r), jnp.finfo(jnp.result_type(r)).tiny)
    return sides(r, q) * jnp.minimum(1.0, delta / size)
