r"""Compute-optimal sizes from the lower envelope of training curves: approach 1 of Hoffmann et al.

At each of many budgets every run's loss is read off its curve, and the size of the run that is
lowest is $N^*$. Two things bias it. The lowest of noisy curves is low by luck, the more so the more
curves compete: smooth them first (``smooth``). And a curve in the middle of its schedule is higher
than a run that was meant to end there would be: ask for winners near their end (``late``).
"""

import dataclasses
from typing import Any

import numpy as np

from jaxopt_suite import core
from jaxopt_suite.scaling_laws.allocation import LEAST_SLICES, Line, regress
from jaxopt_suite.scaling_laws.frontier import FlopRule
from jaxopt_suite.scaling_laws.refusals import TooFewSlices
from jaxopt_suite.scaling_laws.table import column, columns_of


@dataclasses.dataclass(frozen=True)
class Envelope:
    """The envelope and the frontier through its points.

    Attributes:
      flops: budgets at which the winner is no run of the smallest or largest size, ``[budgets]``.
      n: parameters of the winner.
      d: tokens it has seen.
      loss: its loss.
      progress: share of its own tokens that it has seen.
      left_out: budgets asked for without such a winner.
      a: the line of ``ln N`` on ``ln C``; its interval is from resampled runs.
      b: the line of ``ln D``.
      level: of the intervals.
    """

    flops: np.ndarray
    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray
    progress: np.ndarray
    left_out: int
    a: Line
    b: Line
    level: float

    def __str__(self) -> str:
        low, high = self.a.interval
        return (
            f"N* ~ C^{self.a.slope:.3f} [{low:.3f}, {high:.3f}], D* ~ C^{self.b.slope:.3f} from "
            f"{len(np.unique(self.n))} sizes at {len(self.flops)} budgets "
            f"({self.left_out} left out); winners have seen {self.progress.min():.0%} or more of "
            "their tokens"
        )


def envelope(
    runs: Any,
    *,
    budgets: int = 200,
    smooth: float = 0.0,
    late: float = 0.0,
    rule: FlopRule | None = None,
    draws: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> Envelope:
    """Optimal sizes along the lower envelope of curves, and their frontier.

    Args:
      runs: every record of every run: ``run_id``, ``N``, ``D`` so far and ``loss``;
        ``load_runs(..., mode="curve")`` reads them.
      budgets: number of budgets, evenly spaced in the logarithm over what the curves cover.
      smooth: losses are averaged over records within this share of their tokens, such as 0.05.
      late: only winners that have seen this share of their own tokens count, such as 0.85; use it
        where the learning rate decays.
      rule: FLOPs of ``N`` parameters on ``D`` tokens; ``None``: ``6 N D``.
      draws: how often runs are drawn again with replacement; 0 for an interval from the scatter
        about the line, which is too narrow: neighbouring budgets have the same winner.
      level: of intervals.
      seed: of the draws.

    Raises:
      ValueError: for an illegal argument or column.
      TooFewSlices: if fewer than three sizes win anywhere.
    """
    core.check_int("budgets", budgets, low=LEAST_SLICES)
    core.check_int("draws", draws, low=0)
    core.check_number("smooth", smooth, low=0.0, high=1.0, high_open=True)
    core.check_number("late", late, low=0.0, high=1.0)
    core.check_number("level", level, low=0.0, high=1.0, low_open=True, high_open=True)
    curves = _curves(runs, rule or (lambda n, d: 6.0 * n * d), smooth)
    first = min(np.log(curve.flops[0]) for curve in curves)
    last = max(np.log(curve.flops[-1]) for curve in curves)
    at = np.linspace(first, last, budgets)
    table = _Table(
        at,
        np.array([curve.n for curve in curves]),
        np.stack([curve.read(at, late) for curve in curves]),
    )
    keep, winner = table.winners(np.arange(len(curves)))
    _check_sizes(table.n[winner[keep]])
    ours = [
        (curves[j], float(at[i])) for i, j in zip(np.flatnonzero(keep), winner[keep], strict=True)
    ]
    tokens = np.array([curve.tokens(x) for curve, x in ours])
    lines = _lines(table, curves, draws, seed)
    flops = np.exp(at[keep])
    n = table.n[winner[keep]]
    return Envelope(
        flops=flops,
        n=n,
        d=tokens,
        loss=np.exp(table.losses[winner[keep], keep]),
        progress=tokens / np.array([curve.d[-1] for curve, _ in ours]),
        left_out=int((~keep).sum()),
        a=_line(flops, n, lines[:, 0], level),
        b=_line(flops, tokens, lines[:, 1], level),
        level=level,
    )


@dataclasses.dataclass(frozen=True)
class _Curve:
    n: float
    d: np.ndarray  # [records], rising
    flops: np.ndarray  # [records]
    log_loss: np.ndarray  # [records]

    def read(self, at: np.ndarray, late: float) -> np.ndarray:
        """``ln loss`` at logarithms of budgets; infinite where the run is not, or not yet late."""
        x = np.log(self.flops)
        there = (at >= x[0]) & (at <= x[-1])
        values = np.interp(at, x, self.log_loss)
        enough = np.exp(np.interp(at, x, np.log(self.d))) >= late * self.d[-1] * (1 - 1e-9)
        return np.where(there & enough, values, np.inf)

    def tokens(self, at: float) -> float:
        return float(np.exp(np.interp(at, np.log(self.flops), np.log(self.d))))


@dataclasses.dataclass(frozen=True)
class _Table:
    at: np.ndarray  # [budgets], logarithms
    n: np.ndarray  # [runs]
    losses: np.ndarray  # [runs, budgets], logarithms

    def winners(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Budgets with a winner between other sizes that compete, and the winning run of each."""
        losses, n = self.losses[chosen], self.n[chosen]
        best = np.argmin(losses, axis=0)
        competing = np.isfinite(losses)
        smallest = np.where(competing, n[:, None], np.inf).min(axis=0)
        largest = np.where(competing, n[:, None], -np.inf).max(axis=0)
        inside = (n[best] > smallest) & (n[best] < largest)
        return inside, chosen[best]


def _curves(runs: Any, flops_of: FlopRule, smooth: float) -> list[_Curve]:
    columns = columns_of(runs)
    if "run_id" not in columns:
        raise ValueError(f"an envelope needs a column 'run_id', got {', '.join(columns)}")
    ids = np.asarray(columns["run_id"]).astype(str)
    n, d, loss = (column(columns, name) for name in ("N", "D", "loss"))
    # A record before the first step has seen no tokens: there is nothing at a budget of zero.
    used = d > 0
    for name, values in {"N": n, "loss": loss}.items():
        if not (values[used] > 0).all():
            raise ValueError(f"column {name!r} must be positive, got {values[used].min()}")
    found = []
    for name in np.unique(ids[used]):
        rows = np.flatnonzero(used & (ids == name))
        rows = rows[np.argsort(d[rows], kind="stable")]
        if np.ptp(n[rows]) > 0:
            raise ValueError(
                f"run {name!r} must have one N, got {n[rows].min()} to {n[rows].max()}"
            )
        mean = _smoothed(d[rows], np.log(loss[rows]), smooth)
        flops = np.asarray(flops_of(n[rows], d[rows]), np.float64)
        found.append(_Curve(float(n[rows[0]]), d[rows], flops, mean))
    if not found:
        raise ValueError("an envelope needs records with D above 0, got none")
    return found


def _smoothed(d: np.ndarray, values: np.ndarray, share: float) -> np.ndarray:
    """Means of ``values`` over records whose tokens are within a share of each one's."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.searchsorted(d, d * (1 - share), side="left")
    high = np.searchsorted(d, d * (1 + share), side="right")
    return (sums[high] - sums[low]) / (high - low)


def _check_sizes(n: np.ndarray) -> None:
    sizes = len(np.unique(n))
    if sizes < LEAST_SLICES:
        raise TooFewSlices(
            f"an envelope needs at least {LEAST_SLICES} sizes that are lowest somewhere, between "
            f"others that compete there; got {sizes}"
        )


def _lines(table: _Table, curves: list[_Curve], draws: int, seed: int) -> np.ndarray:
    """Slope and intercept of ``ln N`` and of ``ln D`` for redrawn runs, ``[draws, 2, 2]``.

    A draw in which fewer than three sizes win says nothing and is left out.
    """
    rng = np.random.default_rng(seed)
    tokens = np.stack([np.interp(table.at, np.log(c.flops), np.log(c.d)) for c in curves])
    found = []
    for _ in range(draws):
        keep, winner = table.winners(np.unique(rng.integers(len(curves), size=len(curves))))
        n = np.log(table.n[winner[keep]])
        if len(np.unique(n)) >= LEAST_SLICES:
            x = table.at[keep]
            d = tokens[winner[keep], np.flatnonzero(keep)]
            found.append([np.polyfit(x, n, 1), np.polyfit(x, d, 1)])
    return np.array(found).reshape(-1, 2, 2)


def _line(flops: np.ndarray, size: np.ndarray, drawn: np.ndarray, level: float) -> Line:
    line = regress(flops, np.log(size), None, floor=0.0, level=level)
    if not len(drawn):
        return line
    low, high = np.quantile(drawn[:, 0], [(1 - level) / 2, (1 + level) / 2]).tolist()
    return dataclasses.replace(
        line, interval=(low, high), slopes=drawn[:, 0], intercepts=drawn[:, 1]
    )
