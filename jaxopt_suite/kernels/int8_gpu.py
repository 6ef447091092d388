"""The kernels of ``int8`` for NVIDIA GPUs, Hopper and later, through Mosaic GPU.

A program is one warpgroup with one tile of ``rows_gpu``, 32 blocks. The copy engine (TMA) brings it
to shared memory and takes the results back.

With blocks of 256 a program has 41 KiB of shared memory to encode and 65 KiB to average: several
are on a multiprocessor, and while one waits for its tile the others compute. A tensor that does not
end with a block is padded with zeros, which copies it.

A float32 division is ``div.full.f32``, off by 2 units in the last place at most, as it is in XLA's
own programs for these GPUs; and without ``own`` a product of ``mean`` is not rounded before it is
added. On hardware the results are therefore the definition's but for the last bits.
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
from jaxopt_suite.kernels.rows_gpu import LAYOUT, PARAMETERS, ROWS, WHOLE, padded, spread

_LEVELS = 127.0
_STAGES = 4  # of the messages of the workers, so many are on their way at a time


def encode(x: jax.Array, *, block: int, interpret: Any = None) -> tuple[jax.Array, ...]:
    """Codes, scales and decoded message of ``kernels.int8_encode``.

    Args:
      x: float32, any shape with entries.
      block: one of ``GPU_BLOCKS``.
      interpret: as of ``plgpu.kernel``.
    """
    rows, tile = -(-x.size // block), (ROWS, block)
    matrix = padded(x.reshape(-1), block).reshape(rows, block)
    codes, scales, decoded = plgpu.kernel(
        _encode_tile,
        out_type=[
            jax.ShapeDtypeStruct((rows, block), jnp.int8),
            jax.ShapeDtypeStruct((rows + -rows % WHOLE,), jnp.float32),
            jax.ShapeDtypeStruct((rows, block), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM(tile, jnp.float32),
            plgpu.SMEM(tile, jnp.int8),
            plgpu.SMEM(tile[:1], jnp.float32),
            plgpu.Barrier(),
        ],
        grid=(-(-rows // tile[0]),),
        grid_names=("tile",),
        kernel_name="int8_encode",
        compiler_params=PARAMETERS,
        interpret=interpret,
    )(matrix)
    flat = lambda blocks: blocks.reshape(-1)[: x.size]
    return core.vary(
        (flat(codes), scales[:rows], flat(decoded).reshape(x.shape)), core.varying_axes(x)
    )


def _encode_tile(
    x_ref: Any,  # float32 [rows, block]
    codes_ref: Any,  # int8, likewise
    scales_ref: Any,  # float32 [rows]
    decoded_ref: Any,  # float32 [rows, block]
    x_tile: Any,  # float32 [tile rows, block], in shared memory; at last the decoded message
    codes_tile: Any,  # int8, likewise
    scales_tile: Any,  # float32 [tile rows]
    loaded: Any,
) -> None:
    count = x_tile.shape[0]
    rows = pl.ds(jax.lax.axis_index("tile") * count, count)
    plgpu.copy_gmem_to_smem(x_ref.at[rows], x_tile, loaded)
    plgpu.barrier_wait(loaded)
    x = plgpu.layout_cast(x_tile[...], LAYOUT)
    code, scale, decoded = _encoded(x)
    codes_tile[...] = code.astype(jnp.int32).astype(jnp.int8)
    scales_tile[...] = scale
    x_tile[...] = decoded
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(codes_tile, codes_ref.at[rows])
    plgpu.copy_smem_to_gmem(scales_tile, scales_ref.at[rows])
    plgpu.copy_smem_to_gmem(x_tile, decoded_ref.at[rows])
    plgpu.wait_smem_to_gmem(0)


def _encoded(x: jax.Array) -> tuple[jax.Array, ...]:
    """Codes float32, scales, and decoded message of a block in each row."""
    magnitude = jnp.abs(x)
    # A maximum need not be NaN where an entry is.
    largest = jnp.max(jnp.where(magnitude < jnp.inf, magnitude, jnp.inf), axis=1)
    scale = jnp.where(largest < jnp.inf, jnp.where(largest == 0, 1.0, largest), jnp.nan)
    code = jnp.round(x / spread(scale, x.shape) * _LEVELS)
    return code, scale, code * spread(scale / _LEVELS, x.shape)


def mean(
    worker: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *own: jax.Array,
    shape: tuple[int, ...],
    block: int,
    interpret: Any = None,
) -> jax.Array:
    """The mean of ``kernels.int8_mean``.

    Args:
      worker: int32 ``[]``, whose message ``own`` is.
      codes: int8 ``[workers, n]``.
      scales: float32 ``[workers, ceil(n / block)]``.
      *own: none, or one message float32 of the given shape.
      shape: of a message.
      block: one of ``GPU_BLOCKS``.
      interpret: as of ``plgpu.kernel``.
    """
    workers, size = len(codes), math.prod(shape)
    rows, tile = -(-size // block), (ROWS, block)
    body = functools.partial(_mean_tile, workers=workers)
    mean = plgpu.kernel(
        body if own else without_own(body),
        out_type=jax.ShapeDtypeStruct((rows, block), jnp.float32),
        scratch_types=[plgpu.SMEM(tile, jnp.float32), plgpu.Barrier()],
        grid=(-(-rows // tile[0]),),
        grid_names=("tile",),
        kernel_name="int8_mean",
        compiler_params=PARAMETERS,
        interpret=interpret,
    )(
        worker.reshape(1),
        padded(codes, block).reshape(workers, rows, block),
        padded(scales, WHOLE),
        *(padded(x.reshape(-1), block).reshape(rows, block) for x in own),
    )
    return vary_as(mean.reshape(-1)[:size].reshape(shape), worker, codes, scales, *own)


def _mean_tile(
    owner_ref: Any,  # int32 [1]
    codes_ref: Any,  # int8 [workers, rows, block]
    scales_ref: Any,  # float32 [workers, rows or up to three more]
    own_ref: Any,  # float32 [rows, block], or None
    out_ref: Any,  # float32 [rows, block]
    tile: Any,  # float32 [tile rows, block], in shared memory: own, at last the mean
    loaded: Any,
    *,
    workers: int,
) -> None:
    place, count = jax.lax.axis_index("tile"), tile.shape[0]
    rows = pl.ds(place * count, count)
    owner = owner_ref[0]
    if own_ref is not None:
        plgpu.copy_gmem_to_smem(own_ref.at[rows], tile, loaded)
        plgpu.barrier_wait(loaded)

    def decoded(codes: Any, scales: Any) -> jax.Array:
        each = plgpu.layout_cast(scales[0], LAYOUT.reduce(1)) / _LEVELS
        return plgpu.layout_cast(codes[0], LAYOUT).astype(jnp.float32) * spread(each, tile.shape)

    def add(step: tuple[jax.Array], codes: Any, scales: Any, total: jax.Array) -> jax.Array:
        message = lambda: decoded(codes, scales)
        if own_ref is None:
            return total + message()
        own = lambda: plgpu.layout_cast(tile[...], LAYOUT)  # in registers it would cost 64 more
        return total + jax.lax.cond(step[0] == owner, own, message)

    total = plgpu.emit_pipeline(
        add,
        grid=(workers,),
        in_specs=[
            plgpu.BlockSpec((1, *tile.shape), lambda worker: (worker, place, 0)),
            plgpu.BlockSpec((1, count), lambda worker: (worker, place)),
        ],
        max_concurrent_steps=min(workers, _STAGES),
        init_carry=plgpu.layout_cast(jnp.zeros(tile.shape, jnp.float32), LAYOUT),
    )(codes_ref, scales_ref)
    tile[...] = total / workers
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, out_ref.at[rows])
    plgpu.wait_smem_to_gmem(0)
