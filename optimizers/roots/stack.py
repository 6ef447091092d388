"""A stack of matrices made ready for a solver: clean and of one scale; and the way back."""

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

    matrices: jax.Array  # [k, b, b]: symmetric and scaled; zero in the padding
    inside: jax.Array  # bool [k, b]: rows that are not padding
    exponent: jax.Array  # int32 [k]: the matrix was divided by 2**exponent
    finite: jax.Array  # bool [k]: whether the matrix was; one that was not is zeros here
    damping: Damping  # of the matrices before they were scaled

    def ridge(self, largest: jax.Array) -> jax.Array:
        """What is to be added to the scaled diagonal ``[k]``, given the largest eigenvalues."""
        if isinstance(self.damping, PseudoInverse):
            return jnp.zeros_like(largest)
        epsilon = jnp.asarray(self.damping.epsilon, largest.dtype)
        if isinstance(self.damping, Absolute):
            return self._scaled(epsilon)
        if self.damping.estimate == "norm":
            largest = estimates.largest_row_sum(self.matrices)
        least = self._scaled(jnp.asarray(LEAST_SCALE, largest.dtype))
        return epsilon * jnp.maximum(largest, least)

    def cutoff(self, largest: jax.Array) -> jax.Array | None:
        """Up to where a pseudo-inverse takes eigenvalues for zero, scaled ``[k]``."""
        if not isinstance(self.damping, PseudoInverse):
            return None
        dtype = largest.dtype
        if self.damping.rtol is None:
            rtol = jnp.sum(self.inside, axis=1).astype(dtype) * jnp.finfo(dtype).eps
        else:
            rtol = jnp.asarray(self.damping.rtol, dtype)
        return jnp.maximum(rtol * largest, self._scaled(jnp.asarray(self.damping.atol, dtype)))

    def _scaled(self, number: jax.Array) -> jax.Array:
        return times_power_of_two(jnp.broadcast_to(number, self.exponent.shape), -self.exponent)


class Damped(NamedTuple):
    """A stack for solvers that do not see eigenvalues."""

    matrices: jax.Array  # [k, b, b]: scaled and damped; zero in the padding
    inside: jax.Array  # bool [k, b]
    largest: jax.Array  # [k]: power iteration's estimate, scaled, before damping
    ridge: jax.Array  # [k]: what was added to the diagonal, scaled


def make_stack(
    matrices: jax.Array, damping: Damping, sizes: jax.Array | None, symmetrize_input: bool
) -> Stack:
    """Checks, cleans and scales.

    Args:
      matrices: ``[k, b, b]``.
      damping: what a solver is to add.
      sizes: int32 ``[k]``, from 0 to b: of each matrix only the leading block of this size is
        read. ``None``: all of it.
      symmetrize_input: whether to take the symmetric part.
    """
    inside = inside_of(matrices, sizes)
    least = damping.epsilon if isinstance(damping, Absolute) else 0.0
    scaled, exponent, finite = cleaned(matrices, inside, jnp.maximum(least, LEAST_SCALE))
    on_cpu = symmetric_part if symmetrize_input else lambda x: x
    # Elsewhere the transpose costs nothing, and keeps TPUs from turning the whole stack around.
    scaled = jax.lax.platform_dependent(scaled, cpu=on_cpu, default=symmetric_part)
    return Stack(scaled, inside, exponent, finite, damping)


def damped(stack: Stack) -> Damped:
    """With what is to be added to the diagonal, as power iteration finds it."""
    largest = estimates.power_iteration(stack.matrices, stack.inside)
    ridge = stack.ridge(largest)
    matrices = add_to_diagonal(stack.matrices, ridge[:, None] * stack.inside)
    return Damped(matrices, stack.inside, largest, ridge)


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


def cleaned(
    matrices: jax.Array, inside: jax.Array, least: jax.typing.ArrayLike = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Float32 at least, of one scale; zero in the padding and where not finite.

    Args:
      matrices: ``[k, b, b]``.
      inside: bool ``[k, b]``.
      least: the largest entry counts as at least this.

    Returns:
      The matrices ``[k, b, b]``, divided by a power of two that brings their entries below one; its
      exponent, int32 ``[k]``; and which were finite, bool ``[k]``.
    """
    matrices = jnp.asarray(matrices)
    wide = matrices.astype(jnp.promote_types(matrices.dtype, jnp.float32))
    masked = without_padding(wide, inside)
    finite = jnp.all(jnp.isfinite(masked), axis=(1, 2))
    clean = jnp.where(finite[:, None, None], masked, 0)
    entry = jnp.max(jnp.abs(clean), axis=(1, 2))
    exponent = exponent_above(jnp.maximum(entry, jnp.asarray(least, entry.dtype)))
    return times_power_of_two(clean, -exponent), exponent, finite


def exponent_above(x: jax.Array) -> jax.Array:
    """The least e with ``x < 2**e``, int32, of numbers that are not negative.

    Read from the bits, as powers of two are written: in whatever is computed from it, XLA repeats
    that for every matrix that it hands to LAPACK, and ``frexp`` and ``ldexp`` are 60 operations.
    Of zero and of subnormal numbers it is the exponent of the least normal one.
    """
    limits = jnp.finfo(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, f"int{limits.bits}")
    return (bits >> limits.nmant).astype(jnp.int32) - (limits.maxexp - 2)


def times_power_of_two(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """``x [k, ...]`` times ``2**exponent [k]``: exact, and as fast as a multiplication.

    In two halves, as the power itself may leave the range of the dtype where the result does not.
    """
    limits = jnp.finfo(x.dtype)
    half = exponent >> 1
    for part in (half, exponent - half):
        biased = jnp.clip(part + (limits.maxexp - 1), 0, 2 * limits.maxexp - 1)
        bits = biased.astype(f"int{limits.bits}") << limits.nmant
        power = jax.lax.bitcast_convert_type(bits, x.dtype)
        x = x * power.reshape(-1, *[1] * (x.ndim - 1))
    return x


def add_to_diagonal(matrices: jax.Array, values: jax.Array) -> jax.Array:
    """Adds ``values [k, b]``."""
    return matrices + jnp.eye(values.shape[1], dtype=matrices.dtype)[None] * values[:, None, :]


def fill_padding(matrices: jax.Array, inside: jax.Array, value: jax.Array) -> jax.Array:
    """Puts ``value [k]`` on the padding's diagonal, where an iteration has its fixed point."""
    diagonal = np.eye(inside.shape[1], dtype=bool)[None]
    return jnp.where(diagonal & ~inside[:, :, None], value[:, None, None], matrices)


def without_padding(matrices: jax.Array, inside: jax.Array) -> jax.Array:
    """Zeros in the padding."""
    return jnp.where(inside[:, :, None] & inside[:, None, :], matrices, 0)


def unscaled(roots: jax.Array, exponent: jax.Array, order: Fraction) -> jax.Array:
    """Roots of the matrices as they were: times ``2**(-exponent / order)``, to one rounding."""
    quotient, rest = jnp.divmod(-exponent * order.denominator, order.numerator)
    table = 2.0 ** (np.arange(order.numerator) / order.numerator)
    factor = jnp.asarray(table, roots.dtype)[rest]
    return times_power_of_two(roots * factor[:, None, None], quotient)
