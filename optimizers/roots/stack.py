"""A stack of matrices made ready for a solver: clean, of one scale, damped; and the way back."""

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_suite import core
from jaxopt_suite.optimizers.roots import estimates
from jaxopt_suite.optimizers.roots.damping import LEAST_SCALE, Absolute, Damping, PseudoInverse
from jaxopt_suite.optimizers.roots.products import symmetric_part


class Stack(NamedTuple):
    """What a solver gets; every array float32 or float64.

    Each matrix was divided by a power of two that brings its entries below one, so that neither
    squares of 1e30 nor those of 1e-30 leave the range of float32 on the way.
    """

    matrices: jax.Array  # [k, b, b]: symmetric, scaled and damped; zero in the padding
    inside: jax.Array  # bool [k, b]: rows that are not padding
    exponent: jax.Array  # int32 [k]: the matrix was divided by 2**exponent
    largest: jax.Array  # [k]: power iteration's estimate, scaled, before damping
    ridge: jax.Array  # [k]: what was added to the diagonal, scaled
    cutoff: jax.Array | None  # [k]: of a pseudo-inverse, scaled
    finite: jax.Array  # bool [k]: whether the matrix was; one that was not is zeros here


def make_stack(matrices: jax.Array, damping: Damping, sizes: jax.Array | None) -> Stack:
    """Checks, cleans, scales and damps.

    Args:
      matrices: ``[k, b, b]``; the symmetric part counts.
      damping: what to add.
      sizes: int32 ``[k]``, from 0 to b: of each matrix only the leading block of this size is
        read. ``None``: all of it.
    """
    inside = inside_of(matrices, sizes)
    clean, finite = cleaned(matrices, inside)
    least = damping.epsilon if isinstance(damping, Absolute) else 0.0
    least = jnp.maximum(jnp.asarray(least, clean.dtype), LEAST_SCALE)
    entry = jnp.max(jnp.abs(clean), axis=(1, 2))
    _, exponent = jnp.frexp(jnp.maximum(entry, least))
    scaled = jnp.ldexp(clean, -exponent[:, None, None])
    largest = estimates.power_iteration(scaled, inside)
    ridge = _ridge(damping, scaled, largest, exponent)
    diagonal = ridge[:, None] * inside
    return Stack(
        matrices=add_to_diagonal(scaled, diagonal),
        inside=inside,
        exponent=exponent,
        largest=largest,
        ridge=ridge,
        cutoff=_cutoff(damping, inside, largest, exponent),
        finite=finite,
    )


def inside_of(matrices: jax.Array, sizes: jax.Array | None) -> jax.Array:
    """Which rows are not padding, bool ``[k, b]``; checks both arguments."""
    shape = jnp.shape(matrices)
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] == 0:
        raise ValueError(f"matrices must be a stack [k, b, b] with b at least 1, got shape {shape}")
    core.check_real_floating(matrices, "a root solver")
    if sizes is None:
        return jnp.ones(shape[:2], bool)
    if jnp.shape(sizes) != shape[:1] or not jnp.issubdtype(jnp.result_type(sizes), jnp.integer):
        raise ValueError(
            f"sizes must be {shape[0]} integers, one for each matrix, "
            f"got {jnp.result_type(sizes)} of shape {jnp.shape(sizes)}"
        )
    if not isinstance(sizes, jax.core.Tracer):
        _check_range(np.asarray(sizes), shape[1])
    return jnp.arange(shape[1])[None] < jnp.asarray(sizes)[:, None]


def _check_range(sizes: np.ndarray, b: int) -> None:
    wrong = sizes[(sizes < 0) | (sizes > b)]
    if wrong.size:
        raise ValueError(f"sizes must be from 0 to {b}, the size of the blocks, got {wrong[0]}")


def cleaned(matrices: jax.Array, inside: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Symmetric, at least float32, zero in the padding and where a matrix is not finite.

    Returns:
      The matrices ``[k, b, b]``, and which were finite, bool ``[k]``.
    """
    matrices = jnp.asarray(matrices)
    wide = matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))
    masked = jnp.where(inside[:, :, None] & inside[:, None, :], wide, 0)
    finite = jnp.all(jnp.isfinite(masked), axis=(1, 2))
    return symmetric_part(jnp.where(finite[:, None, None], masked, 0)), finite


def add_to_diagonal(matrices: jax.Array, values: jax.Array) -> jax.Array:
    """Adds ``values [k, b]``."""
    return matrices + jnp.eye(values.shape[1], dtype=matrices.dtype)[None] * values[:, None, :]


def fill_padding(matrices: jax.Array, inside: jax.Array, value: jax.Array) -> jax.Array:
    """Puts ``value [k]`` on the padding's diagonal, where an iteration has its fixed point."""
    return add_to_diagonal(matrices, jnp.where(inside, 0, value[:, None]))


def without_padding(matrices: jax.Array, inside: jax.Array) -> jax.Array:
    """Zeros in the padding."""
    return jnp.where(inside[:, :, None] & inside[:, None, :], matrices, 0)


def _ridge(
    damping: Damping, scaled: jax.Array, largest: jax.Array, exponent: jax.Array
) -> jax.Array:
    if isinstance(damping, PseudoInverse):
        return jnp.zeros_like(largest)
    epsilon = jnp.asarray(damping.epsilon, scaled.dtype)
    if isinstance(damping, Absolute):
        return jnp.ldexp(epsilon, -exponent)
    scale = largest if damping.estimate == "power" else estimates.largest_row_sum(scaled)
    least = jnp.ldexp(jnp.asarray(LEAST_SCALE, scaled.dtype), -exponent)
    return epsilon * jnp.maximum(scale, least)


def _cutoff(
    damping: Damping, inside: jax.Array, largest: jax.Array, exponent: jax.Array
) -> jax.Array | None:
    if not isinstance(damping, PseudoInverse):
        return None
    dtype = largest.dtype
    rtol = jnp.asarray(0.0 if damping.rtol is None else damping.rtol, dtype)
    if damping.rtol is None:
        rtol = jnp.sum(inside, axis=1).astype(dtype) * jnp.finfo(dtype).eps
    return jnp.maximum(rtol * largest, jnp.ldexp(jnp.asarray(damping.atol, dtype), -exponent))


def unscaled(roots: jax.Array, exponent: jax.Array, order: Fraction) -> jax.Array:
    """Roots of the matrices as they were: times ``2**(-exponent / order)``, to one rounding."""
    quotient, rest = jnp.divmod(-exponent * order.denominator, order.numerator)
    table = 2.0 ** (np.arange(order.numerator) / order.numerator)
    factor = jnp.asarray(table, roots.dtype)[rest]
    return jnp.ldexp(roots * factor[:, None, None], quotient[:, None, None])
