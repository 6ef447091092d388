"""Numbers of 8 and 4 bits with a scale a block: int8, int4, fp8.

A block's scale is its largest magnitude a, float32. With L levels on each side (127 or 7) an
integer code is round(L x / a), decoded as code * (a / L): the largest entry is exact but for the
last bits of float32, and since 0 is a level no entry's error exceeds the entry itself.

Nearest rounding errs by at most a / 2L an entry, so that with a² ≤ ‖x‖² a block of B entries has
‖C(x) − x‖² ≤ min(1 − 1/B, B / 4L²)‖x‖². Stochastic rounding has at most the variance (a / L)² / 4
an entry: ω = B / 4L².
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core, kernels
from jaxopt_suite.optimizers.compression.blocks import (
    absmax_scales,
    block_count,
    block_length,
    check_block,
    from_blocks,
    to_blocks,
)
from jaxopt_suite.optimizers.compression.compressor import Bound, Compressor, Shape, by_kernels
from jaxopt_suite.optimizers.compression.packing import pack, packed_bytes, unpack


class QuantizedPayload(NamedTuple):
    """What ``int8``, ``int4`` and ``fp8`` send for n entries."""

    codes: jax.Array  # int8 [n]; int4: uint8 [ceil(n/2)]; fp8: uint8 [n]
    scales: jax.Array  # float32 [blocks]


def int8(
    block: int | None = 256, *, stochastic: bool = False, impl: kernels.Impl = "auto"
) -> Compressor:
    """One byte an entry and a float32 scale a block: 127 levels on each side of 0.

    Args:
      block: entries that share a scale, B; ``None`` for one scale a tensor. A tensor's last block
        may be shorter.
      stochastic: round up or down at random, without bias, in place of to the nearest.
      impl: ``"auto"``, ``"xla"``, or by the kernels ``int8_encode`` and ``int8_mean`` for TPUs and
        GPUs ``"pallas"``, ``"interpret"`` on a CPU. These round to the nearest, in blocks of a
        multiple of 128, on GPUs of 128 or 256.

    Returns:
      n + 4 ceil(n/B) bytes. Nearest: 1 − δ = min(1 − 1/B, B/64516). Stochastic: ω = B/64516.
    """
    made = _integer("int8", 127, block, stochastic)
    chosen = kernels.resolve("int8_encode", impl)
    if chosen == "xla":
        return made
    if stochastic or block is None or block % 128:
        raise ValueError(
            f"impl={impl!r} needs stochastic=False and a block that is a multiple of 128, got "
            f"stochastic={stochastic} and block={block}"
        )
    return _by_kernels(made, block, chosen)


def _by_kernels(plain: Compressor, block: int, impl: kernels.Impl) -> Compressor:
    """The same, encoded, decoded and averaged in one pass each."""

    def encode_decoded(x: jax.Array, key: jax.Array) -> tuple[QuantizedPayload, jax.Array]:
        del key  # nothing is drawn
        codes, scales, decoded = kernels.int8_encode(x, block=block, impl=impl)
        return QuantizedPayload(codes, scales), decoded

    def decode_mean(
        payloads: QuantizedPayload,
        like: jax.ShapeDtypeStruct,
        own: tuple[jax.Array, jax.Array] | None,
    ) -> jax.Array:
        return kernels.int8_mean(*payloads, like.shape, own=own, block=block, impl=impl)

    return by_kernels(plain, encode_decoded, decode_mean)


def int4(block: int | None = 64, *, stochastic: bool = False) -> Compressor:
    """Two entries a byte and a float32 scale a block: 7 levels on each side of 0.

    Args:
      block: as in ``int8``.
      stochastic: as in ``int8``.

    Returns:
      ceil(n/2) + 4 ceil(n/B) bytes. Nearest: 1 − δ = min(1 − 1/B, B/196). Stochastic: ω = B/196.
    """
    return _integer("int4", 7, block, stochastic)


def _integer(name: str, levels: int, block: int | None, stochastic: bool) -> Compressor:
    check_block(block)
    nibbles = levels < 8

    def encode(x: jax.Array, key: jax.Array) -> QuantizedPayload:
        rows = to_blocks(x, block)
        scales = absmax_scales(rows)
        target = rows / scales[:, None] * levels  # divided first: the largest is ±levels exactly
        rounded = _round_at_random(target, key) if stochastic else jnp.round(target)
        codes = from_blocks(rounded.astype(jnp.int8), (x.size,))
        return QuantizedPayload(pack(_to_nibbles(codes), 4) if nibbles else codes, scales)

    def decode(payload: QuantizedPayload, like: jax.ShapeDtypeStruct) -> jax.Array:
        size = math.prod(like.shape)
        codes = _from_nibbles(unpack(payload.codes, 4, size)) if nibbles else payload.codes
        rows = to_blocks(codes.astype(jnp.float32), block)
        return from_blocks(rows * (payload.scales / levels)[:, None], like.shape)

    def variance(shape: Shape) -> float:
        return block_length(shape, block) / (4 * levels**2)

    def contraction(shape: Shape) -> float:
        length = block_length(shape, block)
        return max(1 / length, 1 - length / (4 * levels**2))

    def nbytes(shape: Shape) -> int:
        size = math.prod(shape)
        return (packed_bytes(size, 4) if nibbles else size) + 4 * block_count(shape, block)

    return Compressor(
        name=name,
        encode=encode,
        decode=decode,
        nbytes=nbytes,
        linear=False,
        shared_key=False,
        block=block or (2 if nibbles else 1),
        contraction=None if stochastic else contraction,
        variance=variance if stochastic else None,
    )


def _round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """The integer below or above, whichever the dice say; the mean over keys is ``x``."""
    below = jnp.floor(x)  # the rest is exact, and codes cannot leave the range as floor(x + u) can
    return below + (jax.random.uniform(key, x.shape) < x - below)


def _to_nibbles(codes: jax.Array) -> jax.Array:
    return (codes + jnp.int8(8)).astype(jnp.uint8)


def _from_nibbles(nibbles: jax.Array) -> jax.Array:
    return nibbles.astype(jnp.int8) - jnp.int8(8)


@dataclasses.dataclass(frozen=True)
class _Format:
    dtype: jnp.dtype
    largest: float
    relative_error: float  # of an entry in the normal range
    absolute_error: float  # of one below it


_FORMATS = {
    "e4m3": _Format(jnp.dtype(jnp.float8_e4m3fn), 448.0, 2.0**-4, 2.0**-10),
    "e5m2": _Format(jnp.dtype(jnp.float8_e5m2), 57344.0, 2.0**-3, 2.0**-17),
}


def fp8(number_format: Literal["e4m3", "e5m2"] = "e4m3", *, block: int | None = None) -> Compressor:
    """One byte an entry, a floating-point number of 8 bits, and a float32 scale.

    The scale maps the largest magnitude to the format's largest normal number, 448 or 57344: e4m3fn
    has no infinity, and makes NaN of anything above. The relative error of an entry is at most 2⁻⁴
    or 2⁻³, however small it is beside the largest, down to 2⁻⁶/448 or 2⁻¹⁴/57344 of it. The numbers
    travel as uint8, which no compiler widens.

    Args:
      number_format: ``"e4m3"`` (4 bits of exponent, 3 of mantissa) or ``"e5m2"``.
      block: entries that share a scale; ``None`` for one scale a tensor.

    Returns:
      n + 4 ceil(n/B) bytes. 1 − δ = min(1 − 1/B, ε² + B c²) with ε the relative error above and
      c = 2⁻¹⁰/448 or 2⁻¹⁷/57344 the absolute error, relative to the largest, of an entry below the
      normal range.
    """
    core.check_choice("number_format", number_format, tuple(_FORMATS))
    check_block(block)
    form = _FORMATS[number_format]

    def encode(x: jax.Array, key: jax.Array) -> QuantizedPayload:
        del key  # nothing is drawn
        rows = to_blocks(x, block)
        scales = absmax_scales(rows)
        target = jnp.clip(rows / scales[:, None] * form.largest, -form.largest, form.largest)
        codes = jax.lax.bitcast_convert_type(target.astype(form.dtype), jnp.uint8)
        return QuantizedPayload(from_blocks(codes, (x.size,)), scales)

    def decode(payload: QuantizedPayload, like: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = jax.lax.bitcast_convert_type(payload.codes, form.dtype).astype(jnp.float32)
        rows = to_blocks(numbers, block)
        return from_blocks(rows * (payload.scales / form.largest)[:, None], like.shape)

    return Compressor(
        name="fp8",
        encode=encode,
        decode=decode,
        nbytes=lambda shape: math.prod(shape) + 4 * block_count(shape, block),
        linear=False,
        shared_key=False,
        block=block or 1,
        contraction=_fp8_contraction(form, block),
        variance=None,
    )


def _fp8_contraction(form: _Format, block: int | None) -> Bound:
    def contraction(shape: Shape) -> float:
        length = block_length(shape, block)
        small = form.absolute_error / form.largest
        return max(1 / length, 1 - form.relative_error**2 - length * small**2)

    return contraction
