"""Few entries of many: the largest, or random ones."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.optimizers.compression.blocks import (
    block_count,
    block_length,
    from_blocks,
    to_blocks,
)
from jaxopt_suite.optimizers.compression.compressor import Compressor, Shape
from jaxopt_suite.optimizers.compression.packing import index_bytes, pack_indices, unpack_indices
from jaxopt_suite.optimizers.compression.selection import largest

ValueName = Literal["float32", "bfloat16"]
VALUES = ("float32", "bfloat16")


class SparsePayload(NamedTuple):
    """What ``top_k`` and ``dct_top_k`` send: k entries of each of c chunks of m entries."""

    values: jax.Array  # float32 [c k], or the bits of bfloat16 as uint16 [c k]
    indices: jax.Array  # within the chunk, packed: uint8, uint16 or uint32


class RandomPayload(NamedTuple):
    """What ``random_k`` sends."""

    values: jax.Array  # float32 [k]
    seed: jax.Array  # uint32 []: equal on all workers, so it need not travel


def top_k(
    k: int | None = None,
    *,
    fraction: float | None = None,
    chunk: int | None = None,
    values: ValueName = "float32",
) -> Compressor:
    """The k entries of largest magnitude, of the tensor or of each chunk of it; exactly k leave.

    The selection is exact and sorts nothing long (``selection.largest``); of equal magnitudes the
    lower index wins. Indices travel in the narrowest of 8, 12, 16 and 32 bits.

    Args:
      k: entries kept, at most ``chunk``; all of a tensor that has fewer. Give this or ``fraction``.
      fraction: k as a share of the tensor or chunk, in (0, 1]; rounded, at least one.
      chunk: m: choose k among every m entries of the flat tensor, so that indices are short and the
        tensor may be cut between chunks; ``None`` chooses among all. A last chunk that is not full
        is filled up with zeros, which may be among those sent.
      values: dtype of the values. bfloat16 halves them and rounds to 8 bits.

    Returns:
      c k values and c k indices for c chunks. δ = k/m (times 1 − 2⁻¹⁶ for bfloat16), reached where
      all magnitudes are equal.

    Raises:
      ValueError, TypeError: for a bad argument, or for both or neither of ``k`` and ``fraction``.
    """
    _check_kept(k, fraction)
    check_values(values)
    if chunk is not None:
        core.check_int("chunk", chunk, low=1)
        if k is not None and k > chunk:
            raise ValueError(f"k must be at most chunk={chunk}, got {k}")

    def kept(shape: Shape) -> int:
        return _kept(k, fraction, block_length(shape, chunk))

    def encode(x: jax.Array, key: jax.Array) -> SparsePayload:
        del key  # nothing is drawn
        return pack_largest(to_blocks(x, chunk), kept(x.shape), values)

    def decode(payload: SparsePayload, like: jax.ShapeDtypeStruct) -> jax.Array:
        count, length = block_count(like.shape, chunk), block_length(like.shape, chunk)
        rows = scatter(payload, count, length, kept(like.shape))
        return from_blocks(rows, like.shape)

    def nbytes(shape: Shape) -> int:
        count, length = block_count(shape, chunk), block_length(shape, chunk)
        return sparse_bytes(count * kept(shape), length, values)

    return Compressor(
        name="top_k",
        encode=encode,
        decode=decode,
        nbytes=nbytes,
        linear=False,
        shared_key=False,
        block=chunk or 0,
        contraction=lambda shape: (
            kept(shape) / block_length(shape, chunk) * value_precision(values)
        ),
        variance=None,
    )


def random_k(
    k: int | None = None, *, fraction: float | None = None, scaled: bool = False
) -> Compressor:
    """k random entries, the same on all workers, so that their mean may cross the wire as it is.

    One entry is drawn in each of k equal stretches of the flat tensor, and all are then shifted
    around it by one random offset: every entry is sent with probability exactly k/n, which is all
    that the constants below depend on, and neither a sort nor n random numbers are needed.

    Args:
      k: entries kept, all if the tensor has fewer. Give this or ``fraction``.
      fraction: k as a share of the tensor, in (0, 1]; rounded, at least one.
      scaled: multiply by n/k, which makes it unbiased, and no contraction.

    Returns:
      4k bytes. Unscaled: E‖C(x) − x‖² = (1 − k/n)‖x‖², so δ = k/n. Scaled: ω = n/k − 1. The key
      must be the same on all workers, and a new one every step.

    Raises:
      ValueError, TypeError: for a bad argument, or for both or neither of ``k`` and ``fraction``.
    """
    _check_kept(k, fraction)

    def kept(shape: Shape) -> int:
        size = math.prod(shape)
        return _kept(k, fraction, size) if size else 0

    def encode(x: jax.Array, key: jax.Array) -> RandomPayload:
        seed = jax.random.bits(key, (), jnp.uint32)
        indices = random_indices(seed, x.size, kept(x.shape))
        return RandomPayload(x.reshape(-1)[indices], seed)

    def decode(payload: RandomPayload, like: jax.ShapeDtypeStruct) -> jax.Array:
        size, count = math.prod(like.shape), kept(like.shape)
        sent = payload.values * (size / count) if scaled and count else payload.values
        indices = random_indices(payload.seed, size, count)
        flat = jnp.zeros(size, jnp.float32).at[indices].set(sent, unique_indices=True)
        return flat.reshape(like.shape)

    def share(shape: Shape) -> float:
        return kept(shape) / math.prod(shape) if math.prod(shape) else 1.0

    return Compressor(
        name="random_k",
        encode=encode,
        decode=decode,
        nbytes=lambda shape: 4 * kept(shape),
        linear=True,
        shared_key=True,
        block=0,
        contraction=None if scaled else share,
        variance=(lambda shape: 1 / share(shape) - 1) if scaled else None,
    )


def random_indices(seed: jax.Array, size: int, count: int) -> jax.Array:
    """``count`` different indices below ``size``, each index in it with probability count/size.

    Args:
      seed: uint32 ``[]``.
      size: of what is indexed.
      count: at most ``size``.

    Returns:
      int32 ``[count]``.
    """
    if count == 0:
        return jnp.zeros(0, jnp.int32)
    place_key, shift_key = jax.random.split(jax.random.key(seed))
    short, longer = divmod(size, count)  # the first ``longer`` stretches have one entry more
    stretch = jnp.arange(count, dtype=jnp.int32)
    start = stretch * short + jnp.minimum(stretch, longer)
    length = short + (stretch < longer)
    # A remainder favours no place by more than 2⁻³² length, and the shift evens that out.
    place = start + (jax.random.bits(place_key, (count,)) % length.astype(jnp.uint32)).astype(
        jnp.int32
    )
    shift = jax.random.randint(shift_key, (), 0, size)
    return jnp.where(place >= size - shift, place - (size - shift), place + shift)


def pack_largest(rows: jax.Array, k: int, values: ValueName) -> SparsePayload:
    """The k largest magnitudes of each row of ``[c, m]``, packed."""
    if rows.shape[0] == 1:
        indices = largest(rows[0], k)[None, :]
    else:
        indices = jax.lax.top_k(jnp.abs(rows), k)[1]
    kept = jnp.take_along_axis(rows, indices, axis=1)
    return pack_entries(kept, indices, rows.shape[1], values)


def pack_entries(
    kept: jax.Array, indices: jax.Array, length: int, values: ValueName
) -> SparsePayload:
    """Entries and where they were in rows of ``length``, both ``[c, k]``, packed."""
    kept = kept.reshape(-1)
    if values == "bfloat16":
        kept = jax.lax.bitcast_convert_type(kept.astype(jnp.bfloat16), jnp.uint16)
    return SparsePayload(kept, pack_indices(indices.reshape(-1), length))


def unpack_largest(
    payload: SparsePayload, count: int, length: int, k: int
) -> tuple[jax.Array, jax.Array]:
    """Values, float32, and indices, int32, both ``[count, k]``, of ``count`` rows of ``length``."""
    values = payload.values
    if values.dtype == jnp.uint16:
        values = jax.lax.bitcast_convert_type(values, jnp.bfloat16).astype(jnp.float32)
    indices = unpack_indices(payload.indices, length, count * k)
    return values.reshape(count, k), indices.reshape(count, k)


def scatter(payload: SparsePayload, count: int, length: int, k: int) -> jax.Array:
    """The rows ``[count, length]`` that ``pack_largest`` packed, zeros where nothing was sent."""
    values, indices = unpack_largest(payload, count, length, k)
    rows = jnp.arange(count, dtype=jnp.int32)[:, None]
    zeros = jnp.zeros((count, length), jnp.float32)
    return zeros.at[rows, indices].set(values, unique_indices=True)


def sparse_bytes(count: int, length: int, values: ValueName) -> int:
    """Bytes of ``count`` values and of their indices below ``length``."""
    return count * (2 if values == "bfloat16" else 4) + index_bytes(count, length)


def value_precision(values: ValueName) -> float:
    """The share of the energy of what is sent that rounding the values surely leaves."""
    return 1 - 2.0**-16 if values == "bfloat16" else 1.0


def check_values(values: str) -> None:
    """Raises unless ``values`` names a dtype that values may travel in."""
    core.check_choice("values", values, VALUES)


def _check_kept(k: int | None, fraction: float | None) -> None:
    if (k is None) == (fraction is None):
        raise ValueError(f"give either k or fraction, got k={k!r} and fraction={fraction!r}")
    if k is not None:
        core.check_int("k", k, low=1)
    else:
        core.check_number("fraction", fraction, low=0.0, high=1.0, low_open=True)


def _kept(k: int | None, fraction: float | None, length: int) -> int:
    """Entries kept of ``length``."""
    wanted = round(fraction * length) if fraction is not None else k
    assert wanted is not None  # one of the two was given
    return max(1, min(wanted, length))
