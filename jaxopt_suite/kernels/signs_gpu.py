"""The kernels of ``signs`` for NVIDIA GPUs, Hopper and later, through Mosaic GPU.

The flat tensor is eight slabs of rows, a block in each row. A program is one warpgroup with the
same few rows of all slabs, 1024 entries of each: a byte's eight entries are then eight registers of
a thread. The copy engine (TMA) brings them to shared memory in one piece and takes the results
back; beyond the last row of a slab it reads zeros and writes nothing.

A program has 36 KiB of shared memory to encode and 37 KiB to average: several are on a
multiprocessor, and while one waits for its tile the others compute.

A float32 division is ``div.full.f32``, off by 2 units in the last place at most, as it is in XLA's
own programs for these GPUs. Sums are taken in another order than there. A worker's decoded message
is added as it is: nothing is multiplied.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxopt_suite import core
from jaxopt_suite.kernels.implementations import vary_as, without_own
from jaxopt_suite.kernels.rows_gpu import LAYOUT, PARAMETERS, WHOLE, padded, spread
from jaxopt_suite.kernels.signs import Scale

_SLABS = 8
# Of a slab in a tile: the sums of a mean are then 64 registers of a thread, and the scales 128
# bytes or more, the least that Mosaic of JAX 0.10.2 copies.
_ENTRIES = 1024
_STAGES = 4  # of the messages of the workers, so many are on their way at a time


def encode(
    x: jax.Array, *, block: int, scale: Scale, interpret: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bits, scales and decoded message of ``kernels.sign_encode``.

    Args:
      x: float32, any shape of a multiple of 8 blocks.
      block: one of ``GPU_BLOCKS``.
      scale: ``"l1"`` or ``"l2"``.
      interpret: as of ``plgpu.kernel``.
    """
    rows, tile = x.size // (_SLABS * block), _tile(block)
    codes, scales, decoded = plgpu.kernel(
        functools.partial(_encode_tile, scale=scale),
        out_type=[
            jax.ShapeDtypeStruct((rows, block), jnp.int8),
            jax.ShapeDtypeStruct((_SLABS, rows + -rows % WHOLE), jnp.float32),
            jax.ShapeDtypeStruct((_SLABS, rows, block), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM(tile, jnp.float32),
            plgpu.SMEM(tile[1:], jnp.int8),
            plgpu.SMEM(tile[:2], jnp.float32),
            plgpu.Barrier(),
        ],
        grid=(-(-rows // tile[1]),),
        grid_names=("tile",),
        kernel_name="sign_encode",
        compiler_params=PARAMETERS,
        interpret=interpret,
    )(x.reshape(_SLABS, rows, block))
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    return core.vary(
        (bits.reshape(-1), scales[:, :rows].reshape(-1), decoded.reshape(x.shape)),
        core.varying_axes(x),
    )


def _tile(block: int) -> tuple[int, int, int]:
    return _SLABS, _ENTRIES // block, block


def _encode_tile(
    x_ref: Any,  # float32 [8, rows, block]
    codes_ref: Any,  # int8 [rows, block]: the bits of an unsigned byte
    scales_ref: Any,  # float32 [8, rows or up to three more]
    decoded_ref: Any,  # float32 [8, rows, block]
    x_tile: Any,  # float32 [8, tile rows, block], in shared memory; at last the decoded message
    codes_tile: Any,  # int8 [tile rows, block]
    scales_tile: Any,  # float32 [8, tile rows]
    loaded: Any,
    *,
    scale: Scale,
) -> None:
    count = x_tile.shape[1]
    rows = pl.ds(jax.lax.axis_index("tile") * count, count)
    plgpu.copy_gmem_to_smem(x_ref.at[:, rows], x_tile, loaded)
    plgpu.barrier_wait(loaded)
    code = plgpu.layout_cast(jnp.zeros(codes_tile.shape, jnp.int32), LAYOUT)
    for slab in range(_SLABS):
        positive, size = _encoded(plgpu.layout_cast(x_tile[slab], LAYOUT), scale)
        power = 1 << slab if slab < 7 else -128  # of a byte with a sign
        code += jnp.where(positive, power, 0)
        scales_tile[slab] = size
        x_tile[slab] = _decoded(positive, size)
    codes_tile[...] = code.astype(jnp.int8)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(codes_tile, codes_ref.at[rows])
    plgpu.copy_smem_to_gmem(scales_tile, scales_ref.at[:, rows])
    plgpu.copy_smem_to_gmem(x_tile, decoded_ref.at[:, rows])
    plgpu.wait_smem_to_gmem(0)


def _encoded(x: jax.Array, scale: Scale) -> tuple[jax.Array, jax.Array]:
    """Bits, and scales, of a block in each row."""
    magnitude = jnp.abs(x)
    if scale == "l1":
        return x >= 0, jnp.sum(magnitude, axis=1) / x.shape[1]
    largest = jnp.max(magnitude, axis=1)
    unit = x / spread(largest, x.shape)  # of a block of zeros it is NaN, and so is the mean
    mean = jnp.sum(unit * unit, axis=1) / x.shape[1]
    return x >= 0, largest * _root(jnp.where(largest == 0, 1.0, mean))


def _root(x: jax.Array) -> jax.Array:
    """Square roots of positive numbers, and NaN of NaN.

    The lowering of JAX 0.10.2 has their inverses only. One step of Newton's makes up for these,
    which are off by two units in the last place.
    """
    inverse = jax.lax.rsqrt(x)
    root = x * inverse
    return root + (x - root * root) * (0.5 * inverse)


def _decoded(positive: jax.Array, size: jax.Array) -> jax.Array:
    """What a bit stands for, of blocks of the given scales in each row."""
    each = spread(size, positive.shape)
    return jnp.where(positive, each, -each)


def mean(
    worker: jax.Array,
    bits: jax.Array,
    scales: jax.Array,
    *own: jax.Array,
    shape: tuple[int, ...],
    block: int,
    interpret: Any = None,
) -> jax.Array:
    """The mean of ``kernels.sign_mean``.

    Args:
      worker: int32 ``[]``, whose message ``own`` is.
      bits: uint8 ``[workers, n / 8]``.
      scales: float32 ``[workers, n / block]``.
      *own: none, or one message float32 of the given shape.
      shape: of a message, n entries, a multiple of 8 blocks.
      block: one of ``GPU_BLOCKS``.
      interpret: as of ``plgpu.kernel``.
    """
    workers, rows, tile = len(bits), math.prod(shape) // (_SLABS * block), _tile(block)
    body = functools.partial(_mean_tile, workers=workers)
    mean = plgpu.kernel(
        body if own else without_own(body),
        out_type=jax.ShapeDtypeStruct((_SLABS, rows, block), jnp.float32),
        scratch_types=[plgpu.SMEM(tile, jnp.float32), plgpu.Barrier()],
        grid=(-(-rows // tile[1]),),
        grid_names=("tile",),
        kernel_name="sign_mean",
        compiler_params=PARAMETERS,
        interpret=interpret,
    )(
        worker.reshape(1),
        jax.lax.bitcast_convert_type(bits, jnp.int8).reshape(workers, rows, block),
        padded(scales.reshape(workers, _SLABS, rows), WHOLE),
        *(x.reshape(_SLABS, rows, block) for x in own),
    )
    return vary_as(mean.reshape(shape), worker, bits, scales, *own)


def _mean_tile(
    owner_ref: Any,  # int32 [1]
    codes_ref: Any,  # int8 [workers, rows, block]
    scales_ref: Any,  # float32 [workers, 8, rows or up to three more]
    own_ref: Any,  # float32 [8, rows, block], or None
    out_ref: Any,  # float32 [8, rows, block]
    tile: Any,  # float32 [8, tile rows, block], in shared memory: own, at last the mean
    loaded: Any,
    *,
    workers: int,
) -> None:
    place, (_, count, block) = jax.lax.axis_index("tile"), tile.shape
    rows = pl.ds(place * count, count)
    owner = owner_ref[0]
    if own_ref is not None:
        plgpu.copy_gmem_to_smem(own_ref.at[:, rows], tile, loaded)
        plgpu.barrier_wait(loaded)

    def add(step: tuple[jax.Array], codes: Any, scales: Any, totals: Any) -> list[jax.Array]:
        def messages() -> list[jax.Array]:
            code = plgpu.layout_cast(codes[0], LAYOUT).astype(jnp.int32)
            sizes = [plgpu.layout_cast(scales[0, i], LAYOUT.reduce(1)) for i in range(_SLABS)]
            sums = zip(totals, sizes, strict=True)
            return [t + _decoded(code & (1 << i) != 0, size) for i, (t, size) in enumerate(sums)]

        def own() -> list[jax.Array]:
            return [t + plgpu.layout_cast(tile[i], LAYOUT) for i, t in enumerate(totals)]

        return messages() if own_ref is None else jax.lax.cond(step[0] == owner, own, messages)

    zeros = plgpu.layout_cast(jnp.zeros((count, block), jnp.float32), LAYOUT)
    totals = plgpu.emit_pipeline(
        add,
        grid=(workers,),
        in_specs=[
            plgpu.BlockSpec((1, count, block), lambda worker: (worker, place, 0)),
            plgpu.BlockSpec((1, _SLABS, count), lambda worker: (worker, 0, place)),
        ],
        max_concurrent_steps=min(workers, _STAGES),
        init_carry=[zeros] * _SLABS,
    )(codes_ref, scales_ref)
    for slab, total in enumerate(totals):
        tile[slab] = total / workers
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, out_ref.at[:, rows])
    plgpu.wait_smem_to_gmem(0)
