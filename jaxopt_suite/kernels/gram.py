"""Running means of Gram matrices: their definition, and a TPU kernel that computes one triangle."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxopt_suite import core
from jaxopt_suite.kernels.implementations import (
    Impl,
    alike_varying,
    by_kernel,
    interpreter,
    resolve,
    struct_like,
    tpu_parameters,
)

_MODES = "abcdefghijklmnopqrstuvw"
# Rows and columns of a tile of the statistic. A smaller tile computes less above the diagonal and
# loads the blocks more often: for one pass of bfloat16, not six, the loads would take longer.
_TILES = {"float32": 256, "bfloat16": 512}
_DEPTH = 1024  # entries that a tile's products are summed over at a time


def gram_update(
    statistics: jax.Array,
    blocks: jax.Array,
    decay: jax.typing.ArrayLike,
    weight: jax.typing.ArrayLike,
    *,
    mode: int = 0,
    impl: Impl = "auto",
) -> jax.Array:
    r"""Statistics with the Gram matrices of one mode of new blocks.

    For each block $G$ of a stack, with $G_i$ its unfolding along mode $i$, a matrix of as many rows
    as the block has entries along that mode (for matrices $G_1 = G$ and $G_2 = G^T$),

    $$L \leftarrow \beta L + w\, G_i G_i^T.$$

    **The kernel**, for TPUs, computes the tiles on and below the diagonal and writes each of the
    others as the transpose of one: of T² tiles T(T+1)/2. A tile is 256 by 256, for bfloat16 blocks
    512 by 512, so that of 1024 rows it is ten of sixteen, or three of four.
    It reads the same tiles of L and writes over L where that is donated, as a train step's state
    is. What it gives is symmetric to the last bit. Time on hardware: unmeasured. What the compiler
    says of it: ``docs/guides/kernels.md``.

    Sums and products are in float32; those of float32 blocks with
    ``Precision.HIGHEST``, as ``optimizers.roots.products`` says why. Those of bfloat16 blocks are
    exact and cost a sixth of it.

    Args:
      statistics: L, float32 or bfloat16 ``[k, d_i, d_i]``; the definition takes float64 too. The
        kernel takes them to be symmetric.
      blocks: G, ``[k, d_1, ..., d_p]``, p at least 1.
      decay: β, a number or float32 ``[]``.
      weight: w, likewise. With a decay of 1 a weight of 0 leaves L as it is.
      mode: i, counted from 0.
      impl: see ``kernels.resolve``.

    Returns:
      As ``statistics``.

    Raises:
      ValueError, TypeError: for shapes that do not fit, or dtypes that the kernel does not take.
      NotImplementedError: see ``kernels.resolve``.
    """
    _check(statistics, blocks, mode)
    chosen = resolve("gram_update", impl)
    if chosen == "xla":
        return gram_update_definition(statistics, blocks, decay, weight, mode)
    _check_dtypes(statistics, blocks)
    scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in (decay, weight)])
    matrices, contracted = _unfolded(blocks, mode)
    operands = alike_varying(statistics, matrices, scalars)
    kernel = functools.partial(_call, contracted=contracted, impl=chosen)
    return by_kernel("gram_update", kernel, chosen, *operands)


def gram_update_definition(
    statistics: jax.Array,
    blocks: jax.Array,
    decay: jax.typing.ArrayLike,
    weight: jax.typing.ArrayLike,
    mode: int,
) -> jax.Array:
    """What ``gram_update`` means, in plain JAX."""
    names = _MODES[: blocks.ndim - 1]
    other = names.replace(names[mode], "z")
    gram = jnp.einsum(
        f"y{names},y{other}->y{names[mode]}z",
        blocks,
        blocks,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(blocks.dtype, jnp.float32),
    )
    kept = jnp.asarray(decay, gram.dtype) * statistics.astype(gram.dtype)
    return (kept + jnp.asarray(weight, gram.dtype) * gram).astype(statistics.dtype)


class _Plan(NamedTuple):
    """How a stack of products is cut."""

    tile: int  # rows of a tile of the statistic, and columns
    depth: int  # entries summed over in one step
    steps: int  # how many of these; one more writes the transpose
    rows: np.ndarray  # int32 [pairs]: of each tile on or below the diagonal, its row of tiles
    columns: np.ndarray  # int32 [pairs]: and its column

    @classmethod
    def of(cls, size: int, length: int, dtype: Any) -> "_Plan":
        tile, depth = min(size, _TILES[dtype.name]), min(length, _DEPTH)
        rows, columns = np.tril_indices(-(-size // tile))
        steps = -(-length // depth)
        return cls(tile, depth, steps, rows.astype(np.int32), columns.astype(np.int32))

    def cost(self, statistics: jax.Array, blocks: jax.Array, length: int) -> pl.CostEstimate:
        """What the kernel computes and moves; a tile of G that is used again at once is kept."""
        k, size = statistics.shape[:2]
        pairs, band = len(self.rows), self.tile * length
        left = -(-size // self.tile) if self.steps == 1 else pairs
        read = (left + pairs) * band * blocks.dtype.itemsize
        moved = (pairs * self.tile**2 + size**2) * statistics.dtype.itemsize
        return pl.CostEstimate(
            flops=2 * k * pairs * self.tile**2 * length,
            bytes_accessed=k * (read + moved),
            transcendentals=0,
        )


def _call(
    statistics: jax.Array, blocks: jax.Array, scalars: jax.Array, contracted: int, impl: str
) -> jax.Array:
    """The kernel on matrices ``[k, d, n]`` if ``contracted`` is 2, ``[k, n, d]`` if it is 1."""
    length = blocks.shape[contracted]
    plan = _Plan.of(statistics.shape[1], length, blocks.dtype)
    last = plan.steps - 1

    def band(which: int) -> pl.BlockSpec:
        """Tiles of G along the statistic's rows (0) or columns (1)."""

        def index(k: Any, pair: Any, step: Any, *tables: Any) -> tuple[Any, ...]:
            along, deep = tables[which][pair], jnp.minimum(step, last)
            return (k, along, deep) if contracted == 2 else (k, deep, along)

        shape = (plan.tile, plan.depth) if contracted == 2 else (plan.depth, plan.tile)
        return pl.BlockSpec((1, *shape), index)

    def written(k: Any, pair: Any, step: Any, rows: Any, columns: Any) -> tuple[Any, ...]:
        lower = step <= last
        row, column = rows[pair], columns[pair]
        return k, jnp.where(lower, row, column), jnp.where(lower, column, row)

    tile = (1, plan.tile, plan.tile)
    body = functools.partial(_kernel, plan=plan, length=length, contracted=contracted)
    tables = jnp.asarray(plan.rows), jnp.asarray(plan.columns)
    operands = alike_varying(*tables, scalars, statistics, blocks, blocks)
    return pl.pallas_call(
        body,
        name="gram_update",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(statistics), len(plan.rows), plan.steps + 1),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec(tile, lambda k, pair, step, rows, cols: (k, rows[pair], cols[pair])),
                band(0),
                band(1),
            ],
            out_specs=pl.BlockSpec(tile, written),
            scratch_shapes=[pltpu.VMEM((plan.tile, plan.tile), jnp.float32)],
        ),
        out_shape=struct_like(statistics.shape, statistics.dtype, statistics),
        # Tiles above the diagonal are written and never read. The interpreter of JAX 0.10.2 cannot
        # alias what it pads to whole tiles.
        input_output_aliases={} if impl == "interpret" else {3: 0},
        compiler_params=tpu_parameters(impl, "parallel", "arbitrary", "arbitrary"),
        cost_estimate=plan.cost(statistics, blocks, length),
        interpret=interpreter(impl),
    )(*operands)


def _kernel(
    rows_ref: Any,
    columns_ref: Any,
    scalars_ref: Any,  # float32 [2]: decay, weight
    statistic_ref: Any,  # [1, tile, tile], on or below the diagonal
    left_ref: Any,  # [1, tile, depth] or [1, depth, tile], of the tile's rows
    right_ref: Any,  # likewise, of its columns
    out_ref: Any,  # [1, tile, tile]: where the statistic was read, then its mirror image
    sum_ref: Any,  # float32 [tile, tile]
    *,
    plan: _Plan,
    length: int,
    contracted: int,
) -> None:
    pair, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step < plan.steps)
    def _add() -> None:
        left, right = left_ref[0], right_ref[0]
        if length % plan.depth:  # what lies beyond the blocks can be anything
            inside = step * plan.depth + _positions(left.shape, contracted - 1) < length
            left, right = jnp.where(inside, left, 0), jnp.where(inside, right, 0)
        product = jax.lax.dot_general(
            left,
            right,
            (((contracted - 1,), (contracted - 1,)), ((), ())),
            precision=_precision(left.dtype),
            preferred_element_type=jnp.float32,
        )
        sum_ref[...] = jnp.where(step == 0, product, sum_ref[...] + product)

    @pl.when(step == plan.steps - 1)
    def _write() -> None:
        kept = scalars_ref[0] * statistic_ref[0].astype(jnp.float32)
        sum_ref[...] = kept + scalars_ref[1] * sum_ref[...]
        out_ref[0] = sum_ref[...].astype(out_ref.dtype)

    @pl.when(step == plan.steps)
    def _mirror() -> None:
        mean = sum_ref[...]
        below = _positions(mean.shape, 0) > _positions(mean.shape, 1)
        on_diagonal = rows_ref[pair] == columns_ref[pair]
        out_ref[0] = jnp.where(on_diagonal & below, mean, mean.T).astype(out_ref.dtype)


def _positions(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _precision(dtype: Any) -> jax.lax.Precision:
    """Products of bfloat16 numbers are exact in float32 as they are."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def _unfolded(blocks: jax.Array, mode: int) -> tuple[jax.Array, int]:
    """Matrices of which the mode is one dimension, and which dimension the other one is.

    The first mode and the last are where they have to be. One in between is moved to the front,
    which copies the blocks.
    """
    k, *shape = blocks.shape
    if mode == len(shape) - 1:
        return blocks.reshape(k, math.prod(shape[:-1]), shape[-1]), 1
    return jnp.moveaxis(blocks, mode + 1, 1).reshape(k, shape[mode], -1), 2


def _check(statistics: jax.Array, blocks: jax.Array, mode: int) -> None:
    core.check_int("mode", mode, low=0)
    if blocks.ndim < 2 or mode > blocks.ndim - 2:
        raise ValueError(
            f"blocks must be [k, d_1, ..., d_p] with p above mode={mode}, got {blocks.shape}"
        )
    expected = len(blocks), blocks.shape[mode + 1], blocks.shape[mode + 1]
    if statistics.shape != expected:
        raise ValueError(
            f"statistics must be {expected} for mode {mode} of blocks {blocks.shape}, got "
            f"{statistics.shape}"
        )


def _check_dtypes(statistics: jax.Array, blocks: jax.Array) -> None:
    for name, x in (("statistics", statistics), ("blocks", blocks)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            raise TypeError(
                f"the kernel takes {name} of float32 or bfloat16, got {x.dtype}; impl='xla' takes "
                "others"
            )
    if 0 in blocks.shape:
        raise ValueError(f"the kernel takes blocks with entries, got {blocks.shape}")
