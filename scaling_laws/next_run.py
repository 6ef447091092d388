r"""Which run would shrink the uncertainty of the optimum most.

To first order a fit's error has covariance $\sigma^2 H$ with $H = (J^\top W J)^{-1}$, $J$ the
Jacobian of its residuals, and the optimum $\ln N^*(C)$ has the gradient $g$ in the parameters. One
more run whose residual has the gradient $j$ changes the variance of the optimum by the factor

$$1 - \frac{(g^\top H j)^2}{(1 + j^\top H j)\; g^\top H g}$$

(Sherman and Morrison 1950), in which neither its loss nor the noise appears: a design can be judged
before it is run. With Huber's or other objectives the same holds as long as every run is as noisy
as the others, $\sigma$ being what the fit's covariance says.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jaxopt_suite import core
from jaxopt_suite.scaling_laws import coordinates, uncertainty
from jaxopt_suite.scaling_laws.double import in_double
from jaxopt_suite.scaling_laws.frontier import FlopRule, affordable, optimum
from jaxopt_suite.scaling_laws.refusals import FitRefused
from jaxopt_suite.scaling_laws.solver import Rows

if TYPE_CHECKING:
    from jaxopt_suite.scaling_laws.fit_result import Fit

_STEP = 1e-4  # of the solver vector, for the gradient of the optimum


@dataclasses.dataclass(frozen=True)
class NextRun:
    """Candidates of equal cost and what each would do. Arrays are ``[candidates]``, by size.

    Attributes:
      budget: FLOPs of the run.
      at: FLOPs of the optimum that is to become surer.
      n: parameters of the candidates.
      d: tokens that the budget leaves them.
      before: standard error of ``ln N*`` now.
      after: the same with the candidate's loss known.
      best: index of the smallest ``after``.
    """

    budget: float
    at: float
    n: np.ndarray
    d: np.ndarray
    before: float
    after: np.ndarray
    best: int

    @property
    def reduction(self) -> np.ndarray:
        """The share of the standard error that each candidate takes away."""
        return 1 - self.after / self.before

    def __str__(self) -> str:
        n, d = self.n[self.best], self.d[self.best]
        edge = "; it is the largest or smallest size allowed" if self._at_edge else ""
        return (
            f"train {n:.3g} parameters on {d:.3g} tokens ({self.budget:.3g} FLOP): the standard "
            f"error of ln N* at {self.at:.3g} FLOP falls from {self.before:.3g} to "
            f"{self.after[self.best]:.3g} ({self.reduction[self.best]:.0%}){edge}"
        )

    @property
    def _at_edge(self) -> bool:
        return self.best in (0, len(self.n) - 1)


@in_double
def next_run(
    fit: "Fit",
    budget: float,
    *,
    at: float | None = None,
    sizes: tuple[float, float] | None = None,
    candidates: int = 129,
    rule: FlopRule | None = None,
    **others: float,
) -> NextRun:
    """Judges runs of one budget and of sizes evenly spaced in the logarithm.

    Args:
      fit: of a law with inputs ``N`` and ``D``.
      budget: FLOPs to spend on one run.
      at: FLOPs of the optimum that is wanted; the same by default.
      sizes: smallest and largest number of parameters considered; by default a factor of three
        beyond those of the runs, as the law is least sure far from them.
      candidates: number of sizes.
      rule: FLOPs of ``N`` parameters on ``D`` tokens; ``None``: ``6 N D``.
      **others: values of the law's inputs besides ``N`` and ``D``, of the run and of the optimum.

    Raises:
      ValueError: if the law lacks an input, or for an illegal number.
      FitRefused: if the runs do not determine the law.
      NoInteriorOptimum: if there is no optimum at ``at``.
    """
    core.check_number("budget", budget, low=0.0, low_open=True)
    at = float(budget if at is None else at)
    core.check_number("at", at, low=0.0, low_open=True)
    core.check_int("candidates", candidates)
    if {"N", "D", *others} != set(fit.law.inputs):
        raise ValueError(
            f"next_run of {fit.law.name} needs N, D and values for its other inputs "
            f"({', '.join(fit.law.inputs)}), got {', '.join(others) or 'none'}"
        )
    n = np.geomspace(*(_sizes(fit) if sizes is None else sizes), candidates)
    d = affordable(rule, n, np.full_like(n, float(budget)))
    n, d = n[np.isfinite(d)], d[np.isfinite(d)]
    if not n.size:
        raise ValueError(f"no size from {sizes} can be trained for {budget:.3g} FLOP by the rule")
    inverse, variance = _information(fit)
    gradient = _gradient(fit, at, rule, others)[fit.free]
    columns = {"N": n, "D": d} | {name: np.full_like(n, value) for name, value in others.items()}
    jacobian = _jacobian(fit, columns)[:, fit.free]
    now = gradient @ inverse @ gradient
    gain = (jacobian @ inverse @ gradient) ** 2
    left = now - gain / (1 + np.einsum("ij,jk,ik->i", jacobian, inverse, jacobian))
    after = np.sqrt(variance * left)
    return NextRun(
        budget=float(budget),
        at=at,
        n=n,
        d=d,
        before=float(np.sqrt(variance * now)),
        after=after,
        best=int(np.argmin(after)),
    )


def _sizes(fit: "Fit") -> tuple[float, float]:
    n = fit.table.inputs["N"]
    return float(n.min() / 3), float(n.max() * 3)


def _information(fit: "Fit") -> tuple[np.ndarray, float]:
    """``H`` over the free parameters, and the variance of a run that the covariance implies."""
    free = np.ix_(fit.free, fit.free)
    jacobian = uncertainty.linearise(fit.batch, fit.theta)[1][:, fit.free]
    information = jacobian.T @ (fit.table.weights[:, None] * jacobian)
    if fit.degrees < 1 or np.linalg.cond(information) > 1e15:
        raise FitRefused(f"the runs do not determine {fit.law.name}: there is nothing to shrink")
    inverse = np.linalg.inv(information)
    return inverse, float(np.trace(fit.covariance[free] @ information) / len(information))


def _gradient(
    fit: "Fit", at: float, rule: FlopRule | None, others: Mapping[str, float]
) -> np.ndarray:
    """Derivatives ``[p]`` of ``ln N*`` by the solver vector, from central differences."""
    size = _STEP * np.maximum(np.abs(fit.theta), 0.1)
    moved = fit.theta + np.concatenate([np.diag(size), -np.diag(size)])
    values = {k: v[:, None] for k, v in coordinates.from_theta(fit.law, moved).items()}
    n, _ = optimum(fit.law, values, np.array([at]), rule, others)
    up, down = np.log(n[:, 0]).reshape(2, -1)
    return (up - down) / (2 * size)


def _jacobian(fit: "Fit", columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Derivatives ``[candidates, p]`` of residuals that runs would have; losses do not matter."""
    rows = Rows(dict(columns), np.ones(len(columns["N"])))
    return uncertainty.linearise(dataclasses.replace(fit.batch, rows=rows), fit.theta)[1]
