"""Cutting a tensor into blocks, each with a scale of its own.

``block`` is a length B or ``None`` for one block a tensor. A tensor shorter than B is one block of
its own length; a last block that is not full is padded with zeros for the arithmetic only: the
padding does not travel.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_suite import core
from jaxopt_suite.optimizers.compression.compressor import Shape


def check_block(block: int | None) -> None:
    """Raises unless ``block`` is ``None`` or a positive integer."""
    if block is not None:
        core.check_int("block", block, low=1)


def block_length(shape: Shape, block: int | None) -> int:
    """Entries in a full block of a tensor of this shape; 1 if the tensor is empty."""
    size = math.prod(shape)
    return max(1, size if block is None else min(block, size))


def block_count(shape: Shape, block: int | None) -> int:
    """Number of blocks, a last one that is not full included."""
    return -(-math.prod(shape) // block_length(shape, block))


def block_sizes(shape: Shape, block: int | None) -> np.ndarray:
    """Entries in each block without the padding, float32 ``[blocks]``."""
    length, count = block_length(shape, block), block_count(shape, block)
    return np.minimum(length, math.prod(shape) - length * np.arange(count)).astype(np.float32)


def to_blocks(x: jax.Array, block: int | None) -> jax.Array:
    """``x`` flat, padded with zeros, as ``[blocks, length]``."""
    length, count = block_length(x.shape, block), block_count(x.shape, block)
    flat = x.reshape(-1)
    if length * count != flat.size:
        flat = jnp.pad(flat, (0, length * count - flat.size))
    return flat.reshape(count, length)


def from_blocks(rows: jax.Array, shape: Shape) -> jax.Array:
    """The tensor of which ``rows`` are the blocks."""
    return rows.reshape(-1)[: math.prod(shape)].reshape(shape)


def absmax_scales(rows: jax.Array) -> jax.Array:
    """Largest magnitude of each row, ``[blocks]``; 1 for a row of zeros, NaN for a non-finite one.

    With 1 in the place of 0, a row of zeros has codes 0 and decodes to zeros; a small number added
    to every scale instead would spoil the largest entries of small rows. An infinite scale would
    make zeros of the finite entries of its row; NaN spoils all of them alike.
    """
    largest = jnp.max(jnp.abs(rows), axis=1)
    finite = jnp.where(largest < jnp.inf, largest, jnp.nan)
    return jnp.where(largest == 0, 1.0, finite)
