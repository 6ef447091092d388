r"""Filtered pools of data that lose their use when repeated (Goyal et al., 2024).

The error after $n$ samples of a pool, with $n_j$ the samples seen by the end of pass $j$ (the last
one may be partial):

$$\ln(y - d) = b \ln(a n_1) + \sum_{j \ge 2} b\, 2^{-(j-1)/\tau} \ln(n_j / n_{j-1}),$$

$n$ in units of ``UNIT`` samples, $b < 0$ the use of the pool, $\tau$ its half-life in passes, $d$
the irreducible error. A mixture of $p$ equal pools has the half-lives $p \tau_i$, and at every pass
the mean of the pools' exponents.

``DataFilteringAsReleased`` is the recursion of the released code, which adds $d$ before the factors
of later passes and so scales it too; it is here to read the code's values, not to fit with.

Traps: $a$, $b$ and $d$ are strongly correlated over the five points that a pool usually has: share
$a$ and $d$ between pools with ``pools_law``, or hold them. The released search stops after a tenth
of its shuffled grid, so that its values are partly chance. More than ``MOST_PASSES`` passes give
NaN.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_suite import core
from jaxopt_suite.scaling_laws.double import in_double
from jaxopt_suite.scaling_laws.law import Arrays, Law, Parameter, coefficient, exponent, floor

_PAPER = (
    "Scaling Laws for Data Filtering: Data Curation cannot be Compute Agnostic, arXiv:2404.07177, "
    "2024"
)
UNIT = 1e5  # samples
MOST_PASSES = 64

Decay = Any  # a function of the pass, from 1, that gives its exponent


def _log_first(samples: Any, pool: Any, a: Any) -> Any:
    return jnp.log(a * jnp.minimum(samples, pool) / UNIT)


def _log_later(samples: Any, pool: Any, exponent_at: Decay) -> Any:
    """The sum over passes from the second on; NaN beyond ``MOST_PASSES``."""

    def term(j: Any) -> Any:
        seen = lambda passes: jnp.minimum(samples, passes * pool)
        return exponent_at(j) * (jnp.log(seen(j)) - jnp.log(seen(j - 1)))

    total = jnp.sum(jax.vmap(term)(jnp.arange(2, MOST_PASSES + 1) * 1.0), axis=0)
    return jnp.where(samples > MOST_PASSES * pool, jnp.nan, total)


def _halving(b: Any, tau: Any) -> Decay:
    return lambda j: b * jnp.exp2(-(j - 1) / tau)


def _error(p: Arrays, x: Arrays, exponent_at: Decay, released: bool) -> Any:
    samples, pool = x["samples"], x["pool"]
    first = exponent_at(1.0) * _log_first(samples, pool, p["a"])
    later = _log_later(samples, pool, exponent_at)
    if released:
        return (p["d"] + jnp.exp(first)) * jnp.exp(later)
    return p["d"] + jnp.exp(first + later)


def _predict(p: Arrays, x: Arrays) -> Any:
    return _error(p, x, _halving(p["b"], p["tau"]), released=False)


def _predict_released(p: Arrays, x: Arrays) -> Any:
    return _error(p, x, _halving(p["b"], p["tau"]), released=True)


def _use(name: str) -> Parameter:
    return exponent(name, start=(-0.5, -0.01), bounds=(-10.0, 0.0))


def _half_life(name: str) -> Parameter:
    return coefficient(name, unit="passes", start=(1.0, 12.0))


_SCALE = coefficient("a", unit="per 1e5 samples", start=(0.005, 0.1))
_FLOOR = floor("d", unit="error")
_FORM = "error = d + (a n_1)^b prod_(j>1) (n_j / n_(j-1))^(b 2^(-(j-1)/tau)), n in 1e5 samples"

DataFiltering = Law(
    name="data_filtering",
    formula=_FORM,
    inputs=("samples", "pool"),
    parameters=(_SCALE, _use("b"), _FLOOR, _half_life("tau")),
    predict=_predict,
    output="error",
    source=_PAPER,
)

DataFilteringAsReleased = Law(
    name="data_filtering_as_released",
    formula="error = [d + (a n_1)^b] prod_(j>1) (n_j / n_(j-1))^(b 2^(-(j-1)/tau)), "
    "n in 1e5 samples",
    inputs=("samples", "pool"),
    parameters=(_SCALE, _use("b"), _FLOOR, _half_life("tau")),
    predict=_predict_released,
    output="error",
    source=f"{_PAPER}; its code",
)


def pools_law(count: int) -> Law:
    """The law of several pools that share ``a`` and ``d``.

    Args:
      count: of pools. The column ``pool_index`` says which pool a run drew from, from 0; the
        parameters are ``a``, ``d``, ``b_0`` to ``b_{count-1}`` and ``tau_0`` likewise.
    """
    core.check_int("count", count, low=2)

    def own(p: Arrays, x: Arrays, name: str) -> Any:
        value = p[f"{name}_0"]
        for i in range(1, count):
            value = jnp.where(x["pool_index"] == i, p[f"{name}_{i}"], value)
        return value

    def predict(p: Arrays, x: Arrays) -> Any:
        return _error(p, x, _halving(own(p, x, "b"), own(p, x, "tau")), released=False)

    return Law(
        name=f"data_filtering_{count}_pools",
        formula=f"{_FORM}; b and tau of each of {count} pools",
        inputs=("samples", "pool", "pool_index"),
        parameters=(
            _SCALE,
            _FLOOR,
            *(_use(f"b_{i}") for i in range(count)),
            *(_half_life(f"tau_{i}") for i in range(count)),
        ),
        predict=predict,
        output="error",
        source=_PAPER,
    )


@in_double
def mixture_error(
    pools: Sequence[Mapping[str, float]], samples: Any, pool: float, *, a: float, d: float
) -> np.ndarray:
    """Error predicted for training on a mixture of equal pools.

    Args:
      pools: ``b`` and ``tau`` of each.
      samples: seen in training, ``[...]``.
      pool: samples in one of the pools; the mixture has as many times more as there are pools.
      a: shared by the pools.
      d: shared by the pools.

    Raises:
      ValueError: for no pools, or numbers of samples that are not positive.
    """
    samples = np.asarray(samples, np.float64)
    if not pools:
        raise ValueError("a mixture needs at least one pool, got none")
    if not (pool > 0 and (samples > 0).all()):
        raise ValueError(f"samples and pool must be positive, got {samples} and {pool}")
    count = len(pools)
    each = [_halving(one["b"], count * one["tau"]) for one in pools]
    mean = lambda j: sum(exponent_at(j) for exponent_at in each) / count
    inputs = {"samples": samples, "pool": np.full_like(samples, count * pool)}
    return np.asarray(_error({"a": a, "d": d}, inputs, mean, released=False))
