"""Counts and products in tiles of 128 columns, in which chunks lie side by side.

A tile's columns are multiplied by a matrix of 128 by 128 with a block for each chunk. Matrices of
zeros and ones are bfloat16, whose products a TPU adds up in float32: counts are exact.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LANES = 128
_EXACT = jax.lax.Precision.DEFAULT  # of products of bfloat16 numbers


class Ranks(NamedTuple):
    """Of flags of a row of chunks ``[a, columns]``, counts within each chunk; float32, likewise."""

    rank: jax.Array  # flags before this entry, in the order of the flat chunk
    before: jax.Array  # flags in the rows before this one
    here: jax.Array  # flags in this row

    @classmethod
    def of(cls, flags: jax.Array, b: int) -> "Ranks":
        """Of bool ``[a, columns]``, for chunks of ``b`` columns."""
        a = flags.shape[0]
        ones = zeros_and_ones(flags)
        lower = zeros_and_ones(positions((a, a), 1) < positions((a, a), 0))
        place = (LANES, LANES)
        earlier = same_chunk(b) & (positions(place, 0) < positions(place, 1))
        here = tiled(ones, zeros_and_ones(same_chunk(b)))
        before = product(lower, here.astype(jnp.bfloat16))
        return cls(before + tiled(ones, zeros_and_ones(earlier)), before, here)


def chunk_sums(flags: jax.Array, b: int) -> jax.Array:
    """Flags set in each chunk, over its columns: of ``[a, columns]`` float32 ``[1, columns]``.

    Args:
      flags: bool ``[a, columns]``, or ``[bands, a, columns]`` for a result ``[bands, columns]``.
      b: columns of a chunk.
    """
    counts = jnp.sum(jnp.where(flags, 1.0, 0.0), axis=-2).reshape(-1, flags.shape[-1])
    return tiled(counts.astype(jnp.bfloat16), zeros_and_ones(same_chunk(b)))


def same_chunk(b: int) -> jax.Array:
    """Which of 128 columns are of one chunk, bool ``[128, 128]``."""
    place = (LANES, LANES)
    return (positions(place, 0) & -b) == (positions(place, 1) & -b)


def tiled(
    x: jax.Array, y: jax.Array, axes: tuple[int, int] = (1, 0), precision: Any = _EXACT
) -> jax.Array:
    """Products of every 128 columns of ``x`` with a matrix ``[128, 128]``, side by side."""
    tiles = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    return jnp.concatenate([product(tile, y, axes, precision) for tile in tiles], axis=1)


def product(
    x: jax.Array, y: jax.Array, axes: tuple[int, int] = (1, 0), precision: Any = _EXACT
) -> jax.Array:
    """A product of matrices that sums over these axes, in float32."""
    over = ((axes[0],), (axes[1],)), ((), ())
    return jax.lax.dot_general(x, y, over, precision, preferred_element_type=jnp.float32)


def zeros_and_ones(flags: jax.Array) -> jax.Array:
    """Flags as bfloat16."""
    return jnp.where(flags, 1.0, 0.0).astype(jnp.bfloat16)


def positions(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Each entry's place along the axis, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
