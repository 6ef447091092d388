"""The kernel of ``adam8_update`` for NVIDIA GPUs, Hopper and later, through Mosaic GPU.

A program is one warpgroup with one tile of ``rows_gpu``, 32 blocks of rows one below the other. The
copy engine (TMA) brings gradient, codes and scales to shared memory; what replaces them is written
over them there, and taken back. In registers are four blocks at a time, one a warp: two moments,
their gradient and what is found of them would not fit for all 32.

Rows that are whole blocks are a matrix of blocks as they lie, and so are the scales. Where a row
ends inside a block, the copy engine goes down the columns of the leaf as it lies, and drops what is
beyond the end; scales are then transposed, of which there are few. It can do that if rows begin at
multiples of 16 bytes. Other leaves are for the definition: to pad them copies them there and back,
which with the kernel's own pass moves more bytes than XLA's four passes, and takes more memory.

Nothing is written over in global memory: ``plgpu.kernel`` takes no references on JAX 0.10.2, nor on
0.12 inside ``shard_map``. Of donated arguments XLA copies the results to their places.

A program with blocks of 256 and a float32 gradient has 52 KiB of shared memory. A float32 division
is ``div.full.f32``, off by 2 units in the last place at most, and a root takes ``rsqrt.approx.f32``
and a product: on hardware the results are the definition's but for the last bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxopt_suite import core
from jaxopt_suite.kernels import adam8_tile, dynamic8
from jaxopt_suite.kernels.rows_gpu import LAYOUT, PARAMETERS, ROWS, WHOLE, padded, spread

_DTYPES = ("float32", "bfloat16", "float16")  # of a gradient
_ALIGNED = 16  # codes: where there are rows of them the copy engine wants 16 bytes
_AT_ONCE = 4  # rows of a tile that are in registers


def fits(gradient: jax.Array, block: int) -> bool:
    """Whether the kernel takes a leaf ``[rows, columns]``."""
    columns = gradient.shape[1]
    lies_well = columns % block == 0 or columns % _ALIGNED == 0
    return lies_well and gradient.dtype.name in _DTYPES


def update(
    numbers: jax.Array,
    gradient: jax.Array,
    mu: jax.Array,
    mu_scales: jax.Array,
    nu: jax.Array,
    nu_scales: jax.Array,
    *,
    block: int,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Direction and new moments of ``kernels.adam8_update``, in the order they are given.

    Args:
      numbers: of the step, float32 ``[7]``.
      gradient: ``[rows, columns]`` that ``fits``.
      mu: codes of the first moment, uint8 ``[rows, columns]``.
      mu_scales: float32 ``[blocks, rows]``.
      nu: codes of the second moment, uint8 ``[rows, columns]``.
      nu_scales: float32 ``[blocks, rows]``.
      block: one of ``GPU_BLOCKS``, at most columns.
      interpret: as of ``plgpu.kernel``.
    """
    (rows, columns), whole = gradient.shape, gradient.shape[1] % block == 0
    as_entries = lambda x: x.reshape(-1, block) if whole else x
    as_scales = lambda x: padded(x.T.reshape(1, -1) if whole else x, WHOLE)
    g, mu, nu = map(as_entries, (gradient, mu, nu))
    operands = g, mu, as_scales(mu_scales), nu, as_scales(nu_scales)
    height, width = g.shape
    tile = ROWS, block
    direction, mu, mu_scales, nu, nu_scales = plgpu.kernel(
        functools.partial(_update_tile, columns=width),
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands],
        scratch_types=[
            plgpu.SMEM(tile, gradient.dtype),
            *[plgpu.SMEM(tile, jnp.uint8), plgpu.SMEM(tile[:1], jnp.float32)] * 2,
            plgpu.Barrier(num_arrivals=len(operands)),
        ],
        grid=(-(-width // block), -(-height // ROWS)),
        grid_names=("group", "tile"),
        kernel_name="adam8_update",
        compiler_params=PARAMETERS,
        interpret=interpret,
    )(numbers, *operands)
    of_entries = lambda x: x.reshape(rows, columns)
    of_scales = lambda x: x[:, :height].reshape(rows, -1).T if whole else x[:, :height]
    direction, mu, nu = map(of_entries, (direction, mu, nu))
    found = direction, mu, of_scales(mu_scales), nu, of_scales(nu_scales)
    return core.vary(found, core.varying_axes(gradient))


def _update_tile(
    numbers_ref: Any,  # float32 [7]
    # Gradient [rows, columns], and of both moments codes uint8, likewise, and scales float32
    # [blocks, rows]; as many new ones, with the direction for the gradient; a tile of each in
    # shared memory, [tile rows, block] and [tile rows]; and a barrier.
    *refs: Any,
    columns: int,
) -> None:
    old, new, tiles, loaded = refs[:5], refs[5:10], refs[10:15], refs[15]
    count, block = tiles[0].shape
    group = jax.lax.axis_index("group")
    rows = pl.ds(jax.lax.axis_index("tile") * count, count)
    entries, scales = (rows, pl.ds(group * block, block)), (group, rows)
    places = entries, entries, scales, entries, scales
    for ref, place, tile in zip(old, places, tiles, strict=True):
        plgpu.copy_gmem_to_smem(ref.at[place], tile, loaded)
    numbers = [numbers_ref[i] for i in range(7)]  # on their way with the tiles
    plgpu.barrier_wait(loaded)
    width = columns - group * block if columns % block else block

    def step(i: jax.Array, _: None) -> None:
        _update_rows(pl.ds(i * _AT_ONCE, _AT_ONCE), numbers, tiles, width)

    jax.lax.fori_loop(0, count // _AT_ONCE, step, None)
    plgpu.commit_smem()
    for ref, place, tile in zip(new, places, tiles, strict=True):
        plgpu.copy_smem_to_gmem(tile, ref.at[place])
    plgpu.wait_smem_to_gmem(0)


def _update_rows(rows: Any, numbers: list[Any], tiles: tuple[Any, ...], width: Any) -> None:
    """Replaces some rows of the tiles, of which the leaf has that many columns or more."""
    g_tile, *of_moments = tiles
    shape = _AT_ONCE, g_tile.shape[1]
    books = dynamic8.code_book(True), dynamic8.code_book(False)
    moments = list(zip(books, of_moments[::2], of_moments[1::2], strict=True))

    def decoded(book: dynamic8.CodeBook, codes: Any, scales: Any) -> jax.Array:
        scale = plgpu.layout_cast(scales[rows], LAYOUT.reduce(1))
        codes = plgpu.layout_cast(codes[rows], LAYOUT)
        return adam8_tile.entries(codes, book) * spread(scale, shape)

    g = plgpu.layout_cast(g_tile[rows], LAYOUT).astype(jnp.float32)
    mu, nu = (decoded(*moment) for moment in moments)
    inside = None
    if not isinstance(width, int):  # beyond are codes 0, and that is not the code of 0
        inside = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=LAYOUT) < width
    mu, nu, direction = adam8_tile.moved(g, mu, nu, numbers, inside, _root)
    g_tile[rows] = direction.astype(g_tile.dtype)
    for x, (book, codes, scales) in zip((mu, nu), moments, strict=True):
        scale = adam8_tile.scale(jnp.max(jnp.abs(x), axis=1))
        codes[rows] = adam8_tile.nearest(x, spread(adam8_tile.divisor(scale), shape), book)
        scales[rows] = scale


def _root(x: jax.Array) -> jax.Array:
    """The square root of numbers that are not negative; Mosaic GPU of JAX 0.10.2 has none."""
    return jnp.where((x > 0) & (x < jnp.inf), x * jax.lax.rsqrt(x), x)
