"""One or two bits an entry: signs with a scale, and ternary numbers."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core, kernels
from jaxopt_suite.optimizers.compression.blocks import (
    block_count,
    block_length,
    block_sizes,
    check_block,
    from_blocks,
    to_blocks,
)
from jaxopt_suite.optimizers.compression.compressor import Compressor, Shape, by_kernels
from jaxopt_suite.optimizers.compression.packing import pack, packed_bytes, unpack


class SignPayload(NamedTuple):
    """What ``sign`` sends for n entries."""

    bits: jax.Array  # uint8 [ceil(n/8)]: 1 for +, 0 for −
    scales: jax.Array  # float32 [blocks]


class TernaryPayload(NamedTuple):
    """What ``ternary`` sends for n entries."""

    codes: jax.Array  # uint8 [ceil(n/4)]: 1 for 0, 2 for +1, 0 for −1
    scales: jax.Array  # float32 [blocks]


def sign(
    scale: Literal["l1", "l2"] = "l1", *, block: int | None = None, impl: kernels.Impl = "auto"
) -> Compressor:
    """One bit an entry: s · sgn(x), with sgn(0) = +1 since a bit has no third value.

    A block of zeros has s = 0 and decodes to zeros.

    Args:
      scale: ``"l1"``: s = mean |x|, the least-squares scale for given signs. ``"l2"``: s is the
        root of the mean square, which keeps the norm of x, and is what 1-bit Adam uses.
      block: entries that share a scale; ``None`` for one scale a tensor.
      impl: ``"auto"``, ``"xla"``, or by the kernels ``sign_encode`` and ``sign_mean`` for TPUs and
        GPUs ``"pallas"``, ``"interpret"`` on a CPU. These need blocks of a multiple of 128 up to
        1024, on GPUs of 128 or 256, and take tensors, and pieces of them, of a multiple of 8
        blocks; others are XLA's.

    Returns:
      ceil(n/8) + 4 ceil(n/B) bytes. With ρ = ‖x‖₁ / (√B ‖x‖₂) ≥ 1/√B, ``"l1"`` has the error
      (1 − ρ²)‖x‖², so δ = 1/B for the worst x and 2/π for a Gaussian one; ``"l2"`` has
      2(1 − ρ)‖x‖², which is no contraction once ρ < 1/2.
    """
    core.check_choice("scale", scale, ("l1", "l2"))
    check_block(block)
    average = _mean_magnitude if scale == "l1" else _root_mean_square

    def encode(x: jax.Array, key: jax.Array) -> SignPayload:
        del key  # nothing is drawn
        sizes = jnp.asarray(block_sizes(x.shape, block))
        return SignPayload(pack(x.reshape(-1) >= 0, 1), average(to_blocks(x, block), sizes))

    def decode(payload: SignPayload, like: jax.ShapeDtypeStruct) -> jax.Array:
        bits = unpack(payload.bits, 1, math.prod(like.shape))
        rows = to_blocks(bits, block)
        scales = payload.scales[:, None]
        return from_blocks(jnp.where(rows == 1, scales, -scales), like.shape)

    plain = Compressor(
        name="sign",
        encode=encode,
        decode=decode,
        nbytes=lambda shape: packed_bytes(math.prod(shape), 1) + 4 * block_count(shape, block),
        linear=False,
        shared_key=False,
        block=block or 8,
        contraction=(lambda shape: 1 / block_length(shape, block)) if scale == "l1" else None,
        variance=None,
    )
    chosen = kernels.resolve("sign_encode", impl)
    if chosen == "xla":
        return plain
    if block is None or not kernels.signs_take((8 * block,), block):
        raise ValueError(
            f"impl={impl!r} needs a block that is a multiple of 128 up to 1024, got block={block}"
        )
    return _by_kernels(plain, scale, block, chosen)


def _by_kernels(
    plain: Compressor, scale: Literal["l1", "l2"], block: int, impl: kernels.Impl
) -> Compressor:
    """The same, encoded, decoded and averaged in one pass each where the kernels can."""

    def of(shape: Shape) -> kernels.Impl:
        return impl if kernels.signs_take(shape, block) else "xla"

    def encode_decoded(x: jax.Array, key: jax.Array) -> tuple[SignPayload, jax.Array]:
        del key  # nothing is drawn
        chosen = of(x.shape)
        bits, scales, decoded = kernels.sign_encode(x, block=block, scale=scale, impl=chosen)
        return SignPayload(bits, scales), decoded

    def decode_mean(
        payloads: SignPayload,
        like: jax.ShapeDtypeStruct,
        own: tuple[jax.Array, jax.Array] | None,
    ) -> jax.Array:
        chosen = of(like.shape)
        return kernels.sign_mean(*payloads, like.shape, own=own, block=block, impl=chosen)

    return by_kernels(plain, encode_decoded, decode_mean)


def _mean_magnitude(rows: jax.Array, sizes: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(rows), axis=1) / sizes


def _root_mean_square(rows: jax.Array, sizes: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(rows), axis=1)  # squares of tiny or huge entries leave the range
    unit = rows / jnp.where(largest == 0, 1.0, largest)[:, None]
    return largest * jnp.sqrt(jnp.sum(jnp.square(unit), axis=1) / sizes)


def ternary(block: int | None = None, *, clip: float | None = None) -> Compressor:
    """Two bits an entry: s · sgn(x) with probability |x|/s, else 0, with s = max |x|.

    Args:
      block: entries that share a scale; ``None`` for one scale a tensor, as in TernGrad.
      clip: c: s is lowered to c standard deviations of the block (its mean removed) where that is
        less, and larger entries are sent as ±s. This trades a bias for a much smaller variance:
        TernGrad uses 2.5. A block of equal entries has no deviation and is not clipped.

    Returns:
      ceil(n/4) + 4 ceil(n/B) bytes. Without ``clip``: E‖C(x)‖² = s‖x‖₁, so ω = (√B − 1)/2,
      reached by one entry of 1 among entries of 1/(1 + √B). With ``clip``: neither constant.
    """
    check_block(block)
    if clip is not None:
        core.check_number("clip", clip, low=0.0, low_open=True)

    def encode(x: jax.Array, key: jax.Array) -> TernaryPayload:
        rows = to_blocks(x, block)
        scales = ternary_scales(rows, jnp.asarray(block_sizes(x.shape, block)), clip)
        return TernaryPayload(pack_ternary(rows, scales, key, x.size), scales)

    def decode(payload: TernaryPayload, like: jax.ShapeDtypeStruct) -> jax.Array:
        trits = unpack_ternary(payload.codes, math.prod(like.shape))
        rows = to_blocks(trits.astype(jnp.float32), block)
        return from_blocks(rows * payload.scales[:, None], like.shape)

    def variance(shape: Shape) -> float:
        return (math.sqrt(block_length(shape, block)) - 1) / 2

    return Compressor(
        name="ternary",
        encode=encode,
        decode=decode,
        nbytes=lambda shape: packed_bytes(math.prod(shape), 2) + 4 * block_count(shape, block),
        linear=False,
        shared_key=False,
        block=block or 4,
        contraction=None,
        variance=variance if clip is None else None,
    )


def ternary_scales(rows: jax.Array, sizes: jax.Array, clip: float | None) -> jax.Array:
    """The scale of each block, ``[blocks]``: its largest magnitude, or c deviations if less.

    Args:
      rows: float32 ``[blocks, length]``, padded with zeros.
      sizes: float32 ``[blocks]``: entries of each block that are not padding.
      clip: c, or ``None``.
    """
    largest = jnp.max(jnp.abs(rows), axis=1)
    if clip is None:
        return largest
    mean = jnp.sum(rows, axis=1) / sizes
    real = jnp.arange(rows.shape[1], dtype=jnp.float32)[None, :] < sizes[:, None]
    deviations = jnp.where(real, rows - mean[:, None], 0.0)
    sigma = jnp.sqrt(jnp.sum(jnp.square(deviations), axis=1) / sizes)
    return jnp.where(sigma == 0, largest, jnp.minimum(largest, clip * sigma))


def pack_ternary(rows: jax.Array, scales: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """Draws sgn(x) with probability min(|x|/s, 1), else 0, and packs the first ``count``.

    Args:
      rows: float32 ``[blocks, length]``.
      scales: s, float32 ``[blocks]``. Workers that use the same ones may add up their numbers.
      key: typed PRNG key.
      count: entries of ``rows`` that are not padding.

    Returns:
      uint8 ``[ceil(count/4)]``.
    """
    noise = jax.random.uniform(key, rows.shape) * scales[:, None]
    fires = noise < jnp.abs(rows)  # never for 0, and so never in a block of zeros
    trits = jnp.where(fires, jnp.sign(rows), 0.0)
    return pack((from_blocks(trits, (count,)) + 1).astype(jnp.uint8), 2)


def unpack_ternary(codes: jax.Array, count: int) -> jax.Array:
    """The numbers −1, 0 and 1 that ``pack_ternary`` packed, int8 ``[count]``."""
    return unpack(codes, 2, count).astype(jnp.int8) - jnp.int8(1)
