"""Signs with a scale a block: packed and decoded in one pass, averaged in another.

A block is B entries in a row of the flat tensor. Its scale s is the mean magnitude or the root of
the mean square; an entry is one bit, decoded as s or −s. This is ``compressors.sign(block=B)``,
whose payloads these are.

A byte takes its bits from eight entries far apart, an eighth of the flat tensor from each other.
Of a matrix of rows that are a multiple of 8 these lie in the same column of eight slabs of rows.
The kernels take such slabs side by side, as they lie: a byte is then a sum over eight arrays, and
nothing moves between the lanes of a register. Those for GPUs are in ``signs_gpu``.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxopt_suite import core
from jaxopt_suite.kernels.implementations import (
    GPU_BLOCKS,
    Impl,
    alike_varying,
    by_kernel,
    interpreter,
    resolve,
    struct_like,
    tpu_parameters,
    without_own,
)

_SLABS = 8
_TILE = 32, 1024  # rows of each slab and columns, at most: 1 MiB of float32
_ROWS = 64  # of a matrix that is taken as it lies, a multiple: each slab is whole tiles of 8 rows

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

    def on_gpu(x: jax.Array) -> Signs:
        from jaxopt_suite.kernels import signs_gpu  # slow to import

        return Signs(*signs_gpu.encode(x, block=block, scale=scale))

    on_tpu = functools.partial(_encode, block=block, scale=scale, impl=chosen)
    what, cuda = f"sign_encode with block={block}", on_gpu if block in GPU_BLOCKS else None
    return by_kernel(what, on_tpu, chosen, x, cuda=cuda)


def signs_take(shape: tuple[int, ...], block: int) -> bool:
    """Whether the kernels take tensors of this shape: whole blocks in each of eight slabs."""
    return block % 128 == 0 and block <= _TILE[1] and math.prod(shape) % (_SLABS * block) == 0


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

    def on_gpu(*operands: jax.Array) -> jax.Array:
        from jaxopt_suite.kernels import signs_gpu  # slow to import

        return signs_gpu.mean(*operands, shape=shape, block=block)

    on_tpu = functools.partial(_mean, shape=shape, block=block, impl=chosen)
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


class _View(NamedTuple):
    """A tensor as eight slabs of rows, in which the blocks lie."""

    rows: int  # of a slab
    columns: int  # a multiple of block
    block: int

    @classmethod
    def of(cls, shape: tuple[int, ...], block: int) -> "_View":
        """As it lies, or laid out anew where that is not in whole slabs and blocks."""
        size = math.prod(shape)
        columns = shape[-1]
        if columns % block or size // columns % _ROWS:
            blocks, most = size // (_SLABS * block), _TILE[1] // block
            columns = block * max(n for n in range(1, most + 1) if blocks % n == 0)
        return cls(size // columns // _SLABS, columns, block)

    @property
    def slabs(self) -> tuple[int, int, int]:
        return _SLABS, self.rows, self.columns

    @property
    def scales(self) -> tuple[int, int, int]:
        return _SLABS, self.rows, self.columns // self.block

    @property
    def tile(self) -> tuple[int, int]:
        """Rows of every slab and columns of what is done at a time."""
        columns = min(self.columns, _TILE[1] // self.block * self.block)
        return min(self.rows, _TILE[0]), columns

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.rows // self.tile[0]), -(-self.columns // self.tile[1])


def _encode(x: jax.Array, *, block: int, scale: Scale, impl: str) -> Signs:
    """The kernel for TPUs."""
    view = _View.of(x.shape, block)
    codes, scales, decoded = _encode_view(x.reshape(view.slabs), view, scale, impl)
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    return Signs(bits.reshape(-1), scales.reshape(-1), decoded.reshape(x.shape))


def _encode_view(x: jax.Array, view: _View, scale: Scale, impl: str) -> Any:
    rows, columns = view.tile
    entries = pl.BlockSpec((_SLABS, rows, columns), lambda i, j: (0, i, j))
    scales = pl.BlockSpec((_SLABS, rows, view.scales[2]), lambda i, j: (0, i, 0))
    body = functools.partial(
        _encode_kernel, block=view.block, groups=columns // view.block, scale=scale
    )
    return pl.pallas_call(
        body,
        name="sign_encode",
        grid=view.grid,
        in_specs=[entries],
        out_specs=[pl.BlockSpec((rows, columns), lambda i, j: (i, j)), scales, entries],
        out_shape=[
            struct_like(view.slabs[1:], jnp.int8, x),
            struct_like(view.scales, jnp.float32, x),
            struct_like(view.slabs, jnp.float32, x),
        ],
        compiler_params=tpu_parameters(impl, "parallel", "arbitrary", allow_input_fusion=[True]),
        cost_estimate=pl.CostEstimate(
            flops=6 * x.size,
            bytes_accessed=8 * x.size + x.size // 8 + 4 * x.size // view.block,
            transcendentals=0,
        ),
        interpret=interpreter(impl),
    )(x)


def _encode_kernel(
    x_ref: Any,  # float32 [8, rows, columns]
    codes_ref: Any,  # int8 [rows, columns]: the bits of an unsigned byte
    scales_ref: Any,  # float32 [8, rows, blocks]: of whole rows, while the tiles go along them
    decoded_ref: Any,  # float32 [8, rows, columns]
    *,
    block: int,
    groups: int,
    scale: Scale,
) -> None:
    first = pl.program_id(1) * groups
    place = jax.lax.broadcasted_iota(jnp.int32, scales_ref.shape[1:], 1)
    for group in range(groups):
        columns = slice(group * block, (group + 1) * block)
        code = jnp.zeros((x_ref.shape[1], block), jnp.int32)
        for slab in range(_SLABS):
            x = x_ref[slab, :, columns]
            size = _mean_magnitude(x) if scale == "l1" else _root_mean_square(x)
            decoded_ref[slab, :, columns] = jnp.where(x >= 0, size, -size)
            scales_ref[slab] = jnp.where(place == first + group, size, scales_ref[slab])
            power = 1 << slab if slab < 7 else -128  # of a byte with a sign
            code += jnp.where(x >= 0, power, 0)
        codes_ref[:, columns] = code.astype(jnp.int8)


def _mean_magnitude(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(x), axis=1, keepdims=True) / x.shape[1]


def _root_mean_square(x: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    unit = x / jnp.where(largest == 0, 1.0, largest)
    return largest * jnp.sqrt(jnp.sum(jnp.square(unit), axis=1, keepdims=True) / x.shape[1])


def _mean(
    worker: jax.Array,
    bits: jax.Array,
    scales: jax.Array,
    *own: jax.Array,
    shape: tuple[int, ...],
    block: int,
    impl: str,
) -> jax.Array:
    """The kernel for TPUs."""
    view, workers = _View.of(shape, block), len(bits)
    codes = jax.lax.bitcast_convert_type(bits, jnp.int8).reshape(workers, *view.slabs[1:])
    operands = [jnp.reshape(worker, 1), codes, scales.reshape(workers, *view.scales)]
    operands += [x.reshape(view.slabs) for x in own]
    return _mean_view(alike_varying(*operands), view, impl).reshape(shape)


def _mean_view(operands: tuple[jax.Array, ...], view: _View, impl: str) -> jax.Array:
    rows, columns = view.tile
    workers, has_own = len(operands[1]), len(operands) == 4
    size = math.prod(view.slabs)
    entries = pl.BlockSpec((_SLABS, rows, columns), lambda i, j, worker: (0, i, j))
    body = functools.partial(
        _mean_kernel, block=view.block, groups=columns // view.block, workers=workers
    )
    return pl.pallas_call(
        body if has_own else without_own(body),
        name="sign_mean",
        grid=(*view.grid, workers),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((1, rows, columns), lambda i, j, worker: (worker, i, j)),
            pl.BlockSpec((1, _SLABS, rows, view.scales[2]), lambda i, j, worker: (worker, 0, i, 0)),
            *[entries] * has_own,
        ],
        out_specs=entries,
        out_shape=struct_like(view.slabs, jnp.float32, operands[1]),
        compiler_params=tpu_parameters(impl, "parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=3 * workers * size,
            bytes_accessed=workers * (size // 8 + 4 * size // view.block)
            + 4 * (1 + has_own) * size,
            transcendentals=0,
        ),
        interpret=interpreter(impl),
    )(*operands)


def _mean_kernel(
    owner_ref: Any,  # int32 [1]
    codes_ref: Any,  # int8 [1, rows, columns], of one worker
    scales_ref: Any,  # float32 [1, 8, rows, blocks], of whole rows
    own_ref: Any,  # float32 [8, rows, columns], or None
    out_ref: Any,  # float32 [8, rows, columns]: the sum, while the workers go by
    *,
    block: int,
    groups: int,
    workers: int,
) -> None:
    first, worker = pl.program_id(1) * groups, pl.program_id(2)
    place = jax.lax.broadcasted_iota(jnp.int32, scales_ref.shape[2:], 1)
    for group in range(groups):
        columns = slice(group * block, (group + 1) * block)
        code = codes_ref[0, :, columns].astype(jnp.int32)
        for slab in range(_SLABS):
            here = jnp.where(place == first + group, scales_ref[0, slab], 0.0)
            size = jnp.sum(here, axis=1, keepdims=True)  # one of these and zeros: exact
            decoded = jnp.where(code & (1 << slab) != 0, size, -size)
            if own_ref is not None:
                decoded = jnp.where(worker == owner_ref[0], own_ref[slab, :, columns], decoded)
            total = jnp.where(worker == 0, 0.0, out_ref[slab, :, columns]) + decoded
            out_ref[slab, :, columns] = jnp.where(worker == workers - 1, total / workers, total)


def _resolve(kernel: str, shape: tuple[int, ...], block: int, impl: Impl) -> str:
    core.check_int("block", block, low=1)
    chosen = resolve(kernel, impl)
    if chosen != "xla" and not signs_take(shape, block):
        raise ValueError(
            "the kernel takes a block that is a multiple of 128 up to 1024, and tensors of a "
            f"multiple of 8 blocks, got block={block} and shape {shape}"
        )
    return chosen
