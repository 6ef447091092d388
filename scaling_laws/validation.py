"""How far off a law is on runs it was not fitted to.

Every training set is one vector of row weights, zero for the runs held out, so that all fits of a
validation are one batch from the same starts.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxopt_suite.scaling_laws import coordinates
from jaxopt_suite.scaling_laws.batch import Batch
from jaxopt_suite.scaling_laws.double import in_double
from jaxopt_suite.scaling_laws.refusals import TooFewRuns


@dataclasses.dataclass(frozen=True)
class Holdout:
    """One split: a fit of some runs, and its error on the others.

    Attributes:
      label: what was held out.
      trained: number of runs fitted.
      held_out: number of runs predicted.
      parameters: of the fit.
      relative_error: ``|prediction / observation - 1|`` of each run held out, ``[held_out]``.
      solved: whether the fit's gradient is zero.
    """

    label: str
    trained: int
    held_out: int
    parameters: Mapping[str, float]
    relative_error: np.ndarray
    solved: bool

    @property
    def mean(self) -> float:
        """Mean absolute relative error."""
        return float(self.relative_error.mean())

    @property
    def worst(self) -> float:
        """Largest absolute relative error."""
        return float(self.relative_error.max())

    def __str__(self) -> str:
        return (
            f"{self.label}: {self.trained} fitted, {self.held_out} held out, relative error "
            f"mean {self.mean:.3%}, worst {self.worst:.3%}"
            + ("" if self.solved else ", NOT SOLVED")
        )


@in_double
def holdouts(
    batch: Batch,
    starts: np.ndarray,
    masks: Mapping[str, np.ndarray],
) -> list[Holdout]:
    """Fits without the runs of each mask, and predicts them.

    Args:
      batch: runs and objective.
      starts: solver vectors ``[starts, p]`` that every fit begins from.
      masks: by label, ``bool [n]``: the runs held out.

    Raises:
      TooFewRuns: if a split leaves fewer runs than parameters plus two, or holds none out.
    """
    free, weights = int((batch.low < batch.high).sum()), batch.weights
    for label, mask in masks.items():
        left = int(np.count_nonzero(weights * ~mask))
        if left < free + 2 or not mask.any():
            raise TooFewRuns(
                f"{label}: needs at least {free + 2} runs to fit and 1 to predict, "
                f"got {left} and {int(mask.sum())}"
            )
    kept = np.stack([weights * ~mask for mask in masks.values()])
    count = len(starts)
    problem = batch.problems(count * len(kept), weights=np.repeat(kept, count, axis=0))
    found = batch.solve(np.tile(starts, (len(kept), 1)), problem, stages=batch.stages)
    best = found.value.reshape(len(kept), count).argmin(axis=1) + count * np.arange(len(kept))
    return [
        _split(batch, label, mask, found.theta[i], bool(found.solved[i]))
        for i, (label, mask) in zip(best, masks.items(), strict=True)
    ]


def _split(batch: Batch, label: str, mask: np.ndarray, theta: np.ndarray, solved: bool) -> Holdout:
    values = coordinates.from_theta(batch.law, theta)
    predicted = np.asarray(batch.law.predict(values, batch.rows.inputs))
    error = np.abs(predicted / batch.rows.observed - 1)
    return Holdout(
        label=label,
        trained=int(np.count_nonzero(batch.weights * ~mask)),
        held_out=int(mask.sum()),
        parameters={name: float(value) for name, value in values.items()},
        relative_error=error[mask],
        solved=solved,
    )


def largest(values: np.ndarray, name: str, share: float) -> dict[str, np.ndarray]:
    """One mask: the runs with the largest values, at least a ``share`` of all, ties together."""
    cut = np.sort(values)[::-1][max(int(np.ceil(share * len(values))), 1) - 1]
    return {f"largest {name}, from {cut:.3g}": values >= cut}


def rolling(values: np.ndarray, name: str, cuts: Sequence[float]) -> dict[str, np.ndarray]:
    """For each cut a mask of the runs from there on: fits of growing runs, as a study grows."""
    return {f"{name} from {cut:.3g}": values >= cut for cut in cuts}


def leave_one_out(values: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """For each different value a mask of the runs that have it."""
    return {f"{name} {value:.6g}": values == value for value in np.unique(values)}
