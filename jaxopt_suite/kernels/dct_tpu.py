"""The kernel of ``dct`` for TPUs: chunks side by side in tiles of 128 columns.

* Magnitudes of floats are ordered as their bits are. The k-th largest of a chunk is found from its
  highest bit down, each by counting what reaches it: three vector operations an entry in each of 31
  rounds, whatever k is. Taking k maxima in turn needs six in each of k rounds.
* Of those equal to the k-th the first are taken: for each the ones before it are counted, by
  products with matrices of zeros and ones.
* The same counts say in which row of its chunk the s-th of the k is. A product with the zeros and
  ones that pick these rows brings them to place s: as four bytes, which bfloat16 holds exactly.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxopt_suite.kernels.calls_tpu import interpreter, parameters
from jaxopt_suite.kernels.chunks import (
    LANES,
    Ranks,
    chunk_sums,
    positions,
    product,
    same_chunk,
    tiled,
    zeros_and_ones,
)
from jaxopt_suite.kernels.implementations import alike_varying, struct_like

_BANDS = 8  # rows of chunks in a tile: their counts fill the sublanes of a register
_COLUMNS = 512  # columns of a tile
_HIGHEST = jax.lax.Precision.HIGHEST  # a TPU's default multiplies float32 as bfloat16


def top_k(
    x: jax.Array, of_rows: np.ndarray, of_columns: np.ndarray, *, k: int, values: str, impl: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The coefficients, their places and the decoded matrices of ``kernels.dct_top_k``.

    Args:
      x: float32 ``[matrices, rows, columns]``.
      of_rows: float32 ``[a, a]``, the cosines along the rows of a chunk.
      of_columns: float32 ``[b, b]``.
      k: coefficients of a chunk.
      values: dtype that they are rounded to.
      impl: as ``resolve`` gives it.

    Returns:
      float32 ``[chunks, k]``, int32 ``[chunks, k]``, and float32 of the shape of x.
    """
    plan = _Plan.of(x.shape, (len(of_rows), len(of_columns)), k, values)
    found, indices, decoded = _call(x, of_rows, of_columns, plan, impl)
    return plan.of_chunks(found), plan.of_chunks(indices), decoded


class _Plan(NamedTuple):
    """How a stack of matrices is cut."""

    shape: tuple[int, int, int]  # matrices, rows, columns
    sides: tuple[int, int]
    chunks: tuple[int, int]  # of a matrix: down and across
    bands: int  # rows of chunks in a tile
    columns: int  # of a tile, a multiple of 128
    k: int
    values: str

    @classmethod
    def of(cls, shape: tuple[int, ...], sides: tuple[int, int], k: int, values: str) -> "_Plan":
        matrices, rows, columns = shape
        down, across = -(-rows // sides[0]), -(-columns // sides[1])
        width = min(_COLUMNS, -(-columns // LANES) * LANES)
        bands = min(_BANDS, down)
        return cls((matrices, rows, columns), sides, (down, across), bands, width, k, values)

    @property
    def grid(self) -> tuple[int, int, int]:
        matrices, _, columns = self.shape
        return matrices, -(-self.chunks[0] // self.bands), -(-columns // self.columns)

    @property
    def found(self) -> tuple[int, int, int]:
        """Shape of the coefficients: a chunk's are in the first k of its columns."""
        return self.shape[0], self.chunks[0], self.chunks[1] * self.sides[1]

    def of_chunks(self, found: jax.Array) -> jax.Array:
        """``[chunks, k]`` of what has the shape of the coefficients."""
        return found.reshape(-1, self.sides[1])[:, : self.k]

    def cost(self) -> pl.CostEstimate:
        """What the kernel computes, products of zeros and ones included, and what it moves."""
        (a, _), size = self.sides, math.prod(self.shape)
        cosines, counts, rows = 4 * (LANES + a), 4 * (2 * LANES + a), 10 * LANES
        return pl.CostEstimate(
            flops=size * (cosines + counts + rows),
            bytes_accessed=8 * size + 8 * math.prod(self.found),
            transcendentals=0,
        )


def _call(x: jax.Array, of_rows: np.ndarray, of_columns: np.ndarray, plan: _Plan, impl: str) -> Any:
    (a, b), tile = plan.sides, (plan.bands * plan.sides[0], plan.columns)
    right = np.kron(np.eye(LANES // b, dtype=np.float32), of_columns)
    operands = alike_varying(x, jnp.asarray(of_rows), jnp.asarray(right))
    entries = pl.BlockSpec((1, *tile), lambda n, i, j: (n, i, j))
    whole = lambda side: pl.BlockSpec((side, side), lambda n, i, j: (0, 0))
    found = pl.BlockSpec((1, plan.bands, plan.columns), lambda n, i, j: (n, i, j))
    return pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        name="dct_top_k",
        grid=plan.grid,
        in_specs=[entries, whole(a), whole(LANES)],
        out_specs=[found, found, entries],
        out_shape=[
            struct_like(plan.found, jnp.float32, operands[0]),
            struct_like(plan.found, jnp.int32, operands[0]),
            struct_like(plan.shape, jnp.float32, operands[0]),
        ],
        scratch_shapes=[
            pltpu.VMEM((plan.bands, a, plan.columns), jnp.float32),
            pltpu.VMEM((plan.bands, plan.columns), jnp.int32),
        ],
        compiler_params=parameters(
            impl, *["parallel"] * 3, allow_input_fusion=[True, False, False]
        ),
        cost_estimate=plan.cost(),
        interpret=interpreter(impl),
    )(*operands)


def _kernel(
    x_ref: Any,  # float32 [1, bands · a, columns]
    left_ref: Any,  # float32 [a, a]: D_a
    right_ref: Any,  # float32 [128, 128]: D_b for each of the chunks side by side
    values_ref: Any,  # float32 [1, bands, columns]: of a chunk in its first k columns
    indices_ref: Any,  # int32, likewise
    decoded_ref: Any,  # float32 [1, bands · a, columns]
    coefficients_ref: Any,  # float32 [bands, a, columns]; the entries, before that
    kth_ref: Any,  # int32 [bands, columns]: bits of the k-th largest magnitude, over its chunk
    *,
    plan: _Plan,
) -> None:
    a, b = plan.sides
    rows_of = lambda band: pl.ds(pl.multiple_of(band * a, 8), a)

    # XLA computes x while it is read, if that is in one place.
    coefficients_ref[...] = _inside(x_ref[0], plan).reshape(coefficients_ref.shape)

    @pl.loop(0, plan.bands)
    def _transform(band: jax.Array) -> None:
        x = coefficients_ref[band]
        finite = jnp.abs(x) < jnp.inf
        spoiled = chunk_sums(~finite, b) > 0
        half = tiled(jnp.where(finite, x, 0.0), right_ref[...], (1, 1), _HIGHEST)
        coefficients = product(left_ref[...], half, precision=_HIGHEST)
        coefficients_ref[band] = jnp.where(spoiled, jnp.nan, coefficients)

    order = _order(coefficients_ref[...])

    def try_a_bit(i: jax.Array, kth: jax.Array) -> jax.Array:
        higher = kth | (1 << (30 - i))
        reached = chunk_sums(order >= higher[:, None, :], b)
        return jnp.where(reached >= plan.k, higher, kth)

    kth_ref[...] = jax.lax.fori_loop(0, 31, try_a_bit, jnp.zeros(kth_ref.shape, jnp.int32))

    @pl.loop(0, plan.bands)
    def _send(band: jax.Array) -> None:
        coefficients, kth = coefficients_ref[band], kth_ref[pl.ds(band, 1), :]
        above, equal = _order(coefficients) > kth, _order(coefficients) == kth
        wanted = plan.k - chunk_sums(above, b)
        selected = above | (equal & (Ranks.of(equal, b).rank < wanted))
        sent = coefficients.astype(plan.values).astype(jnp.float32)

        bits, indices = _compacted(sent, selected, b)
        values_ref[0, pl.ds(band, 1), :] = pltpu.bitcast(bits, jnp.float32)
        indices_ref[0, pl.ds(band, 1), :] = indices

        spoiled = chunk_sums(selected & ~(jnp.abs(sent) < jnp.inf), b) > 0
        sent = jnp.where(selected & ~spoiled, sent, 0.0)
        half = tiled(sent, right_ref[...], precision=_HIGHEST)
        entries = product(left_ref[...], half, (0, 0), _HIGHEST)
        decoded_ref[0, rows_of(band), :] = jnp.where(spoiled, jnp.nan, entries)


def _inside(x: jax.Array, plan: _Plan) -> jax.Array:
    """A tile, with zeros in the place of what lies beyond the matrix."""
    _, rows, columns = plan.shape
    first_row, first_column = pl.program_id(1) * x.shape[0], pl.program_id(2) * x.shape[1]
    inside = first_row + positions(x.shape, 0) < rows
    inside &= first_column + positions(x.shape, 1) < columns
    return jnp.where(inside, x, 0.0)


def _compacted(sent: jax.Array, selected: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """Bits and indices of a chunk's selected entries in its first columns, int32 ``[1, columns]``.

    A slot looks at the one row of its chunk that its entry is in.
    """
    ranks = Ranks.of(selected, b)
    rank = jnp.where(selected, ranks.rank, -1.0)
    slot = (positions(sent.shape, 1) & (b - 1)).astype(jnp.float32)
    picks = (ranks.before <= slot) & (slot < ranks.before + ranks.here)  # [a, columns]: rows, slots
    bits = pltpu.bitcast(sent, jnp.int32)
    same, place = same_chunk(b), positions((LANES, LANES), 0)
    found, indices = [], []
    for first in range(0, sent.shape[1], LANES):
        tile = slice(first, first + LANES)
        words = bits[:, tile].T
        pieces = [(words >> shift & 255).astype(jnp.float32) for shift in (0, 8, 16, 24)]
        columns = jnp.concatenate([rank[:, tile].T, *pieces]).astype(jnp.bfloat16)
        rows = product(columns, zeros_and_ones(picks[:, tile]))
        rank_there, *bytes_there = rows.reshape(5, LANES, LANES)
        there = same & (rank_there == slot[:1, tile])
        word = sum(x.astype(jnp.int32) << 8 * i for i, x in enumerate(bytes_there))
        row = jnp.sum(jnp.where(picks[:, tile], positions(slot[:, tile].shape, 0), 0), 0)
        found.append(jnp.sum(jnp.where(there, word, 0), axis=0))
        indices.append(row * b + jnp.sum(jnp.where(there, place & (b - 1), 0), axis=0))
    return jnp.concatenate(found)[None, :], jnp.concatenate(indices)[None, :]


def _order(x: jax.Array) -> jax.Array:
    """Integers in the order of the magnitudes, NaN above infinity."""
    return pltpu.bitcast(jnp.abs(x), jnp.int32)
