"""The kernel of ``dct_top_k`` for NVIDIA GPUs, Hopper and later, through Mosaic GPU.

A program is one warpgroup with one chunk. The copy engine (TMA) brings it from the matrix as it
lies, with zeros beyond its edges, and takes back what is decoded:

* Tensor cores take float32 with 10 bits only, so products are sums of outer products, of a row of
  each factor, on the other cores. The first gives (D_a X)ᵀ, and the second from this D_a X D_bᵀ:
  no column is ever read. The matrices of cosines, which are the same for all programs, stay in
  global memory, and so in the cache that the programs of a multiprocessor share.
* The largest magnitude is found k times, and of those equal to it the first. Magnitudes of floats
  are ordered as their bits are.
* What was selected is decoded as k outer products, of a row of D_a and one of D_b, instead of two
  products with zeros in nearly all places.

A program with a chunk of 64 by 64 has 35 KiB of shared memory and 94 registers a thread, so that
five are on a multiprocessor. Of all that ``dct_top_k_takes`` only chunks of 120 or 128 by 128 do
not fit into the registers, and spill about 100 bytes a thread.
"""

import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxopt_suite import core
from jaxopt_suite.kernels.rows_gpu import PARAMETERS, padded

_THREADS = 128  # of a warpgroup: four warps of 32
_QUAD = 4  # entries: the copy engine wants rows of a multiple of 16 bytes
_TALL = 16  # rows of a tile in registers: of its chunk, filled up to a multiple
_UNROLLED = 4  # outer products: so many rows are on their way from memory at a time
_TAKEN = -1  # below the bits of every magnitude

# JAX 0.10.2 wants an index beside the reference, and 0.12 takes none.
_WHOLE = (...,) if "idx" in inspect.signature(plgpu.load).parameters else ()


def top_k(
    x: jax.Array,
    of_rows: np.ndarray,
    of_columns: np.ndarray,
    *,
    k: int,
    values: str,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Values and indices of every chunk, and what is decoded, of ``kernels.dct_top_k``.

    A chunk's coefficients are in the order of their magnitudes. Columns that are no multiple of 4
    are padded with zeros, which copies x.

    Args:
      x: float32 ``[matrices, rows, columns]``, with entries.
      of_rows: float32 ``[a, a]``, orthonormal: D_a. The sides must be what ``dct_top_k_takes``.
      of_columns: float32 ``[b, b]``, orthonormal: D_b.
      k: coefficients of a chunk.
      values: dtype that coefficients are rounded to.
      interpret: as of ``plgpu.kernel``.

    Returns:
      float32 ``[chunks, k]``, int32 ``[chunks, k]``, and float32 of the shape of x.
    """
    (a, b), (matrices, rows, columns) = (len(of_rows), len(of_columns)), x.shape
    down, across, tall = -(-rows // a), -(-columns // b), a + -a % _TALL
    chunks, entries = matrices * down * across, padded(x, _QUAD)
    cosines = [jnp.asarray(y) for y in (of_rows.T, of_rows, of_columns.T, of_columns)]
    found = plgpu.kernel(
        functools.partial(_chunk, grid=(down, across), values=values),
        out_type=[
            jax.ShapeDtypeStruct((chunks, k), jnp.float32),
            jax.ShapeDtypeStruct((chunks, k), jnp.int32),
            jax.ShapeDtypeStruct(entries.shape, jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((tall, b), jnp.float32),
            plgpu.SMEM((b, tall), jnp.float32),
            plgpu.SMEM((k,), jnp.int32),
            plgpu.Barrier(),
        ],
        grid=(chunks,),  # in one dimension, as others of a GPU's grids end at 65535
        grid_names=("chunk",),
        kernel_name="dct_top_k",
        compiler_params=PARAMETERS,
        interpret=interpret,
    )(entries, *(padded(y, tall) for y in cosines[:2]), *cosines[2:])
    coefficients, indices, decoded = found
    return core.vary((coefficients, indices, decoded[..., :columns]), core.varying_axes(x))


def _chunk(
    x_ref: Any,  # float32 [matrices, rows, columns]
    down_ref: Any,  # float32 [a, tall]: D_aᵀ, filled up with columns of zeros
    rows_ref: Any,  # float32 [a, tall]: D_a, likewise
    across_ref: Any,  # float32 [b, b]: D_bᵀ
    columns_ref: Any,  # float32 [b, b]: D_b
    values_ref: Any,  # float32 [chunks, k]
    indices_ref: Any,  # int32 [chunks, k]
    decoded_ref: Any,  # float32 [matrices, rows, columns]
    tile: Any,  # float32 [tall, b], in shared memory: entries, coefficients, what is decoded
    half: Any,  # float32 [b, tall], likewise: transformed along the columns, transposed
    places: Any,  # int32 [k], likewise
    loaded: Any,
    *,
    grid: tuple[int, int],  # chunks of a matrix: down and across
    values: str,
) -> None:
    a, b, layout = down_ref.shape[0], across_ref.shape[0], _layout(*tile.shape)
    chunk, (down, across) = jax.lax.axis_index("chunk"), grid
    i, j = chunk // across % down, chunk % across
    here = chunk // (down * across), pl.ds(i * a, a), pl.ds(j * b, b)
    plgpu.copy_gmem_to_smem(x_ref.at[here], tile.at[pl.ds(0, a)], loaded)
    plgpu.barrier_wait(loaded)
    half[...] = _product(tile, down_ref, a)
    tile[...] = _product(half, across_ref, b)
    _select(tile[...], a * b, places)

    def send(s: jax.Array, decoded: jax.Array) -> jax.Array:
        place = places[s]
        row, column = place // b, place % b
        value = tile[row, column].astype(values).astype(jnp.float32)
        values_ref[chunk, s], indices_ref[chunk, s] = value, place
        # Whatever is multiplied by NaN is NaN; infinities of two signs need not meet.
        value = jnp.where(jnp.abs(value) < jnp.inf, value, jnp.nan)
        left = value * _row(rows_ref, row, layout.reduce(1))
        return decoded + _outer(left, _row(columns_ref, column, layout.reduce(0)), layout)

    tile[...] = jax.lax.fori_loop(0, places.shape[0], send, _zeros(tile.shape, layout))
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, a)], decoded_ref.at[here])
    plgpu.wait_smem_to_gmem(0)


def _select(coefficients: jax.Array, size: int, places: Any) -> None:
    """Where the largest magnitudes are among the first ``size`` entries, from the largest down."""
    rows, columns = shape = coefficients.shape
    vector = 1 if math.prod(shape) % (2 * _THREADS) else 2
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=vector)  # as it is loaded
    iota = functools.partial(plgpu.broadcasted_iota, jnp.int32, shape, layout=layout)
    position = iota(0) * columns + iota(1)
    order = jax.lax.bitcast_convert_type(jnp.abs(coefficients), jnp.int32)
    if size < rows * columns:
        order = jnp.where(position < size, order, _TAKEN)

    def take(s: jax.Array, order: jax.Array) -> jax.Array:
        place = jnp.min(jnp.where(order == jnp.max(order), position, size))
        places[s] = place
        return jnp.where(position != place, order, _TAKEN)

    jax.lax.fori_loop(0, places.shape[0], take, order)


def _product(left: Any, right: Any, count: int) -> jax.Array:
    """leftᵀ right of the first ``count`` rows of both."""
    shape = left.shape[1], right.shape[1]
    layout = _layout(*shape)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        rows = _row(left, i, layout.reduce(1)), _row(right, i, layout.reduce(0))
        return total + _outer(*rows, layout)

    return jax.lax.fori_loop(0, count, add, _zeros(shape, layout), unroll=_UNROLLED)


def _outer(left: jax.Array, right: jax.Array, layout: Any) -> jax.Array:
    shape = left.shape + right.shape

    def spread(entries: jax.Array, axis: int) -> jax.Array:
        return plgpu.layout_cast(jax.lax.broadcast_in_dim(entries, shape, (axis,)), layout)

    return spread(left, 0) * spread(right, 1)


def _row(matrix: Any, i: jax.Array, layout: Any) -> jax.Array:
    # Not "optimized" is a load from global memory, and one where lanes read the same.
    return plgpu.load(matrix.at[i], *_WHOLE, layout=layout, optimized=False)


def _zeros(shape: tuple[int, ...], layout: Any) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _layout(rows: int, columns: int) -> Any:
    """Of a matrix of a multiple of 16 by one of 8, or the other way round, in registers.

    A thread has entries of some rows and some columns, so that an outer product needs few of both
    factors: of 64 by 64, 4 rows and twice 4 columns.
    """
    lanes = 8 if rows % 16 == 0 else 16  # along a row
    vector = next(n for n in (4, 2, 1) if columns % (lanes * n) == 0)
    wide = lanes * vector
    return plgpu.Layout.TILED(
        plgpu.Tiling(((_THREADS // lanes, wide), (32 // lanes, wide), (vector,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )
