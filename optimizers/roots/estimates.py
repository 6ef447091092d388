"""Estimates of the largest eigenvalue of positive semidefinite matrices."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_suite.optimizers.roots.products import product

STEPS = 10
VECTORS = 16  # as many as a tile of a matrix unit takes for the price of one


def power_iteration(matrices: jax.Array, inside: jax.Array) -> jax.Array:
    """A lower bound of each largest eigenvalue, usually within some percent of it.

    Power iteration on ``VECTORS`` columns at once (Modoranu et al., "DASH", 2026,
    arXiv:2602.02016). Random columns may miss the leading eigenvector; one column therefore starts
    at the coordinate of the largest diagonal entry, and a Rayleigh quotient never falls under power
    iteration of a semidefinite matrix. So the result lies between the largest diagonal entry, which
    is at least an n-th of the largest eigenvalue, and that eigenvalue, whatever the random columns
    are; only a zero matrix has an estimate of 0.

    Args:
      matrices: ``[k, b, b]``, symmetric, entries of order one at most, zero in the padding.
      inside: bool ``[k, b]``, which rows are not padding.

    Returns:
      ``[k]``.
    """
    dtype, tiny = matrices.dtype, jnp.finfo(matrices.dtype).tiny
    diagonal = jnp.diagonal(matrices, axis1=1, axis2=2)
    first = jax.nn.one_hot(jnp.argmax(diagonal, axis=1), matrices.shape[-1], dtype=dtype)
    others = _random_rows(matrices.shape[-1], dtype)[None] * inside[:, :, None].astype(dtype)
    columns = jnp.concatenate([first[:, :, None], others], axis=2)  # [k, b, VECTORS]

    def step(_: int, columns: jax.Array) -> jax.Array:
        image = product(matrices, columns)
        norms = jnp.sqrt(jnp.sum(image**2, axis=1, keepdims=True))
        return image / jnp.maximum(norms, tiny)

    columns = jax.lax.fori_loop(0, STEPS, step, step(0, columns))
    along = jnp.sum(columns * product(matrices, columns), axis=1)
    quotients = along / jnp.maximum(jnp.sum(columns**2, axis=1), tiny)
    return jnp.maximum(jnp.max(quotients, axis=1), jnp.max(diagonal, axis=1, initial=0.0))


def _random_rows(rows: int, dtype: jnp.dtype) -> jax.Array:
    """Normal ``[rows, VECTORS - 1]``, row i the same whatever ``rows`` is: padding changes nothing.

    Always the same ones, a constant of the program: replicas agree, and no key is stored.
    """
    return jnp.asarray(np.random.default_rng(0).standard_normal((rows, VECTORS - 1)), dtype)


def largest_row_sum(matrices: jax.Array) -> jax.Array:
    """The infinity norm of each matrix ``[k]``: an upper bound of the largest eigenvalue."""
    return jnp.max(jnp.sum(jnp.abs(matrices), axis=2), axis=1)
