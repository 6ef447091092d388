r"""Which of several laws describes the same runs better.

Information criteria need a likelihood. The density that belongs to an objective is

$$p(r) = e^{-\rho_\delta(r)/\tau} / Z(\tau), \qquad
Z(\tau) = \textstyle\sqrt{2\pi\tau}\,\mathrm{erf}(\delta/\sqrt{2\tau}) + (2\tau/\delta)\,
e^{-\delta^2/2\tau}$$

with its scale $\tau$ fitted: the normal density for squares, Laplace's for absolute values, Huber's
between. $\delta$ stays what the objective says; a free one would be another objective.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jaxopt_suite.scaling_laws.fit_result import Fit
from jaxopt_suite.scaling_laws.objectives import Objective


@dataclasses.dataclass(frozen=True)
class Score:
    """A fit among others of the same runs. Smaller criteria are better.

    Attributes:
      law: its name.
      parameters: number fitted.
      log_likelihood: of the objective's density with its best scale.
      aic: Akaike's criterion.
      bic: Schwarz's criterion.
      converged: whether the fit was certified.
    """

    law: str
    parameters: int
    log_likelihood: float
    aic: float
    bic: float
    converged: bool


def log_likelihood(objective: Objective, total: float, n: float) -> float:
    """Of residuals with the rounded sum ``total``, over runs of weight ``n``, at the best scale.

    Raises:
      ValueError: if nothing is left over: the likelihood has no bound.
    """
    if not total > 0:
        raise ValueError(f"a likelihood needs residuals, got a sum of {total}")
    negative = lambda log_tau: (
        total / math.exp(log_tau) + n * _log_normaliser(objective, math.exp(log_tau))
    )
    # Between the scales of a normal and of a Laplace density, with room on both sides.
    guess = math.log(2 * total / n)
    low, high = guess - 8, guess + 8
    for _ in range(8):
        grid = np.linspace(low, high, 65)
        at = int(np.argmin([negative(x) for x in grid]))
        low, high = grid[max(at - 1, 0)], grid[min(at + 1, 64)]
    return -negative(0.5 * (low + high))


def _log_normaliser(objective: Objective, tau: float) -> float:
    """``ln Z``; the two sides of zero have scales of their own where they weigh differently."""
    sides = (tau / (2 * objective.q), tau / (2 * (1 - objective.q)))
    return math.log(sum(_half(objective.delta, side) for side in sides))


def _half(delta: float, tau: float) -> float:
    inside = math.sqrt(math.pi * tau / 2) * math.erf(delta / math.sqrt(2 * tau))
    if math.isinf(delta):
        return inside
    return inside + tau / delta * math.exp(-(delta**2) / (2 * tau))


def compare(fits: Sequence[Fit]) -> list[Score]:
    """Fits of the same runs under the same objective, best (by AIC) first.

    Held-out errors, which matter more for extrapolation, are ``Fit.holdout`` of each.

    Raises:
      ValueError: for no fits, or ones that differ in runs, output, weights or objective.
    """
    if not fits:
        raise ValueError("compare needs at least one fit, got none")
    first = fits[0]
    for other in fits[1:]:
        same = np.array_equal(other.table.observed, first.table.observed) and np.array_equal(
            other.table.weights, first.table.weights
        )
        if not same or other.objective != first.objective:
            raise ValueError(
                "compare needs fits of the same runs under one objective, got "
                f"{first.law.name} ({first.table.n} runs, {first.objective}) and "
                f"{other.law.name} ({other.table.n} runs, {other.objective})"
            )
    return sorted(map(_score, fits), key=lambda score: score.aic)


def _score(fit: Fit) -> Score:
    parameters = len(fit.law.names) - len(fit.fixed)
    n = float(fit.table.weights.sum())
    total = fit.certificate.objective * fit.objective.unit
    found = log_likelihood(fit.objective, total, n)
    return Score(
        law=fit.law.name,
        parameters=parameters,
        log_likelihood=found,
        aic=2 * (parameters + 1) - 2 * found,  # and the scale
        bic=(parameters + 1) * math.log(n) - 2 * found,
        converged=fit.converged,
    )
