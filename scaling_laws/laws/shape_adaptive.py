r"""When to change a model's shape in training: one law of compute for each shape, and a schedule.

Anagnostidis et al. (2023) fit, for each static shape (patch size, context length, width),

$$\mathrm{err} = a (C + d)^{-b} + c,$$

(the form is unverified) and at every error follow the shape whose inverse $C(\mathrm{err})$ rises
least for the next bit of error, which presumes that a changed model goes on as if it had reached
that error in its new shape.

Trap: beyond the errors that a shape's runs reached, its law is a guess: ``schedule`` takes each
shape's range and refuses to leave it.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxopt_suite.scaling_laws.law import Arrays, Law, coefficient, exponent, floor, power
from jaxopt_suite.scaling_laws.refusals import FitRefused

_PAPER = (
    "Navigating Scaling Laws: Compute Optimality in Adaptive Model Training, arXiv:2311.03233, 2023"
)
_POINTS = 4001


def _predict(p: Arrays, x: Arrays) -> Any:
    return p["a"] * power(x["C"] + p["d"], -p["b"]) + p["c"]


ShapeAdaptive = Law(
    name="shape_adaptive",
    formula="error = a (C + d)^-b + c",
    inputs=("C",),
    parameters=(
        coefficient("a", unit="error", of={"C": "-b"}),
        exponent("b", start=(0.1, 1.0)),
        floor("c", unit="error"),
        coefficient("d", unit="FLOP", start=(1e10, 1e20)),
    ),
    predict=_predict,
    output="error",
    source=f"{_PAPER}; form unverified",
)


def compute_to_reach(values: Mapping[str, float], error: Any) -> np.ndarray:
    """FLOPs at which one shape reaches an error; infinite at and below its floor."""
    return _inverse_power(values, error, 1 / values["b"]) - values["d"]


def price(values: Mapping[str, float], error: Any) -> np.ndarray:
    """FLOPs per unit of error that one shape pays at an error; infinite at and below its floor."""
    slope = values["a"] * values["b"]
    return _inverse_power(values, error, 1 / values["b"] + 1) / slope


def _inverse_power(values: Mapping[str, float], error: Any, exponent: float) -> np.ndarray:
    excess = np.maximum(np.asarray(error, np.float64) - values["c"], 0.0) / values["a"]
    with np.errstate(divide="ignore"):
        return excess**-exponent


@dataclasses.dataclass(frozen=True)
class Stage:
    """One shape's part of a schedule.

    Attributes:
      shape: its name.
      start: error at which it begins.
      end: error at which it ends.
      flops: spent in it.
    """

    shape: str
    start: float
    end: float
    flops: float


def schedule(
    shapes: Mapping[str, Mapping[str, float]],
    fitted: Mapping[str, tuple[float, float]],
    *,
    start: float,
    end: float,
) -> list[Stage]:
    """The cheapest way from one error to a lower one.

    Args:
      shapes: parameters of ``ShapeAdaptive`` by shape.
      fitted: lowest and highest error of each shape's runs.
      start: error to begin at.
      end: error to reach.

    Returns:
      Stages in order; the ``flops`` of all are what it costs.

    Raises:
      ValueError: if errors do not fall, or a shape has no range.
      FitRefused: if at some error no shape has been fitted.
    """
    if not 0 < end < start:
        raise ValueError(f"errors must fall from start to end above 0, got {start} and {end}")
    if set(shapes) != set(fitted):
        raise ValueError(f"fitted must have a range for each of {[*shapes]}, got {[*fitted]}")
    names = list(shapes)
    errors = np.geomspace(start, end, _POINTS)
    middle = np.sqrt(errors[1:] * errors[:-1])
    prices = np.stack([_priced(shapes[name], fitted[name], middle) for name in names])
    if not np.isfinite(prices.min(axis=0)).all():
        beyond = middle[~np.isfinite(prices.min(axis=0))]
        raise FitRefused(f"no shape has runs between errors {beyond.min():g} and {beyond.max():g}")
    best = prices.argmin(axis=0)
    changes = [0, *(np.flatnonzero(np.diff(best)) + 1), len(best)]
    stages = []
    for first, last in itertools.pairwise(changes):
        name, high, low = names[best[first]], float(errors[first]), float(errors[last])
        spent = compute_to_reach(shapes[name], low) - compute_to_reach(shapes[name], high)
        stages.append(Stage(name, high, low, float(spent)))
    return stages


def _priced(values: Mapping[str, float], fitted: tuple[float, float], errors: Any) -> np.ndarray:
    low, high = fitted
    inside = (errors >= low) & (errors <= high) & (errors > values["c"])
    return np.where(inside, price(values, errors), np.inf)
