r"""The best mixture of experts under budgets of compute, memory and inference (arXiv:2502.05172).

Models are the paper's: width $d$, $d/64$ layers and heads, $V$ tokens in the vocabulary,

    active parameters   2 d V + 13 l d^2
    all parameters      2 d V + (4 + 9 E) l d^2
    cache of T tokens   2 T l d values

and a budget of FLOPs $F = 6 N D + 2 N D_{inf}$, with $D_{inf}$ tokens of inference.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxopt_suite import core
from jaxopt_suite.scaling_laws.double import in_double
from jaxopt_suite.scaling_laws.laws.moe import VALUES, JointMoE, reduced
from jaxopt_suite.scaling_laws.refusals import NoInteriorOptimum

VOCABULARY = 50257
HEAD = 64  # width of a head; as many layers as heads
FARTHEST = 400.0  # tokens per active parameter beyond which the authors have no runs
_WIDTHS = (64.0, 131072.0)
_POINTS, _ZOOMS = 129, 8


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A model and its training.

    Attributes:
      experts: of each layer.
      width: of the residual stream, not rounded to a legal one.
      n: active parameters.
      n_total: all parameters.
      d: tokens of training.
      loss: predicted.
      limited: whether memory, not compute, sets the size.
    """

    experts: int
    width: float
    n: float
    n_total: float
    d: float
    loss: float
    limited: bool

    @property
    def extrapolated(self) -> bool:
        """Whether tokens per parameter are beyond the authors' runs."""
        return self.d / self.n > FARTHEST


def sizes(width: Any, experts: Any, vocabulary: int = VOCABULARY) -> tuple[Any, Any]:
    """Active and total parameters of the paper's models."""
    tables, layer = 2 * width * vocabulary, width**3 / HEAD
    return tables + 13 * layer, tables + (4 + 9 * experts) * layer


def optimum(
    flops: Any, experts: Any, values: Mapping[str, float] = VALUES
) -> tuple[np.ndarray, np.ndarray]:
    """Active parameters and tokens that spend ``6 N D = flops`` best; arrays broadcast."""
    m, mu, n, nu = _reduced(values, experts)
    scale = (mu * m / (nu * n)) ** (1 / (mu + nu))
    size = scale * (np.asarray(flops, np.float64) / 6) ** (nu / (mu + nu))
    return size, flops / (6 * size)


def best_mixture(
    flops: float,
    *,
    experts: Sequence[int] = (1, 2, 4, 8, 16, 32),
    memory: float | None = None,
    cache: int = 0,
    inference: float = 0.0,
    bytes_per_value: float = 2.0,
    vocabulary: int = VOCABULARY,
    values: Mapping[str, float] = VALUES,
) -> Mixture:
    """The number of experts, the width and the tokens with the lowest predicted loss.

    Args:
      flops: to spend on training and inference.
      experts: numbers of experts to choose from.
      memory: bytes for all parameters and the cache; ``None``: no limit.
      cache: tokens of the cache of keys and values that memory must hold.
      inference: tokens of inference, at two FLOPs per active parameter.
      bytes_per_value: of parameters and cache.
      vocabulary: tokens in the vocabulary.
      values: parameters of ``JointMoE``.

    Raises:
      ValueError: for a budget that is not positive, or no numbers of experts.
      NoInteriorOptimum: if no model fits, or the best is at an edge of the widths searched.
    """
    core.check_number("flops", flops, low=0.0, low_open=True)
    core.check_number("cache", cache, low=0.0)
    core.check_number("inference", inference, low=0.0)
    core.check_number("bytes_per_value", bytes_per_value, low=0.0, low_open=True)
    if memory is not None:
        core.check_number("memory", memory, low=0.0, low_open=True)
    if not experts or min(experts) < 1:
        raise ValueError(f"experts must be numbers of at least 1, got {experts!r}")

    def search(count: int) -> Mixture | None:
        limit = _widest(memory, count, cache, bytes_per_value, vocabulary)
        spend = lambda width: _spend(width, count, flops, inference, vocabulary, values)
        return _best_width(count, spend, limit, vocabulary)

    found = [mixture for mixture in map(search, experts) if mixture is not None]
    if not found:
        raise NoInteriorOptimum(f"no model of {experts!r} experts fits in {memory:g} bytes")
    return min(found, key=lambda mixture: mixture.loss)


@in_double
def _reduced(values: Mapping[str, float], experts: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(v) for v in reduced(values, np.asarray(experts, np.float64)))


@in_double
def _spend(
    width: np.ndarray,
    experts: int,
    flops: float,
    inference: float,
    vocabulary: int,
    values: Mapping[str, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that the budget leaves for each width, and the loss; infinite where none are left."""
    n, _ = sizes(width, experts, vocabulary)
    d = (flops - 2 * n * inference) / (6 * n)
    inputs = {"N": n, "D": np.maximum(d, 1.0), "experts": np.full_like(n, experts)}
    return d, np.where(d > 1, np.asarray(JointMoE.predict(values, inputs)), np.inf)


def _widest(
    memory: float | None, experts: int, cache: int, bytes_per_value: float, vocabulary: int
) -> float:
    """The width at which parameters and cache fill the memory."""
    if memory is None:
        return np.inf
    low, high = 0.0, _WIDTHS[1]
    for _ in range(80):
        middle = 0.5 * (low + high)
        held = sizes(middle, experts, vocabulary)[1] + 2 * cache * middle**2 / HEAD
        low, high = (low, middle) if held * bytes_per_value > memory else (middle, high)
    return low


def _best_width(experts: int, spend: Any, limit: float, vocabulary: int) -> Mixture | None:
    low, high = _WIDTHS[0], min(limit, _WIDTHS[1])
    if high <= low:
        return None
    for zoom in range(_ZOOMS):
        width = np.geomspace(low, high, _POINTS)
        _, loss = spend(width)
        at = int(np.argmin(loss))
        if zoom == 0 and (at == 0 or (at == _POINTS - 1 and limit > high)):
            raise NoInteriorOptimum(f"the best width is at the edge of {_WIDTHS}: {width[at]:g}")
        low, high = width[max(at - 1, 0)], width[min(at + 1, _POINTS - 1)]
    best = width[at : at + 1]
    tokens, loss = spend(best)
    active, total = sizes(float(best[0]), experts, vocabulary)
    return Mixture(
        experts=experts,
        width=float(best[0]),
        n=active,
        n_total=total,
        d=float(tokens[0]),
        loss=float(loss[0]),
        limited=bool(best[0] > limit * (1 - 1e-6)),
    )
