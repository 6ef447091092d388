"""Products of stacks of square matrices, and how far a root is from one.

Every product asks for ``Precision.HIGHEST``. On a TPU the default multiplies float32 in one pass
of bfloat16, on recent GPUs in TF32: 8 and 11 bits, with which no root of a matrix of condition 1e3
comes out. HIGHEST takes six bfloat16 passes on a TPU, that is six times the time of a default
product, and full float32 arithmetic on a GPU. On a CPU there is no difference.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Multiply = Callable[[jax.Array, jax.Array], jax.Array]  # of two stacks [k, b, b]


def product(*factors: jax.Array) -> jax.Array:
    """Their product from left to right, ``[k, b, b]``, in full precision."""
    multiply = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return functools.reduce(multiply, factors)


def power(x: jax.Array, n: int, multiply: Multiply = product) -> jax.Array:
    """``x**n`` for ``n >= 1``, by repeated squaring."""
    if n == 1:
        return x
    half = power(multiply(x, x), n // 2, multiply)
    return multiply(half, x) if n % 2 else half


def identity_like(x: jax.Array) -> jax.Array:
    """The identity ``[b, b]`` in the dtype of a stack ``[k, b, b]``, to be broadcast by hand."""
    return jnp.eye(x.shape[-1], dtype=x.dtype)[None]


def symmetric_part(x: jax.Array) -> jax.Array:
    """``(x + x^T) / 2``, which does not overflow where x does not."""
    return 0.5 * x + 0.5 * jnp.swapaxes(x, -1, -2)


def frobenius(x: jax.Array) -> jax.Array:
    """Frobenius norms ``[k]``: never below the largest eigenvalue."""
    return jnp.sqrt(jnp.sum(x * x, axis=(1, 2)))


def distance_to_identity(x: jax.Array) -> jax.Array:
    """``max_ij |x - I|`` for each matrix, ``[k]``."""
    return jnp.max(jnp.abs(x - identity_like(x)), axis=(1, 2))


def residual(
    root: jax.Array, matrices: jax.Array, inside: jax.Array, p: int, q: int = 1
) -> jax.Array:
    """``max_ij |X^p A^q - I|`` of each matrix ``[k]``, where X is meant to be ``A^(-q/p)``.

    It has no unit. A is taken between two halves of X^p, whose entries are smaller by the root of
    the condition number than those of X^p itself.

    Args:
      root: X ``[k, b, b]``.
      matrices: A ``[k, b, b]``, zero in the padding.
      inside: bool ``[k, b]``, which rows are not padding.
      p: at least 1.
      q: at least 1.
    """
    found = product(power(matrices, q), power(root, p - p // 2))
    if p > 1:
        found = product(power(root, p // 2), found)
    identity = identity_like(found) * inside[:, None, :].astype(found.dtype)
    both = inside[:, :, None] & inside[:, None, :]
    return jnp.max(jnp.abs(jnp.where(both, found - identity, 0)), axis=(1, 2))
