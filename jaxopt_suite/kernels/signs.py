"""Signs with a scale a block: packed and decoded in one pass, averaged in another.

A block is B entries in a row of the flat tensor. Its scale s is the mean magnitude or the root of
the mean square; an entry is one bit, decoded as s or −s. This is ``compressors.sign(block=B)``,
whose payloads these are.

A byte takes its bits from eight entries far apart, an eighth of the flat tensor from each other.
The kernels are in ``signs_tpu`` and ``signs_gpu``.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.kernels.implementations import GPU_BLOCKS, Impl, by_kernel, resolve

_SLABS = 8
WIDEST = 1024  # block that the kernels take: the columns of a tile on TPUs

Scale = Literal["l1", "l2"]


class Signs(NamedTuple):
    """What ``sign_encode`` gives for n entries."""

    bits: jax.Array  # uint8 [ceil(n / 8)]: 1 for +, 0 for −
    scales: jax.Array  # float32 [ceil(n / block)]
    decoded: jax.Array  # float32, the shape of what was encoded


def sign_encode(
    x: jax.Array, *, block: int = 256, scale: Scale = "l1", impl: Impl = "auto"
) -> Signs:
    """Signs and scales of a tensor, and what they will be taken for, in one pass.

    The kernels, for TPUs and for NVIDIA GPUs from Hopper on, read x once and write a bit an entry,
    the scales, and what is decoded. The error left by the message is ``x - decoded``. Time on
    hardware: unmeasured. What the compilers say of them: ``docs/guides/kernels.md``.

    Args:
      x: float32, any shape.
      block: B; on GPUs the kernel takes 128 or 256.
      scale: ``"l1"``: mean magnitude. ``"l2"``: root of the mean square.
      impl: see ``kernels.resolve``. What the kernels take is said by ``signs_take``.

    Raises:
      ValueError, TypeError: for a bad argument, or for what no kernel takes.
      NotImplementedError: see ``kernels.resolve``.
    """
    core.check_choice("scale", scale, ("l1", "l2"))
    chosen = _resolve("sign_encode", x.shape, block, impl)
    if x.dtype != jnp.float32:
        raise TypeError(f"x must be float32, got {x.dtype}")
    if chosen == "xla" or x.size == 0:
        return sign_encode_definition(x, block, scale)

    def on_tpu(x: jax.Array) -> Signs:
        from jaxopt_suite.kernels import signs_tpu  # slow to import

        return Signs(*signs_tpu.encode(x, block=block, scale=scale, impl=chosen))

    def on_gpu(x: jax.Array) -> Signs:
        from jaxopt_suite.kernels import signs_gpu  # slow to import

        return Signs(*signs_gpu.encode(x, block=block, scale=scale))

    what, cuda = f"sign_encode with block={block}", on_gpu if block in GPU_BLOCKS else None
    return by_kernel(what, on_tpu, chosen, x, cuda=cuda)


def signs_take(shape: tuple[int, ...], block: int) -> bool:
    """Whether the kernels take tensors of this shape: whole blocks in each of eight slabs."""
    return block % 128 == 0 and block <= WIDEST and math.prod(shape) % (_SLABS * block) == 0


def sign_encode_definition(x: jax.Array, block: int, scale: Scale) -> Signs:
    """What ``sign_encode`` means, in plain JAX."""
    flat, block = x.reshape(-1), max(1, min(block, x.size))
    rows = jnp.pad(flat, (0, -x.size % block)).reshape(-1, block)
    sizes = jnp.minimum(block, x.size - block * jnp.arange(len(rows))).astype(jnp.float32)
    if scale == "l1":
        scales = jnp.sum(jnp.abs(rows), axis=1) / sizes
    else:
        largest = jnp.max(jnp.abs(rows), axis=1)  # squares of huge entries leave the range
        unit = rows / jnp.where(largest == 0, 1.0, largest)[:, None]
        scales = largest * jnp.sqrt(jnp.sum(jnp.square(unit), axis=1) / sizes)
    each = jnp.repeat(scales, block)[: x.size]
    positive = flat >= 0
    slabs = jnp.pad(positive, (0, -x.size % _SLABS)).reshape(_SLABS, -1)
    powers = jnp.array([1, 2, 4, 8, 16, 32, 64, 128], jnp.uint8)[:, None]
    bits = jnp.sum(slabs * powers, axis=0, dtype=jnp.uint8)
    return Signs(bits, scales, jnp.where(positive, each, -each).reshape(x.shape))


def sign_mean(
    bits: jax.Array,
    scales: jax.Array,
    shape: tuple[int, ...],
    *,
    own: tuple[jax.Array, jax.Array] | None = None,
    block: int = 256,
    impl: Impl = "auto",
) -> jax.Array:
    """The mean of many workers' decoded messages, added up in their order, in one pass.

    The kernels, for TPUs and for NVIDIA GPUs from Hopper on, read every bit once and write 4 bytes
    an entry, where a loop over the workers reads and writes the sum for each of them. Time on
    hardware: unmeasured.

    Args:
      bits: uint8 ``[workers, ceil(n / 8)]``.
      scales: float32 ``[workers, ceil(n / block)]``.
      shape: of the messages, n entries.
      own: a message float32 of that shape, and whose it is, int32 ``[]``: it is taken as it is in
        the place of that worker's bits.
      block: B; on GPUs the kernel takes 128 or 256.
      impl: see ``kernels.resolve``. What the kernels take is said by ``signs_take``.

    Returns:
      float32 of the given shape.

    Raises:
      ValueError: for what no kernel takes.
      NotImplementedError: see ``kernels.resolve``.
    """
    chosen = _resolve("sign_mean", shape, block, impl)
    if chosen == "xla" or bits.size == 0:
        return sign_mean_definition(bits, scales, shape, own, block)
    message, worker = own or (None, jnp.int32(-1))
    operands = [worker, bits, scales, *([] if message is None else [message])]

    def on_tpu(*operands: jax.Array) -> jax.Array:
        from jaxopt_suite.kernels import signs_tpu  # slow to import

        return signs_tpu.mean(*operands, shape=shape, block=block, impl=chosen)

    def on_gpu(*operands: jax.Array) -> jax.Array:
        from jaxopt_suite.kernels import signs_gpu  # slow to import

        return signs_gpu.mean(*operands, shape=shape, block=block)

    what, cuda = f"sign_mean with block={block}", on_gpu if block in GPU_BLOCKS else None
    return by_kernel(what, on_tpu, chosen, *operands, cuda=cuda)


def sign_mean_definition(
    bits: jax.Array,
    scales: jax.Array,
    shape: tuple[int, ...],
    own: tuple[jax.Array, jax.Array] | None,
    block: int,
) -> jax.Array:
    """What ``sign_mean`` means, in plain JAX."""
    size = math.prod(shape)
    length = max(1, min(block, size))

    def add(total: jax.Array, row: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        worker, bits, scales = row
        planes = [(bits >> slab) & 1 for slab in range(_SLABS)]
        positive = jnp.concatenate(planes)[:size] == 1
        each = jnp.repeat(scales, length)[:size]
        decoded = jnp.where(positive, each, -each).reshape(shape)
        if own is not None:
            decoded = jnp.where(own[1] == worker, own[0], decoded)
        return total + decoded, None

    workers = jnp.arange(len(bits), dtype=jnp.int32)
    zeros = core.vary(jnp.zeros(shape, jnp.float32), core.varying_axes(bits))
    return jax.lax.scan(add, zeros, (workers, bits, scales))[0] / len(bits)


def _resolve(kernel: str, shape: tuple[int, ...], block: int, impl: Impl) -> str:
    core.check_int("block", block, low=1)
    chosen = resolve(kernel, impl)
    if chosen != "xla" and not signs_take(shape, block):
        raise ValueError(
            f"the kernel takes a block that is a multiple of 128 up to {WIDEST}, and tensors of a "
            f"multiple of 8 blocks, got block={block} and shape {shape}"
        )
    return chosen
