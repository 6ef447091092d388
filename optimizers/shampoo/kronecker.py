"""Statistics of the modes of stacked blocks, and their roots applied to the modes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_suite import kernels

_MODES = "abcdefghijklmnopqrstuvw"


def observe(
    statistics: Sequence[jax.Array | None],
    blocks: jax.Array,
    decay: jax.typing.ArrayLike,
    weight: jax.typing.ArrayLike,
    impl: kernels.Impl = "auto",
) -> tuple[Any, ...]:
    """``decay`` times each mode's statistic plus ``weight`` times ``G_i G_i^T`` of its unfolding.

    Args:
      statistics: for each mode ``[rows, di, di]``, or ``None`` for one that has none.
      blocks: ``[rows, d1, ..., dk]``, k at least 1.
      decay: a number.
      weight: a number.
      impl: see ``kernels.gram_update``.
    """
    return tuple(
        None
        if statistic is None
        else kernels.gram_update(statistic, blocks, decay, weight, mode=mode, impl=impl)
        for mode, statistic in enumerate(statistics)
    )


def multiply(blocks: jax.Array, matrices: Sequence[jax.Array | None]) -> jax.Array:
    """Each block contracted along every mode with the rows of a matrix of its own.

    For matrices ``L^T G R``.

    Args:
      blocks: ``[rows, d1, ..., dk]``.
      matrices: for each mode ``[rows, di, di]``, or ``None`` for the identity.

    Returns:
      As ``blocks``.
    """
    names = _MODES[: blocks.ndim - 1]
    for mode, matrix in zip(names, matrices, strict=True):
        if matrix is not None:
            result = names.replace(mode, "z")
            blocks = _einsum(f"y{names},y{mode}z->y{result}", blocks, matrix.astype(blocks.dtype))
    return blocks


def rotate(blocks: jax.Array, bases: Sequence[jax.Array | None]) -> jax.Array:
    """The blocks in the coordinates of the bases' columns: ``Q_1^T G Q_2`` for matrices."""
    return multiply(blocks, bases)


def rotate_back(blocks: jax.Array, bases: Sequence[jax.Array | None]) -> jax.Array:
    """The inverse of ``rotate``, for orthonormal bases."""
    return multiply(blocks, [None if q is None else jnp.swapaxes(q, 1, 2) for q in bases])


def products(x: jax.Array, y: jax.Array) -> jax.Array:
    """``X^T Y`` of each pair of matrices ``[rows, d, d]``."""
    return _einsum("yab,yac->ybc", x, y)


def _einsum(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    # In full precision: a TPU would multiply float32 in bfloat16 passes, and a statistic with
    # errors of 1e-2 has no root worth taking.
    return jnp.einsum(formula, x, y, precision=jax.lax.Precision.HIGHEST)
