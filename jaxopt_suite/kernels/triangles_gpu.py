"""Products that are symmetric, on NVIDIA's Hopper GPUs, through Mosaic GPU: one triangle computed.

A program has a tile of the result, 128 by 128, on or below the diagonal, and writes it where it
lies and as its transpose. Two warpgroups have 64 of its rows each and multiply; a third has the
copy engine (TMA) bring what they multiply, a few steps ahead. Beyond an edge that reads zeros and
writes nothing.

**Products.** The tensor cores take bfloat16, with 8 of the 24 bits that float32 has. A float32
number is the sum of three such numbers, high, middle and low, which XLA makes before the kernel, in
one pass: 4 bytes an entry read and 6 written, once where both factors are one array. Cut within the
kernel, a tile would be cut again for each tile of the result that it is needed for. Of the nine
products six are made, each of them exact. The three left out come to 2**-22 of the product at most,
and have either sign.

**Sums.** NVIDIA's tensor cores are reported to cut off what does not fit when they add, where
others round (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores"). A
long sum of squares would always come out too small. In a tensor core one is therefore added up for
a single step only, 32 entries, the smallest products first; the sums of the steps are added with
ordinary instructions, which round.

**Bounds.** High is cut off, not rounded, so that it is finite for every finite number. What is not
finite has no middle and no low: of the result's lower triangle it makes its row infinite or NaN if
the left factor has it, its column if the right one does, and nothing else. Parts below 2**-126 may
be flushed to zero, so that of entries below 2**-102 fewer than 24 bits count.

Other GPUs do not have these instructions (``wgmma``), Blackwell's neither: there the program is
refused when it is lowered. Compiled ahead of time, on another machine, it cannot be told for which
GPU, and LLVM ends the process: ``Cannot select: intrinsic %llvm.nvvm.wgmma.fence.sync.aligned``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.extend.backend
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters import batching, mlir

from jaxopt_suite import core
from jaxopt_suite.kernels.gram import Mean
from jaxopt_suite.kernels.rows_gpu import PARAMETERS

_any: Any = plgpu  # of which type checkers hold some classes to be private, or abstract

_TILE = 128  # rows of a tile of the result, and columns
_WARPGROUPS = 2  # that multiply
_HALF = _TILE // _WARPGROUPS  # rows of one of them
_SPAN = 128  # bytes of a row that lie together in the result's tile
# A step's: high, middle, low are 0, 1, 2. The smallest products come first.
_PRODUCTS = {1: ((0, 0),), 3: ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0))}


def symmetric(
    name: str,
    left: jax.Array,
    right: jax.Array,
    *,
    contracted: int,
    mean: Mean | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Products of the rows of two stacks, or of their columns, that are known to be symmetric.

    Of T² tiles the T(T+1)/2 on and below the diagonal are computed, in float32, and each is written
    a second time as its transpose.

    Args:
      name: of the kernel in the program.
      left: float32 or bfloat16, ``[k, d, n]`` if ``contracted`` is 2, ``[k, n, d]`` if it is 1.
        Where n and d are no multiples of 64, the copy engine may want factors, statistics and
        result to be larger, and what is no float32 factor is copied to be so.
      right: likewise, of the same dtype.
      contracted: the dimension that is summed over.
      mean: of statistics of float32 or bfloat16.
      interpret: as of ``plgpu.kernel``.

    Returns:
      ``[k, d, d]`` in the dtype of the statistics, or without any of the factors.

    Raises:
      NotImplementedError: when lowered where the GPU is not Hopper.
    """
    if not interpret:
        left = _on_hopper.bind(left, what=name)
    k, size = len(left), left.shape[3 - contracted]
    plan = _Plan.of(left, contracted, adds=mean is not None)
    places = np.stack(np.tril_indices(-(-size // _TILE)), axis=1).astype(np.int32)
    dtype = left.dtype if mean is None else mean.statistics.dtype
    columns = _SPAN // dtype.itemsize
    added = () if mean is None else (mean.scalars, _whole(mean.statistics, columns))
    parts = [part for x in (left, right) for part in split(_whole(x, plan.depth))]
    found = plgpu.kernel(
        functools.partial(_kernel, plan=plan),
        out_type=jax.ShapeDtypeStruct((k, size + -size % 8, size + -size % columns), dtype),
        scratch_types=[
            plgpu.SMEM((_TILE, _TILE), dtype, transforms=_lying(_SPAN, dtype)),
            plgpu.Barrier(num_barriers=_WARPGROUPS),
            plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=2),
        ],
        grid=(k, len(places)),
        grid_names=("matrix", "pair"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=PARAMETERS,
        interpret=interpret,
    )(jnp.asarray(places), *parts, *added)
    return core.vary(found[:, :size, :size], core.varying_axes(left))


def split(x: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays of bfloat16 that add up to x, the largest first: one, or of float32 three."""
    if x.dtype == jnp.bfloat16:
        return (x,)
    kept = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    high = jax.lax.bitcast_convert_type(kept, jnp.float32)
    rest = jnp.where(jnp.isfinite(x), x - high, 0)
    # The compiler may drop a conversion to bfloat16 and back, as more precise. Not this one.
    middle = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
    return tuple(part.astype(jnp.bfloat16) for part in (high, middle, rest - middle))


class _Plan(NamedTuple):
    """How a stack of products is cut."""

    parts: int  # see split
    depth: int  # entries summed over in a step
    steps: int
    ahead: int  # of these, so many lie in shared memory
    contracted: int
    adds: bool  # to statistics

    @classmethod
    def of(cls, factor: jax.Array, contracted: int, adds: bool) -> "_Plan":
        # Of the 227 KiB of a multiprocessor: 128, or 144, and 64 for the result's tile.
        parts, depth, ahead = (1, 64, 4) if factor.dtype == jnp.bfloat16 else (3, 32, 3)
        return cls(parts, depth, -(-factor.shape[contracted] // depth), ahead, contracted, adds)

    def band(self, tile: Any) -> plgpu.BlockSpec:
        """Of a factor what a tile of the result needs, for its rows or for its columns."""
        rows_first = self.contracted == 2
        return plgpu.BlockSpec(
            (_TILE, self.depth) if rows_first else (self.depth, _TILE),
            lambda step: (tile, step) if rows_first else (step, tile),
            transforms=_lying(2 * self.depth, jnp.bfloat16),
        )

    def left(self, band: Any, rows: Any) -> Any:
        """Rows of the result by entries summed over, of these rows."""
        return band.at[rows] if self.contracted == 2 else band.at[:, rows].T

    def right(self, band: Any) -> Any:
        """Entries summed over by columns of the result."""
        return band.T if self.contracted == 2 else band


class _Half(NamedTuple):
    """What a warpgroup has of a tile of the result."""

    matrix: Any
    group: Any
    row: Any  # of tiles
    column: Any

    @property
    def rows(self) -> Any:
        """Of the tile."""
        return pl.ds(self.group * _HALF, _HALF)

    def below(self, matrices: Any) -> Any:
        return self._at(matrices, self.row, self.column)

    def above(self, matrices: Any) -> Any:
        """As many rows of the tile on the other side of the diagonal."""
        return self._at(matrices, self.column, self.row)

    def _at(self, matrices: Any, row: Any, column: Any) -> Any:
        rows = pl.ds(row * _TILE + self.group * _HALF, _HALF)
        return matrices.at[self.matrix, rows, pl.ds(column * _TILE, _TILE)]


def _kernel(
    places_ref: Any,  # int32 [pairs, 2]: of each tile its row of tiles and its column
    *refs: Any,  # all that follow
    # factors: bfloat16, each part of the left one, then of the right one
    # mean_refs: if there is one to add to, float32 [2], and statistics [k, d, d]
    # out_ref: [k, d, d]
    # tile: [128, 128] in shared memory
    # loaded: barriers, one for each warpgroup's half of the statistics' tile
    # met: barriers of both warpgroups
    plan: _Plan,
) -> None:
    factors = refs[: 2 * plan.parts]
    *mean_refs, out_ref, tile, loaded, met = refs[2 * plan.parts :]
    matrix, pair, group = map(jax.lax.axis_index, ("matrix", "pair", "warpgroup"))
    half = _Half(matrix, group, places_ref[pair, 0], places_ref[pair, 1])

    def compute(pipeline: Any) -> None:
        arrived = loaded.at[group]
        if plan.adds:
            scalars_ref, statistics_ref = mean_refs
            plgpu.copy_gmem_to_smem(half.below(statistics_ref), tile.at[half.rows], arrived)
        zeros = jnp.zeros((_HALF, _TILE), jnp.float32)
        result = pipeline(plgpu.layout_cast(zeros, plgpu.Layout.WGMMA))
        if plan.adds:
            plgpu.barrier_wait(arrived)
            kept = scalars_ref[0] * _loaded(tile, half.rows).astype(jnp.float32)
            result = kept + scalars_ref[1] * result
            _meet(met.at[0])  # both have read the old tile
        _write(result.astype(tile.dtype), half, out_ref, tile, met.at[1])

    add: Any = functools.partial(_add, plan=plan, rows=half.rows)
    plgpu.emit_pipeline_warp_specialized(
        add,
        grid=(plan.steps,),
        in_specs=[plan.band(along) for along in (half.row, half.column) for _ in range(plan.parts)],
        max_concurrent_steps=plan.ahead,
        memory_registers=40,
        wg_axis="warpgroup",
        num_compute_wgs=_WARPGROUPS,
        compute_context=compute,
    )(*[part.at[matrix] for part in factors])


def _add(_: Any, *bands_and_total: Any, plan: _Plan, rows: Any) -> jax.Array:
    """Adds a step's products to the total, ``[64, 128]``."""
    *bands, total = bands_and_total
    left, right = bands[: plan.parts], bands[plan.parts :]

    def products(sum_ref: Any) -> jax.Array:
        for i, j in _PRODUCTS[plan.parts]:
            plgpu.wgmma(sum_ref, plan.left(left[i], rows), plan.right(right[j]))
        return sum_ref[...]

    return total + pl.run_scoped(products, _any.ACC(total.shape, jnp.float32))


def _meet(barrier: Any) -> None:
    """Waits for the other warpgroup that multiplies."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _write(result: jax.Array, half: _Half, out_ref: Any, tile: Any, written: Any) -> None:
    """Writes half of a tile where it lies, and half of the tile's transpose.

    On the diagonal the transpose is what lies above it: there too the lower triangle counts. Even
    what is multiplied by itself need not be symmetric to the last bit, as the products are not
    added in the same order.
    """
    tile.at[:, half.rows].T[...] = plgpu.layout_cast(result, plgpu.Layout.WGMMA_TRANSPOSED)
    plgpu.commit_smem()
    _meet(written)  # both have written their columns
    on_diagonal = half.row == half.column

    @pl.when(jnp.logical_not(on_diagonal))
    def _mirror() -> None:
        plgpu.copy_smem_to_gmem(tile.at[half.rows], half.above(out_ref))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    position = functools.partial(
        plgpu.broadcasted_iota, jnp.int32, result.shape, layout=plgpu.Layout.WGMMA
    )
    above = position(1) > position(0) + half.group * _HALF
    tile[half.rows] = jnp.where(on_diagonal & above, _loaded(tile, half.rows), result)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile.at[half.rows], half.below(out_ref))
    plgpu.wait_smem_to_gmem(0)


def _loaded(tile: Any, rows: Any) -> jax.Array:
    return plgpu.layout_cast(tile[rows], plgpu.Layout.WGMMA)


def _lying(span: int, dtype: Any) -> tuple[Any, ...]:
    """How a tile lies in shared memory: of eight rows at a time so many bytes together."""
    columns = span // jnp.dtype(dtype).itemsize
    return _any.TilingTransform((8, columns)), _any.SwizzleTransform(span)


def _whole(x: jax.Array, columns: int) -> jax.Array:
    """With zeros at the ends, up to what the copy engine takes for tiles that lie so."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, -x.shape[2] % columns)))


def _check_gpu(context: mlir.LoweringRuleContext, x: Any, *, what: str) -> list[Any]:
    found = getattr(jax.extend.backend.get_default_device(), "compute_capability", "9.0")
    if found != "9.0":
        raise NotImplementedError(
            f"the Pallas kernel of {what} for GPUs is for Hopper, of compute capability 9.0; "
            f"this GPU has {found}; impl='xla' runs on all of them"
        )
    return [x]


# The identity, of which only Hopper has a program.
_on_hopper = jax.extend.core.Primitive("on_hopper")
_on_hopper.def_abstract_eval(lambda x, *, what: x)
batching.defvectorized(_on_hopper)
mlir.register_lowering(_on_hopper, _check_gpu)
