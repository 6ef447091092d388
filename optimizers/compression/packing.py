"""Small integers into bytes and back: bits, 2-bit codes, nibbles, and indices of 8 to 32 bits.

All arrays are flat. A byte takes its parts from planes far apart, not from neighbours: with n codes
of which p fit a byte and w = ceil(n / p), byte i holds codes i, i + w, i + 2w, ... from its lowest
bits up. Packing is then a sum over the leading axis of ``[p, w]``, which every backend vectorises.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Width = Literal[1, 2, 4]  # bits


def packed_bytes(count: int, width: Width) -> int:
    """Bytes that ``count`` codes of ``width`` bits take."""
    return -(-count * width // 8)


def pack(codes: jax.Array, width: Width) -> jax.Array:
    """Packs unsigned codes, 8 // width to a byte; the last byte is filled up with zeros.

    Args:
      codes: bool or uint8 ``[n]``, below ``2**width``.
      width: bits of a code.

    Returns:
      uint8 ``[packed_bytes(n, width)]``.
    """
    planes = 8 // width
    codes = _pad(codes.astype(jnp.uint8), planes).reshape(planes, -1)
    return jnp.sum(codes << _shifts(width), axis=0, dtype=jnp.uint8)


def unpack(packed: jax.Array, width: Width, count: int) -> jax.Array:
    """The ``count`` codes that ``pack`` packed, uint8 ``[count]``."""
    codes = (packed[None, :] >> _shifts(width)) & jnp.uint8(2**width - 1)
    return codes.reshape(-1)[:count]


def _shifts(width: Width) -> jax.Array:
    return jnp.arange(0, 8, width, dtype=jnp.uint8)[:, None]


def _pad(flat: jax.Array, multiple: int) -> jax.Array:
    """``flat`` with zeros up to a multiple of ``multiple``."""
    missing = -flat.size % multiple
    return jnp.pad(flat, (0, missing)) if missing else flat


def index_bytes(count: int, size: int) -> int:
    """Bytes that ``count`` indices below ``size`` take once packed."""
    if _is_12_bit(size):
        return 3 * -(-count // 2)
    return count * _index_dtype(size).itemsize


def pack_indices(indices: jax.Array, size: int) -> jax.Array:
    """Packs indices below ``size`` into the narrowest of 8, 12, 16 and 32 bits that holds them.

    Args:
      indices: integers ``[n]``, in ``[0, size)``.
      size: length of what they index.

    Returns:
      uint8, uint16 or uint32 ``[n]``, or for 12 bits (256 < size <= 4096) uint8 ``[3 ceil(n/2)]``:
      the low bytes of the first half of the indices, those of the second half, and the high
      nibbles of both.
    """
    if not _is_12_bit(size):
        return indices.astype(_index_dtype(size))
    first, second = _pad(indices.astype(jnp.uint16), 2).reshape(2, -1)
    parts = (first & 255, second & 255, (first >> 8) | ((second >> 8) << 4))
    return jnp.concatenate(parts).astype(jnp.uint8)


def unpack_indices(packed: jax.Array, size: int, count: int) -> jax.Array:
    """The ``count`` indices that ``pack_indices`` packed, int32 ``[count]``."""
    if not _is_12_bit(size):
        return packed.astype(jnp.int32)
    first, second, high = packed.astype(jnp.int32).reshape(3, -1)
    return jnp.concatenate([first | ((high & 15) << 8), second | ((high >> 4) << 8)])[:count]


def _is_12_bit(size: int) -> bool:
    return 256 < size <= 4096


def _index_dtype(size: int) -> jnp.dtype:
    """The narrowest unsigned dtype for indices below ``size``."""
    return jnp.dtype(jnp.uint8 if size <= 2**8 else jnp.uint16 if size <= 2**16 else jnp.uint32)
