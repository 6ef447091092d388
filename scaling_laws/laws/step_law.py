r"""The best learning rate and batch for a size and an amount of data (Li et al., 2025).

$$lr = c\, N^p D^q, \qquad B = d\, D^r,$$

$N$ the parameters of the body, $D$ tokens, $lr$ the peak rate, $B$ tokens per step.

Traps:

- The released runs do not reproduce the constants: refitted with the authors' rule, 129 rows within
  0.25 % of their cell's best give 77.7, -0.766, 0.197 and 0.209, 0.613. The constants do lose only
  0.13 % on average in those runs (``excess_loss``).
- Released batches are in sequences of 2048 tokens.
- For mixtures of experts total parameters of the body predict better than active ones.
- Cells of flat optima bring more rows: resample cells, not rows.

Both laws are lines in logarithms: fit them with ``squares()``.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxopt_suite.scaling_laws.law import Arrays, Law, Preset, coefficient, exponent, power
from jaxopt_suite.scaling_laws.refusals import NoInteriorOptimum

_PAPER = (
    "Predictable Scale: Part I, Step Law - Optimal Hyperparameter Scaling Law in Large Language "
    "Model Pretraining, arXiv:2503.04715, 2025"
)
_PORIAN = "Resolving Discrepancies in Compute-Optimal Scaling of Language Models, arXiv:2406.19146"
_STORED = f"{_PAPER}; mean of the 1,000 stored fits, constants geometric"


def _signed(name: str, start: tuple[float, float]) -> Any:
    return exponent(name, start=start, bounds=(-10.0, 10.0))


def _rate(p: Arrays, x: Arrays) -> Any:
    return p["c"] * power(x["N"], p["p"]) * power(x["D"], p["q"])


StepLawRate = Law(
    name="step_law_rate",
    formula="lr = c N^p D^q",
    inputs=("N", "D"),
    parameters=(
        coefficient("c", unit="learning rate", of={"N": "p", "D": "q"}),
        _signed("p", (-1.0, 0.0)),
        _signed("q", (0.0, 1.0)),
    ),
    predict=_rate,
    output="lr",
    source=_PAPER,
    presets={
        "step_law": Preset({"c": 1.79, "p": -0.713, "q": 0.307}, f"{_PAPER}; as printed"),
        "step_law_stored": Preset({"c": 1.797, "p": -0.7129, "q": 0.3075}, _STORED),
        "porian": Preset(
            {"c": 3.7, "p": -0.36, "q": 0.0}, f"{_PORIAN}, 2024; N with the output head"
        ),
    },
)


def _batch(p: Arrays, x: Arrays) -> Any:
    return p["d"] * power(x["D"], p["r"])


StepLawBatch = Law(
    name="step_law_batch",
    formula="batch_tokens = d D^r",
    inputs=("D",),
    parameters=(coefficient("d", unit="tokens", of={"D": "r"}), _signed("r", (0.0, 1.0))),
    predict=_batch,
    output="batch_tokens",
    source=_PAPER,
    presets={
        "step_law": Preset({"d": 0.58, "r": 0.571}, f"{_PAPER}; as printed"),
        "step_law_stored": Preset({"d": 0.5807, "r": 0.5709}, _STORED),
    },
)

RATE = StepLawRate.presets["step_law"].values
BATCH = StepLawBatch.presets["step_law"].values


def settings(
    n: Any, d: Any, *, rate: Mapping[str, float] = RATE, batch: Mapping[str, float] = BATCH
) -> tuple[np.ndarray, np.ndarray]:
    """Peak learning rate and batch in tokens for ``n`` body parameters and ``d`` tokens."""
    n, d = np.asarray(n, np.float64), np.asarray(d, np.float64)
    return rate["c"] * n ** rate["p"] * d ** rate["q"], batch["d"] * d ** batch["r"]


def near_best(losses: Any, cells: Any, share: float = 0.0025) -> np.ndarray:
    """Which runs are within a share of the best of their cell, ``bool [n]``.

    Args:
      losses: ``[n]``.
      cells: labels of the runs' size and data, ``[n]``.
      share: relative loss above the best of the cell.
    """
    losses = np.asarray(losses, np.float64)
    _, index = np.unique(cells, return_inverse=True)
    best = np.full(index.max() + 1, math.inf)
    np.minimum.at(best, index, losses)
    return losses <= best[index] * (1 + share)


def excess_loss(rates: Any, batches: Any, losses: Any, at: tuple[float, float]) -> float:
    """How much more loss a setting has than the best of one cell's grid, relatively.

    The loss at the setting is interpolated, linearly in the logarithms of both, between the four
    runs of the grid around it; where one of these is missing, on the plane through the others.

    Args:
      rates: learning rates of the runs of one size and amount of data, ``[n]``.
      batches: their batches, ``[n]``.
      losses: their losses, ``[n]``; of repeated settings the lowest counts.
      at: learning rate and batch to judge, in the same units.

    Raises:
      ValueError: if the shapes differ.
      NoInteriorOptimum: if the setting is outside the grid, or two runs around it are missing.
    """
    table = np.stack([np.asarray(v, np.float64) for v in (rates, batches, losses)])
    if table.ndim != 2:
        raise ValueError(f"rates, batches and losses must be [n], got {table.shape[1:]}")
    ends, shares = zip(
        *(_around(np.unique(axis), value) for axis, value in zip(table[:2], at, strict=True)),
        strict=True,
    )
    corners = np.array([[_lowest(table, rate, batch) for batch in ends[1]] for rate in ends[0]])
    missing = np.isnan(corners)
    if missing.sum() > 1:
        raise NoInteriorOptimum(f"fewer than three runs around {at[0]:g} and {at[1]:g}")
    if missing.any():
        corners[missing] = (corners[::-1] + corners[:, ::-1] - corners[::-1, ::-1])[missing]
    first, second = (np.array([1 - share, share]) for share in shares)
    return float(first @ corners @ second / table[2].min() - 1)


def _lowest(table: np.ndarray, rate: float, batch: float) -> float:
    here = table[2][(table[0] == rate) & (table[1] == batch)]
    return float(here.min()) if here.size else math.nan


def _around(grid: np.ndarray, value: float) -> tuple[tuple[float, float], float]:
    """The two neighbours of a value, and its place between them, in logarithms."""
    if len(grid) < 2 or not grid[0] <= value <= grid[-1]:
        raise NoInteriorOptimum(f"{value:g} is outside the grid, {grid[0]:g} to {grid[-1]:g}")
    above = max(int(np.searchsorted(grid, value)), 1)
    low, high = float(grid[above - 1]), float(grid[above])
    return (low, high), math.log(value / low) / math.log(high / low)
