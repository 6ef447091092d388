r"""The best model and data size for a budget of compute, with intervals from resampled fits.

With $C = 6ND$ laws that have a closed form use it. Any other count of FLOPs is an argument; then
$\ln N$ is searched on a grid that is narrowed around its best point, with the $D$ that spends the
budget found by bisection. An optimum at the edge of the grid is refused.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxopt_suite.scaling_laws.double import in_double
from jaxopt_suite.scaling_laws.law import Law
from jaxopt_suite.scaling_laws.refusals import NoInteriorOptimum

FlopRule = Callable[[Any, Any], Any]
SEARCHED = (1e3, 1e17)  # parameters, and tokens, a search goes through
_POINTS = 65
_ZOOMS = 6
_FAR = 100.0  # factor beyond the runs from which every number is doubtful


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Compute-optimal sizes. Arrays are ``[budgets]``, intervals ``[budgets, 2]``.

    Attributes:
      flops: the budgets.
      n: optimal numbers of parameters.
      d: optimal numbers of tokens.
      output: the law's value there.
      tokens_per_parameter: ``d / n``.
      a: slope of $\\ln N^*$ on $\\ln C$ at each budget.
      intervals: by the names above, from joint draws; empty without draws.
      level: of the intervals.
      extrapolation: each budget over the largest of the runs.
    """

    flops: np.ndarray
    n: np.ndarray
    d: np.ndarray
    output: np.ndarray
    tokens_per_parameter: np.ndarray
    a: np.ndarray
    intervals: Mapping[str, np.ndarray]
    level: float
    extrapolation: np.ndarray

    def __str__(self) -> str:
        lines = [f"{'FLOP':>9}  {'N':>9} {'D':>9} {'D/N':>7} {'output':>7}  beyond the runs"]
        for i, c in enumerate(self.flops):
            band = lambda name, i=i: (
                "[{:.3g}, {:.3g}]".format(*self.intervals[name][i]) if self.intervals else ""
            )
            far = f"{self.extrapolation[i]:.3g}x" + (
                "  DOUBTFUL: more than 100x" if self.extrapolation[i] > _FAR else ""
            )
            lines += [
                f"{c:9.3g}  {self.n[i]:9.3g} {self.d[i]:9.3g} {self.tokens_per_parameter[i]:7.3g} "
                f"{self.output[i]:7.4g}  {far}",
                f"{'':9}  N {band('n')} D {band('d')} D/N {band('tokens_per_parameter')}".rstrip(),
            ][: 2 if self.intervals else 1]
        return "\n".join(lines)


def frontier(
    law: Law,
    best: Mapping[str, float],
    draws: Mapping[str, np.ndarray] | None,
    flops: Any,
    *,
    rule: FlopRule | None,
    others: Mapping[str, float],
    largest: float,
    level: float,
) -> Frontier:
    """Compute-optimal sizes for each budget.

    Args:
      law: with inputs ``N`` and ``D``.
      best: parameters of the fit.
      draws: parameters of resamples, ``[replicates]`` each, or ``None``.
      flops: budgets, a number or ``[budgets]``.
      rule: FLOPs of a run of ``N`` parameters on ``D`` tokens; ``None``: ``6 N D``.
      others: values of the law's other inputs.
      largest: FLOPs of the largest run, by the same rule.
      level: of intervals.

    Raises:
      ValueError: if the law lacks an input, or a budget is not positive.
      NoInteriorOptimum: if the output still falls at the edge of what is searched.
    """
    budgets = np.atleast_1d(np.asarray(flops, np.float64))
    if budgets.ndim != 1 or not (np.isfinite(budgets) & (budgets > 0)).all():
        raise ValueError(f"flops must be positive numbers, got {flops!r}")
    missing = {"N", "D", *others} ^ set(law.inputs)
    if missing:
        raise ValueError(
            f"a frontier of {law.name} needs N, D and values for its other inputs "
            f"({', '.join(law.inputs)}), got {', '.join(others) or 'none'}"
        )
    middle = _quantities(law, best, budgets, rule, others)
    intervals: dict[str, np.ndarray] = {}
    if draws is not None:
        columns = {name: np.asarray(value)[:, None] for name, value in draws.items()}
        spread = _quantities(law, columns, budgets, rule, others)
        tails = [(1 - level) / 2, (1 + level) / 2]
        intervals = {name: np.quantile(v, tails, axis=0).T for name, v in spread.items()}
    return Frontier(
        flops=budgets,
        **middle,
        intervals=intervals,
        level=level,
        extrapolation=budgets / largest,
    )


@in_double
def _quantities(
    law: Law,
    values: Mapping[str, Any],
    flops: np.ndarray,
    rule: FlopRule | None,
    others: Mapping[str, float],
) -> dict[str, np.ndarray]:
    """What a frontier reports, of one parameter vector or of many ``[replicates, 1]``."""
    n, d = optimum(law, values, flops, rule, others)
    step = 1.01
    above, _ = optimum(law, values, flops * step, rule, others)
    below, _ = optimum(law, values, flops / step, rule, others)
    return {
        "n": n,
        "d": d,
        "output": _output(law, values, n, d, others),
        "tokens_per_parameter": d / n,
        "a": np.log(above / below) / (2 * np.log(step)),
    }


def optimum(
    law: Law,
    values: Mapping[str, Any],
    flops: np.ndarray,
    rule: FlopRule | None,
    others: Mapping[str, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Best ``N`` and ``D`` for each budget, by the closed form if it applies, else by search."""
    if rule is None and law.optimum is not None and not others:
        n, d = law.optimum(values, flops)
        return np.asarray(n), np.asarray(d)
    return _search(law, values, flops, rule, others)


def _output(
    law: Law, values: Mapping[str, Any], n: Any, d: Any, others: Mapping[str, float]
) -> Any:
    inputs = {"N": n, "D": d} | {name: np.full_like(n, value) for name, value in others.items()}
    return np.asarray(law.predict(values, inputs))


def _search(
    law: Law,
    values: Mapping[str, Any],
    flops: np.ndarray,
    rule: FlopRule | None,
    others: Mapping[str, float],
) -> tuple[np.ndarray, np.ndarray]:
    shape = np.broadcast_shapes(flops.shape, *(np.shape(v) for v in values.values()))
    columns = {name: np.broadcast_to(value, shape)[..., None] for name, value in values.items()}
    budget = np.broadcast_to(flops, shape)[..., None]
    low, high = (np.full((*shape, 1), np.log(edge)) for edge in SEARCHED)
    for zoom in range(_ZOOMS):
        log_n = low + (high - low) * np.linspace(0, 1, _POINTS)
        d = _affordable(rule, np.exp(log_n), budget)
        found = np.where(np.isnan(d), np.inf, _output(law, columns, np.exp(log_n), d, others))
        at = np.argmin(found, axis=-1)[..., None]
        if zoom == 0:
            _check_interior(at, found)
        near = lambda i, grid=log_n: np.take_along_axis(grid, np.clip(i, 0, _POINTS - 1), -1)
        low, high = near(at - 1), near(at + 1)
    n = np.exp(0.5 * (low + high))
    return n[..., 0], _affordable(rule, n, budget)[..., 0]


def _affordable(rule: FlopRule | None, n: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """The ``D`` that spends the budget, within ``SEARCHED``; NaN where none does."""
    if rule is None:
        return budget / (6 * n)
    low, high = (np.full(np.broadcast_shapes(n.shape, budget.shape), np.log(e)) for e in SEARCHED)
    reachable = (rule(n, np.exp(low)) <= budget) & (rule(n, np.exp(high)) >= budget)
    for _ in range(60):
        middle = 0.5 * (low + high)
        dear = rule(n, np.exp(middle)) > budget
        low, high = np.where(dear, low, middle), np.where(dear, middle, high)
    return np.where(reachable, np.exp(0.5 * (low + high)), np.nan)


def _check_interior(at: np.ndarray, found: np.ndarray) -> None:
    """Refuses a best point that has nothing affordable, or nothing at all, on one side of it."""
    beside = [np.take_along_axis(found, np.clip(at + s, 0, _POINTS - 1), -1) for s in (-1, 1)]
    edge = (at == 0) | (at == _POINTS - 1) | ~np.isfinite(beside[0]) | ~np.isfinite(beside[1])
    if edge.any():
        raise NoInteriorOptimum(
            "the best model size lies at the edge of what the budget allows between "
            f"{SEARCHED[0]:g} and {SEARCHED[1]:g} parameters and tokens"
        )
