"""Runs sorted into slices of equal compute, and how noisy their losses are."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxopt_suite.scaling_laws.frontier import FlopRule
from jaxopt_suite.scaling_laws.table import column, columns_of

_OF_MEDIAN = 1.4826  # standard deviation of a normal over the median of its absolute values
_CELLS_FOR_POWER = 5  # settings with repeats from which the noise may depend on the loss


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one budget.

    Attributes:
      flops: the budget: geometric mean over its runs.
      n: parameters ``[runs]``, rising.
      d: tokens ``[runs]``.
      loss: ``[runs]``.
    """

    flops: float
    n: np.ndarray
    d: np.ndarray
    loss: np.ndarray


def group(
    runs: Any,
    *,
    rule: FlopRule | None,
    budgets: Sequence[float] | None,
    tolerance: float,
) -> list[Group]:
    """Slices of equal compute, smallest first.

    Args:
      runs: with ``N``, ``loss`` and two of ``C``, ``D``, the FLOP rule; see ``columns_of``.
      rule: FLOPs of ``N`` parameters on ``D`` tokens; ``None`` for ``6 N D``.
      budgets: those wanted; runs of none of them are left out. ``None``: runs are one slice as long
        as no gap in compute is wider than the tolerance.
      tolerance: in nats of compute.

    Raises:
      ValueError: if a column is missing or not positive, a stated ``C`` is not what the rule gives,
        or a budget has no runs.
    """
    columns = columns_of(runs)
    n, loss = column(columns, "N"), column(columns, "loss")
    flops_of = rule or (lambda n, d: 6.0 * n * d)
    if "D" in columns:
        d = column(columns, "D")
        flops = flops_of(n, d)
    elif rule is None:
        d = column(columns, "C") / (6 * n)
        flops = column(columns, "C")
    else:
        raise ValueError("runs need a column 'D' where a rule gives their FLOPs")
    for name, values in {"N": n, "D": d, "loss": loss, "FLOPs": flops}.items():
        if not (values > 0).all():
            raise ValueError(f"{name} must be positive, got {values.min()}")
    if "C" in columns:
        _check_rule(flops, column(columns, "C"), tolerance)
    labels = _gaps(flops, tolerance) if budgets is None else _nearest(flops, budgets, tolerance)
    found = []
    for label in np.unique(labels[labels >= 0]):
        rows = np.flatnonzero(labels == label)
        rows = rows[np.argsort(n[rows], kind="stable")]
        budget = float(np.exp(np.log(flops[rows]).mean()))
        found.append(Group(budget, n[rows], d[rows], loss[rows]))
    return found


def _check_rule(flops: np.ndarray, stated: np.ndarray, tolerance: float) -> None:
    off = np.abs(np.log(flops / stated))
    if off.max() > tolerance:
        row = int(off.argmax())
        raise ValueError(
            f"column 'C' must agree with the FLOP rule (6 N D unless rule is given), got "
            f"{stated[row]:.4g} and {flops[row]:.4g} in row {row}"
        )


def _gaps(flops: np.ndarray, tolerance: float) -> np.ndarray:
    order = np.argsort(flops, kind="stable")
    labels = np.empty(len(flops), int)
    labels[order] = np.concatenate([[0], np.cumsum(np.diff(np.log(flops[order])) > tolerance)])
    return labels


def _nearest(flops: np.ndarray, budgets: Sequence[float], tolerance: float) -> np.ndarray:
    wanted = np.sort(np.asarray(budgets, np.float64))
    if not wanted.size or not (wanted > 0).all():
        raise ValueError(f"budgets must be positive numbers, got {budgets!r}")
    far = np.abs(np.log(flops)[:, None] - np.log(wanted))
    labels = np.where(far.min(axis=1) <= tolerance, far.argmin(axis=1), -1)
    for i, budget in enumerate(wanted):
        if not (labels == i).any():
            raise ValueError(f"no runs within {tolerance:g} nats of the budget {budget:.4g}")
    return labels


@dataclasses.dataclass(frozen=True)
class Noise:
    r"""Standard deviation of ``ln loss`` between seeds: $s\,(L / L_0)^p$.

    Attributes:
      sd: $s$.
      power: $p$.
      middle: $L_0$, the loss at which it is $s$.
      source: where it is from, in words.
    """

    sd: float
    power: float
    middle: float
    source: str

    def of(self, loss: np.ndarray) -> np.ndarray:
        """Standard deviations of ``ln loss``, in the shape of the losses."""
        return self.sd * (loss / self.middle) ** self.power


def noise_of_repeats(groups: Sequence[Group]) -> Noise | None:
    """From runs of equal size and budget; ``None`` if there are none.

    With five or more such settings its power of the loss is fitted, else it is 0.
    """
    losses, spreads, degrees = [], [], []
    for each in groups:
        for size in np.unique(each.n):
            logs = np.log(each.loss[each.n == size])
            if len(logs) > 1 and logs.std() > 0:
                losses.append(logs.mean())
                spreads.append(logs.var(ddof=1))
                degrees.append(len(logs) - 1)
    if not losses:
        return None
    x, variance, weight = (np.array(values) for values in (losses, spreads, degrees))
    middle, power = float(x.mean()), 0.0
    if len(x) >= _CELLS_FOR_POWER and np.ptp(x) > 0:
        power = float(np.polyfit(x - middle, 0.5 * np.log(variance), 1, w=np.sqrt(weight))[0])
    scaled = variance * np.exp(-2 * power * (x - middle))
    sd = float(np.sqrt(np.average(scaled, weights=weight)))
    return Noise(sd, power, float(np.exp(middle)), f"{len(x)} settings with repeats")


def noise_of_residuals(groups: Sequence[Group]) -> Noise | None:
    """What cubics in ``ln N`` leave of ``ln loss``; ``None`` without a slice of five sizes.

    From the median of their sizes, which a few runs that went wrong do not move.
    """
    left, degrees = [], 0
    for each in groups:
        if len(np.unique(each.n)) > 4:
            x, y = np.log(each.n / each.n[0]), np.log(each.loss)
            left.append(np.abs(y - np.polyval(np.polyfit(x, y, 3), x)))
            degrees += len(x) - 4
    if not degrees:
        return None
    residuals = np.concatenate(left)
    sd = _OF_MEDIAN * float(np.median(residuals)) * np.sqrt(len(residuals) / degrees)
    return Noise(float(sd), 0.0, 1.0, f"residuals of cubics, {degrees} d.o.f.")
