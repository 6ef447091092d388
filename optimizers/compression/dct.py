"""The largest coefficients of a cosine transform, chunk by chunk, as in DeMo.

The last two axes of a tensor are cut into chunks of a rows and b columns; axes before them are a
stack of matrices. A vector has chunks of 1 row, a scalar is a vector of one entry. Each chunk goes
through the orthonormal DCT-II along both its axes, Y = D_a X D_bᵀ, so that energies and errors of
coefficients are those of entries.

The side of a chunk along an axis of length L is at most ``side``. Either the axis is padded with
zeros to a multiple of min(side, L); or the side is the largest divisor of L that is not above
``side``, as in DeMo's released code, where a prime length gives chunks one entry wide and a large k
then keeps more than it drops.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core, kernels
from jaxopt_suite.kernels.dct import dct_matrix
from jaxopt_suite.optimizers.compression.compressor import Compressor, Shape
from jaxopt_suite.optimizers.compression.sparse import (
    SparsePayload,
    ValueName,
    check_values,
    pack_entries,
    pack_largest,
    scatter,
    sparse_bytes,
    value_precision,
)

_PRECISION = jax.lax.Precision.HIGHEST  # a TPU's default multiplies float32 as bfloat16


def dct_top_k(
    k: int = 32,
    *,
    side: int = 64,
    pad: bool = True,
    values: ValueName = "float32",
    impl: kernels.Impl = "auto",
) -> Compressor:
    """The k largest DCT coefficients of every chunk of side x side entries.

    Args:
      k: coefficients kept of each chunk, at most ``side**2``; all of a chunk that has fewer.
      side: longest side of a chunk. With 64 an index takes 12 bits.
      pad: fill axes up with zeros to a multiple of the side; ``False`` uses divisors, as DeMo does.
      values: dtype of the coefficients. bfloat16 halves them and rounds to 8 bits.
      impl: ``"auto"``, ``"xla"``, or by the kernel ``dct_top_k`` ``"pallas"``, ``"interpret"`` on a
        CPU. It takes up to 64 coefficients of chunks of 64 by 64, and others for which
        ``kernels.dct_top_k_takes``; the rest is XLA's.

    Returns:
      c k coefficients and c k indices, for c chunks. δ = k / ab (times 1 − 2⁻¹⁶ for bfloat16) for
      chunks of ab entries. A non-finite entry makes its chunk non-finite.
    """
    core.check_int("k", k, low=1)
    core.check_int("side", side, low=1)
    if k > side**2:
        raise ValueError(f"k must be at most side**2 = {side**2}, got {k}")
    check_values(values)
    chosen = kernels.resolve("dct_top_k", impl)

    def plan(shape: Shape) -> tuple[Grid, int]:
        grid = chunk_grid(shape, side, pad=pad)
        return grid, min(k, grid.area)

    def encode(x: jax.Array, key: jax.Array) -> SparsePayload:
        del key  # nothing is drawn
        grid, kept = plan(x.shape)
        rows = dct(to_chunks(x, grid)).reshape(grid.chunks, grid.area)
        return pack_largest(rows, kept, values)

    def decode(payload: SparsePayload, like: jax.ShapeDtypeStruct) -> jax.Array:
        grid, kept = plan(like.shape)
        rows = scatter(payload, grid.chunks, grid.area, kept)
        return from_chunks(inverse_dct(rows.reshape(-1, *grid.sides)), grid, like.shape)

    def nbytes(shape: Shape) -> int:
        grid, kept = plan(shape)
        return sparse_bytes(grid.chunks * kept, grid.area, values)

    def contraction(shape: Shape) -> float:
        grid, kept = plan(shape)
        return kept / grid.area * value_precision(values)

    def encode_decoded(x: jax.Array, key: jax.Array) -> tuple[SparsePayload, jax.Array]:
        grid, kept = plan(x.shape)
        if not kernels.dct_top_k_takes(grid.sides, kept):
            payload = encode(x, key)
            return payload, decode(payload, jax.typeof(x))
        found = kernels.dct_top_k(x, kept, grid.sides, values=values, impl=chosen)
        return pack_entries(found.values, found.indices, grid.area, values), found.decoded

    by_kernel = chosen != "xla"
    return Compressor(
        name="dct_top_k",
        encode=(lambda x, key: encode_decoded(x, key)[0]) if by_kernel else encode,
        decode=decode,
        nbytes=nbytes,
        linear=False,
        shared_key=False,
        block=0,
        contraction=contraction,
        variance=None,
        encode_decoded=encode_decoded if by_kernel else None,
    )


class Grid(NamedTuple):
    """How a tensor is cut into chunks."""

    stack: int  # matrices
    sides: tuple[int, int]  # (a, b) of a chunk
    counts: tuple[int, int]  # chunks along the rows and along the columns of a matrix

    @property
    def chunks(self) -> int:
        """Number of chunks in all."""
        return self.stack * math.prod(self.counts)

    @property
    def area(self) -> int:
        """Entries of a chunk."""
        return math.prod(self.sides)


def chunk_grid(shape: Shape, side: int, *, pad: bool) -> Grid:
    """The grid for a tensor's shape; see the top of this file."""
    *stack, rows, columns = (1, 1, *shape) if len(shape) < 2 else shape
    sides = tuple(_side(length, side, pad=pad) for length in (rows, columns))
    counts = tuple(-(-length // s) for length, s in zip((rows, columns), sides, strict=True))
    return Grid(math.prod(stack), (sides[0], sides[1]), (counts[0], counts[1]))


def _side(length: int, side: int, *, pad: bool) -> int:
    side = max(1, min(length, side))
    return side if pad else next(s for s in range(side, 0, -1) if length % s == 0)


def to_chunks(x: jax.Array, grid: Grid) -> jax.Array:
    """The chunks of a tensor, ``[chunks, a, b]``, padded with zeros."""
    rows, columns = (1, x.size) if x.ndim < 2 else x.shape[-2:]
    (a, b), (down, across) = grid.sides, grid.counts
    x = x.reshape(grid.stack, rows, columns)
    if (down * a, across * b) != (rows, columns):
        x = jnp.pad(x, ((0, 0), (0, down * a - rows), (0, across * b - columns)))
    x = x.reshape(grid.stack, down, a, across, b).transpose(0, 1, 3, 2, 4)
    return x.reshape(grid.chunks, a, b)


def from_chunks(chunks: jax.Array, grid: Grid, shape: Shape) -> jax.Array:
    """The tensor of the given shape of which ``chunks`` are the chunks."""
    rows, columns = (1, math.prod(shape)) if len(shape) < 2 else shape[-2:]
    (a, b), (down, across) = grid.sides, grid.counts
    x = chunks.reshape(grid.stack, down, across, a, b).transpose(0, 1, 3, 2, 4)
    x = x.reshape(grid.stack, down * a, across * b)
    return x[:, :rows, :columns].reshape(shape)


def dct(chunks: jax.Array) -> jax.Array:
    """Y = D_a X D_bᵀ for each chunk of ``[..., a, b]``."""
    rows, columns = (jnp.asarray(dct_matrix(n)) for n in chunks.shape[-2:])
    half = jnp.matmul(chunks, columns.T, precision=_PRECISION)
    return jnp.einsum("ia,...ab->...ib", rows, half, precision=_PRECISION)


def inverse_dct(coefficients: jax.Array) -> jax.Array:
    """X = D_aᵀ Y D_b for each chunk of ``[..., a, b]``; undoes ``dct``."""
    rows, columns = (jnp.asarray(dct_matrix(n)) for n in coefficients.shape[-2:])
    half = jnp.matmul(coefficients, columns, precision=_PRECISION)
    return jnp.einsum("ia,...ib->...ab", rows, half, precision=_PRECISION)
