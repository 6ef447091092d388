"""Codes of 8 bits with a scale a block: encoded and decoded in one pass, averaged in another.

A block is B entries in a row of the flat tensor. Its scale a is its largest magnitude, 1 for a
block of zeros and NaN for one that is not finite; an entry's code is round(127 x / a), and is
decoded as code · (a / 127). This is ``compressors.int8(B)``, whose payloads these are, bit for bit.
The kernels are in ``int8_tpu`` and ``int8_gpu``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.kernels.implementations import GPU_BLOCKS, Impl, by_kernel, resolve

_LEVELS = 127.0


class Encoded(NamedTuple):
    """What ``int8_encode`` gives."""

    codes: jax.Array  # int8 [n]
    scales: jax.Array  # float32 [ceil(n / block)]
    decoded: jax.Array  # float32, the shape of what was encoded


def int8_encode(x: jax.Array, *, block: int = 256, impl: Impl = "auto") -> Encoded:
    """Codes and scales of a tensor, and what they will be taken for, in one pass.

    The kernels, for TPUs and for NVIDIA GPUs from Hopper on, read x once and write 5 bytes an
    entry. The error left by the message is ``x - decoded``, which error feedback adds to the next.
    Time on hardware: unmeasured. What the compilers say of them: ``docs/guides/kernels.md``.

    Args:
      x: float32, any shape.
      block: B; for the kernels a multiple of 128, on GPUs 128 or 256.
      impl: see ``kernels.resolve``.

    Raises:
      ValueError, TypeError: for a block or a dtype that no kernel takes.
      NotImplementedError: see ``kernels.resolve``.
    """
    chosen = _resolve("int8_encode", block, impl)
    if x.dtype != jnp.float32:
        raise TypeError(f"x must be float32, got {x.dtype}")
    if chosen == "xla" or x.size == 0:
        return int8_encode_definition(x, block)

    def on_tpu(x: jax.Array) -> Encoded:
        from jaxopt_suite.kernels import int8_tpu  # slow to import

        return Encoded(*int8_tpu.encode(x, block=block, impl=chosen))

    def on_gpu(x: jax.Array) -> Encoded:
        from jaxopt_suite.kernels import int8_gpu  # slow to import

        return Encoded(*int8_gpu.encode(x, block=block))

    what, cuda = f"int8_encode with block={block}", on_gpu if block in GPU_BLOCKS else None
    return by_kernel(what, on_tpu, chosen, x, cuda=cuda)


def int8_encode_definition(x: jax.Array, block: int) -> Encoded:
    """What ``int8_encode`` means, in plain JAX."""
    rows = jnp.pad(x.reshape(-1), (0, -x.size % block)).reshape(-1, block)
    largest = jnp.max(jnp.abs(rows), axis=1, initial=0.0)
    scales = jnp.where(largest < jnp.inf, jnp.where(largest == 0, 1.0, largest), jnp.nan)
    codes = jnp.round(rows / scales[:, None] * _LEVELS).astype(jnp.int8)
    decoded = codes.astype(jnp.float32) * (scales / _LEVELS)[:, None]
    flat = lambda blocks: blocks.reshape(-1)[: x.size]
    return Encoded(flat(codes), scales, flat(decoded).reshape(x.shape))


def int8_mean(
    codes: jax.Array,
    scales: jax.Array,
    shape: tuple[int, ...],
    *,
    own: tuple[jax.Array, jax.Array] | None = None,
    block: int = 256,
    impl: Impl = "auto",
) -> jax.Array:
    """The mean of many workers' decoded messages, added up in their order, in one pass.

    The kernels, for TPUs and for NVIDIA GPUs from Hopper on, read every code once and write 4 bytes
    an entry, where a loop over the workers reads and writes the sum for each of them. Time on
    hardware: unmeasured.

    Args:
      codes: int8 ``[workers, n]``.
      scales: float32 ``[workers, ceil(n / block)]``.
      shape: of the messages, n entries.
      own: a message float32 of that shape, and whose it is, int32 ``[]``: it is taken as it is in
        the place of that worker's codes.
      block: B; for the kernels a multiple of 128, on GPUs 128 or 256.
      impl: see ``kernels.resolve``.

    Returns:
      float32 of the given shape.

    Raises:
      ValueError: for a block that no kernel takes.
      NotImplementedError: see ``kernels.resolve``.
    """
    chosen = _resolve("int8_mean", block, impl)
    if chosen == "xla" or codes.size == 0:
        return int8_mean_definition(codes, scales, shape, own, block)
    entries, worker = own or (None, jnp.int32(-1))
    operands = [worker, codes, scales, *([] if entries is None else [entries])]

    def on_tpu(*operands: jax.Array) -> jax.Array:
        from jaxopt_suite.kernels import int8_tpu  # slow to import

        return int8_tpu.mean(*operands, shape=shape, block=block, impl=chosen)

    def on_gpu(*operands: jax.Array) -> jax.Array:
        from jaxopt_suite.kernels import int8_gpu  # slow to import

        return int8_gpu.mean(*operands, shape=shape, block=block)

    what, cuda = f"int8_mean with block={block}", on_gpu if block in GPU_BLOCKS else None
    return by_kernel(what, on_tpu, chosen, *operands, cuda=cuda)


def int8_mean_definition(
    codes: jax.Array,
    scales: jax.Array,
    shape: tuple[int, ...],
    own: tuple[jax.Array, jax.Array] | None,
    block: int,
) -> jax.Array:
    """What ``int8_mean`` means, in plain JAX."""

    def add(total: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        worker, codes, scales = row
        each = jnp.repeat(scales / _LEVELS, block)[: codes.size]
        decoded = (codes.astype(jnp.float32) * each).reshape(shape)
        if own is not None:
            decoded = jnp.where(own[1] == worker, own[0], decoded)
        return total + decoded, None

    workers = jnp.arange(len(codes), dtype=jnp.int32)
    zeros = core.vary(jnp.zeros(shape, jnp.float32), core.varying_axes(codes))
    return jax.lax.scan(add, zeros, (workers, codes, scales))[0] / len(codes)


def _resolve(kernel: str, block: int, impl: Impl) -> str:
    core.check_int("block", block)
    chosen = resolve(kernel, impl)
    if chosen != "xla" and block % 128:
        raise ValueError(f"the kernel takes a block that is a multiple of 128, got block={block}")
    return chosen
