"""Products of matrices that are symmetric, on TPUs: one triangle computed, and written twice."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxopt_suite.kernels.calls_tpu import interpreter, parameters
from jaxopt_suite.kernels.gram import Mean
from jaxopt_suite.kernels.implementations import alike_varying, struct_like

# Rows and columns of a tile of the product. A smaller tile computes less above the diagonal and
# loads the factors more often: for one pass of bfloat16, not six, the loads would take longer.
_TILES = {"float32": 256, "bfloat16": 512}
_DEPTH = 1024  # entries that a tile's products are summed over at a time


def symmetric(
    name: str,
    left: jax.Array,
    right: jax.Array,
    *,
    contracted: int,
    mean: Mean | None = None,
    impl: str,
) -> jax.Array:
    """Products of the rows of two stacks, or of their columns, that are known to be symmetric.

    Of T² tiles the T(T+1)/2 on and below the diagonal are computed, in float32, and each is written
    a second time as its transpose.

    Args:
      name: of the kernel in the program.
      left: ``[k, d, n]`` if ``contracted`` is 2, ``[k, n, d]`` if it is 1.
      right: likewise, of the same dtype.
      contracted: the dimension that is summed over.
      mean: is written over, where it was donated.
      impl: as ``resolve`` gives it.

    Returns:
      ``[k, d, d]`` in the dtype of the statistics, or without any of the factors.
    """
    k, *rest = left.shape
    size, length = rest[2 - contracted], rest[contracted - 1]
    plan = _Plan.of(size, length, left.dtype)
    last = plan.steps - 1

    def band(which: int) -> pl.BlockSpec:
        """Tiles of a factor along the product's rows (0) or columns (1)."""

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
    tables = jnp.asarray(plan.rows), jnp.asarray(plan.columns)
    added: tuple[jax.Array, ...] = ()
    added_specs: list[pl.BlockSpec] = []
    if mean is not None:
        added = mean.scalars, mean.statistics
        read = lambda k, pair, step, rows, columns: (k, rows[pair], columns[pair])
        added_specs = [pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(tile, read)]
    body = functools.partial(
        _kernel, plan=plan, length=length, contracted=contracted, adds=mean is not None
    )
    operands = alike_varying(*tables, *added, left, right)
    dtype = left.dtype if mean is None else mean.statistics.dtype
    return pl.pallas_call(
        body,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(k, len(plan.rows), plan.steps + 1),
            in_specs=[*added_specs, band(0), band(1)],
            out_specs=pl.BlockSpec(tile, written),
            scratch_shapes=[pltpu.VMEM((plan.tile, plan.tile), jnp.float32)],
        ),
        out_shape=struct_like((k, size, size), dtype, operands[-1]),
        # Tiles above the diagonal are written and never read. The interpreter of JAX 0.10.2 cannot
        # alias what it pads to whole tiles.
        input_output_aliases={} if mean is None or impl == "interpret" else {3: 0},
        compiler_params=parameters(impl, "parallel", "arbitrary", "arbitrary"),
        cost_estimate=plan.cost(k, size, length, left.dtype, None if mean is None else dtype),
        interpret=interpreter(impl),
    )(*operands)


class _Plan(NamedTuple):
    """How a stack of products is cut."""

    tile: int  # rows of a tile of the product, and columns
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

    def cost(self, k: int, size: int, length: int, dtype: Any, added: Any) -> pl.CostEstimate:
        """What the kernel computes and moves; ``added`` is the statistics' dtype, if there are any.

        A tile of a factor that is used again at once is kept.
        """
        pairs, band = len(self.rows), self.tile * length
        left = -(-size // self.tile) if self.steps == 1 else pairs
        read = (left + pairs) * band * dtype.itemsize
        written = size**2 * (added or dtype).itemsize
        read += pairs * self.tile**2 * added.itemsize if added else 0
        return pl.CostEstimate(
            flops=2 * k * pairs * self.tile**2 * length,
            bytes_accessed=k * (read + written),
            transcendentals=0,
        )


def _kernel(
    rows_ref: Any,
    columns_ref: Any,
    *refs: Any,
    plan: _Plan,
    length: int,
    contracted: int,
    adds: bool,
) -> None:
    """The references: of a mean its scalars and statistics, then the factors, the result, the sum.

    The factors' are ``[1, tile, depth]`` or ``[1, depth, tile]``, of the tile's rows and of its
    columns. The result's is on or below the diagonal, as the statistics' is, and then its mirror
    image.
    """
    *mean_refs, left_ref, right_ref, out_ref, sum_ref = refs
    pair, step = pl.program_id(1), pl.program_id(2)

    @pl.when(step < plan.steps)
    def _add() -> None:
        left, right = left_ref[0], right_ref[0]
        if length % plan.depth:  # what lies beyond the factors can be anything
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
        if adds:
            scalars_ref, statistics_ref = mean_refs
            kept = scalars_ref[0] * statistics_ref[0].astype(jnp.float32)
            sum_ref[...] = kept + scalars_ref[1] * sum_ref[...]
        out_ref[0] = sum_ref[...].astype(out_ref.dtype)

    @pl.when(step == plan.steps)
    def _mirror() -> None:
        product = sum_ref[...]
        below = _positions(product.shape, 0) > _positions(product.shape, 1)
        on_diagonal = rows_ref[pair] == columns_ref[pair]
        out_ref[0] = jnp.where(on_diagonal & below, product, product.T).astype(out_ref.dtype)


def _positions(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _precision(dtype: Any) -> jax.lax.Precision:
    """Products of bfloat16 numbers are exact in float32 as they are."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
