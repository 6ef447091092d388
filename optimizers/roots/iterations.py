"""Iterations over a stack in which every matrix stops when it is done, or when it gets worse."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.optimizers.roots.products import frobenius
from jaxopt_suite.optimizers.roots.stack import Damped

ScaleName = Literal["frobenius", "power"]
SCALES = ("frobenius", "power")
POWER_FACTOR = 2.0  # power iteration gives a lower bound; the factor is DASH's

# After the first step all eigenvalues of a convergent iteration lie in (0, 1], and so no entry is
# further from the identity's than 1, though the largest distance may grow for a while.
_BOUND = 1.01
# Once it is small, Newton squares it in each step: growth by a fifth ends the iteration, as in the
# code of Anil et al., and what is not even halved is rounding.
_SMALL, _GROWTH, _PROGRESS = 1e-3, 1.2, 0.5

Values = tuple[jax.Array, ...]  # each [k, b, b]


class Iterated(NamedTuple):
    """Where an iteration ended."""

    values: Values
    iterations: jax.Array  # int32 [k]


class _Carry(NamedTuple):
    values: Values
    error: jax.Array  # [k]
    running: jax.Array  # bool [k]
    iterations: jax.Array  # int32 [k]


def iterate(
    step: Callable[[Values], Values],
    error_of: Callable[[Values], jax.Array],
    values: Values,
    *,
    max_iterations: int,
    tolerance: float | None,
) -> Iterated:
    """Applies ``step`` until every matrix of the stack is done.

    A matrix is done when its error is at most ``tolerance``; when the error shows divergence, or is
    not finite, and the step is taken back; and when a small error is no longer halved: then it is
    rounding that remains, of which more steps would make more. The loop ends with the last matrix,
    or after ``max_iterations``: it reads one Boolean of the device a turn, and where the stack is
    spread over devices without a ``shard_map`` around, it reduces it over them.

    Args:
      step: one iteration.
      error_of: ``values -> [k]``, reads what ``step`` has computed already.
      values: to begin with.
      max_iterations: at least 0.
      tolerance: ``None``: exactly ``max_iterations`` steps for all, without looking at errors.
    """
    error = error_of(values)
    if tolerance is None:
        values = jax.lax.fori_loop(0, max_iterations, lambda _, x: step(x), values)
        return Iterated(values, _counts(error, max_iterations))

    def turn(carry: _Carry) -> _Carry:
        new = step(carry.values)
        error = error_of(new)
        small = carry.error < _SMALL
        limit = jnp.where(small, _GROWTH * carry.error, _BOUND)
        accept = carry.running & (error <= limit)  # false for NaN
        stalled = (error < _SMALL) & (error > _PROGRESS * carry.error)
        select = lambda a, b: jnp.where(accept[:, None, None], a, b)
        return _Carry(
            values=tuple(map(select, new, carry.values)),
            error=jnp.where(accept, error, carry.error),
            running=accept & (error > tolerance) & ~stalled,
            iterations=carry.iterations + accept,
        )

    def go_on(carry: _Carry) -> jax.Array:
        return jnp.any(carry.running & (carry.iterations < max_iterations))

    start = _Carry(values, error, error > tolerance, _counts(error, 0))
    end = jax.lax.while_loop(go_on, turn, start)
    return Iterated(end.values, end.iterations)


def _counts(like: jax.Array, value: int) -> jax.Array:
    """int32 ``[k]`` that varies over the mesh axes over which the stack does."""
    return core.vary(jnp.full(like.shape, value, jnp.int32), tuple(core.varying_axes(like)))


def spectral_scale(stack: Damped, name: ScaleName) -> jax.Array:
    """What the damped matrices are divided by, ``[k]``, so that their spectrum is at most one.

    ``"frobenius"`` is never below the largest eigenvalue, and above it by the root of the rank at
    most. ``"power"`` is twice the estimate of power iteration, or the Frobenius norm where that is
    less: tighter by a step or two on matrices of many like eigenvalues, and without a guarantee. A
    scale that is too small shows in the residual.
    """
    norm = frobenius(stack.matrices)
    if name == "power":
        norm = jnp.minimum(norm, POWER_FACTOR * (stack.largest + stack.ridge))
    return jnp.maximum(norm, jnp.finfo(norm.dtype).tiny ** 0.5)


def check_iterations(max_iterations: int, tolerance: float | None) -> None:
    """Checks the two arguments that every iteration has."""
    core.check_int("max_iterations", max_iterations)
    if tolerance is not None:
        core.check_number("tolerance", tolerance, low=0.0)
