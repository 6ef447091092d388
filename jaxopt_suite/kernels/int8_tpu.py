"""The kernels of ``int8`` for TPUs.

A tensor lies in tiles of 8 by 128 of its last two dimensions. Cut into rows of B entries it lies
otherwise, and XLA copies it there and back for every one of several passes. The kernels take the
tensor as it lies, if B divides its last dimension and it has 32 such rows or more, and find the
blocks in these.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxopt_suite.kernels.calls_tpu import interpreter, parameters
from jaxopt_suite.kernels.implementations import alike_varying, struct_like, without_own

_LEVELS = 127.0
_ENTRIES = 2**18  # of a tile: 1 MiB of float32
_GROUPS = 16  # blocks side by side in a tile, at most
_LEAST_ROWS = 32  # of a matrix that is taken as it lies: bytes lie in tiles of as many
_FLAT_GROUPS = 32  # blocks in a row of a tensor that has to be laid out anew


def encode(x: jax.Array, *, block: int, impl: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes, scales and decoded message of ``kernels.int8_encode``.

    Args:
      x: float32, any shape.
      block: a multiple of 128.
      impl: as ``resolve`` gives it.
    """
    view = _View.of(x.shape, block)
    codes, scales, decoded = _encode_view(view.of_entries(x), view, impl)
    return (
        codes.reshape(-1)[: x.size],
        scales.reshape(-1)[: -(-x.size // block)],
        decoded.reshape(-1)[: x.size].reshape(x.shape) if view.flat else decoded.reshape(x.shape),
    )


class _View(NamedTuple):
    """A tensor as a matrix in whose rows the blocks lie."""

    rows: int
    columns: int  # a multiple of block
    block: int
    flat: bool  # whether the tensor is laid out anew for it, and padded with zeros

    @classmethod
    def of(cls, shape: tuple[int, ...], block: int) -> "_View":
        size = math.prod(shape)
        if shape and shape[-1] % block == 0 and size // shape[-1] >= _LEAST_ROWS:
            return cls(size // shape[-1], shape[-1], block, False)
        columns = block * min(_FLAT_GROUPS, -(-size // block))
        return cls(-(-size // columns), columns, block, True)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def scales(self) -> tuple[int, int]:
        return self.rows, self.columns // self.block

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of what is done at a time."""
        columns = min(self.columns, self.block * _GROUPS)
        rows = max(_LEAST_ROWS, _ENTRIES // columns // _LEAST_ROWS * _LEAST_ROWS)
        return min(self.rows, rows), columns

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.rows // self.tile[0]), -(-self.columns // self.tile[1])

    def of_entries(self, x: jax.Array) -> jax.Array:
        """A tensor of the shape, as the matrix."""
        if not self.flat:
            return x.reshape(self.shape)
        return self.of_rows(x.reshape(1, -1), 1)[0]

    def of_rows(self, x: jax.Array, per: int) -> jax.Array:
        """Flat arrays ``[k, ...]`` of an entry for each ``per``, as ``k`` matrices."""
        columns = self.columns // per
        missing = self.rows * columns - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, missing))).reshape(len(x), self.rows, columns)


def _encode_view(x: jax.Array, view: _View, impl: str) -> Any:
    rows, columns = view.tile
    entries = pl.BlockSpec((rows, columns), lambda i, j: (i, j))
    scales = pl.BlockSpec((rows, view.scales[1]), lambda i, j: (i, 0))
    body = functools.partial(_encode_kernel, block=view.block, groups=columns // view.block)
    return pl.pallas_call(
        body,
        name="int8_encode",
        grid=view.grid,
        in_specs=[entries],
        out_specs=[entries, scales, entries],
        out_shape=[
            struct_like(view.shape, jnp.int8, x),
            struct_like(view.scales, jnp.float32, x),
            struct_like(view.shape, jnp.float32, x),
        ],
        compiler_params=parameters(impl, "parallel", "arbitrary", allow_input_fusion=[True]),
        cost_estimate=pl.CostEstimate(
            flops=8 * x.size,
            bytes_accessed=9 * x.size + 4 * x.size // view.block,
            transcendentals=0,
        ),
        interpret=interpreter(impl),
    )(x)


def _encode_kernel(
    x_ref: Any,  # float32 [rows, columns]
    codes_ref: Any,  # int8, likewise
    scales_ref: Any,  # float32 [rows, blocks]: of whole rows, while the tiles go along them
    decoded_ref: Any,  # float32 [rows, columns]
    *,
    block: int,
    groups: int,
) -> None:
    first = pl.program_id(1) * groups
    place = jax.lax.broadcasted_iota(jnp.int32, scales_ref.shape, 1)
    for group in range(groups):
        columns = slice(group * block, (group + 1) * block)
        x = x_ref[:, columns]
        magnitude = jnp.abs(x)
        largest = jnp.max(magnitude, axis=1, keepdims=True)
        # A maximum need not be NaN where an entry is.
        spoiled = jnp.max(jnp.where(magnitude < jnp.inf, 0.0, 1.0), axis=1, keepdims=True)
        scale = jnp.where(largest == 0, 1.0, largest)
        scale = jnp.where(spoiled > 0, jnp.nan, scale)
        code = jnp.round(x / scale * _LEVELS)
        codes_ref[:, columns] = code.astype(jnp.int32).astype(jnp.int8)
        decoded_ref[:, columns] = code * (scale / _LEVELS)
        scales_ref[...] = jnp.where(place == first + group, scale, scales_ref[...])


def mean(
    worker: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    *own: jax.Array,
    shape: tuple[int, ...],
    block: int,
    impl: str,
) -> jax.Array:
    """As ``kernels.int8_mean``.

    Args:
      worker: whose message is given, int32 ``[]``.
      codes: int8 ``[workers, n]``.
      scales: float32 ``[workers, ceil(n / block)]``.
      *own: that message, float32 of the shape; or nothing.
      shape: of the messages.
      block: as they were encoded.
      impl: as ``resolve`` gives it.
    """
    view = _View.of(shape, block)
    operands = [jnp.reshape(worker, 1), view.of_rows(codes, 1), view.of_rows(scales, block)]
    found = _mean_view([*operands, *map(view.of_entries, own)], view, impl)
    return (found.reshape(-1)[: math.prod(shape)] if view.flat else found).reshape(shape)


def _mean_view(operands: list[jax.Array], view: _View, impl: str) -> jax.Array:
    rows, columns = view.tile
    operands = list(alike_varying(*operands))
    workers, has_own = len(operands[1]), len(operands) == 4
    size = view.rows * view.columns
    entries = pl.BlockSpec((rows, columns), lambda i, j, worker: (i, j))
    body = functools.partial(
        _mean_kernel, block=view.block, groups=columns // view.block, workers=workers
    )
    return pl.pallas_call(
        body if has_own else without_own(body),
        name="int8_mean",
        grid=(*view.grid, workers),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((1, rows, columns), lambda i, j, worker: (worker, i, j)),
            pl.BlockSpec((1, rows, view.scales[1]), lambda i, j, worker: (worker, i, 0)),
            *[entries] * has_own,
        ],
        out_specs=entries,
        out_shape=struct_like(view.shape, jnp.float32, operands[1]),
        compiler_params=parameters(impl, "parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * workers * size,
            bytes_accessed=workers * (size + 4 * size // view.block) + 4 * (1 + has_own) * size,
            transcendentals=0,
        ),
        interpret=interpreter(impl),
    )(*operands)


def _mean_kernel(
    owner_ref: Any,  # int32 [1]
    codes_ref: Any,  # int8 [1, rows, columns], of one worker
    scales_ref: Any,  # float32 [1, rows, blocks], of whole rows
    own_ref: Any,  # float32 [rows, columns], or None
    out_ref: Any,  # float32 [rows, columns]: the sum, while the workers go by
    *,
    block: int,
    groups: int,
    workers: int,
) -> None:
    first, worker = pl.program_id(1) * groups, pl.program_id(2)
    scales = scales_ref[0]
    place = jax.lax.broadcasted_iota(jnp.int32, scales.shape, 1)
    for group in range(groups):
        columns = slice(group * block, (group + 1) * block)
        here = jnp.where(place == first + group, scales, 0.0)
        scale = jnp.sum(here, axis=1, keepdims=True)  # one of these and zeros: exact
        decoded = codes_ref[0, :, columns].astype(jnp.float32) * (scale / _LEVELS)
        if own_ref is not None:
            decoded = jnp.where(worker == owner_ref[0], own_ref[:, columns], decoded)
        total = jnp.where(worker == 0, 0.0, out_ref[:, columns]) + decoded
        out_ref[:, columns] = jnp.where(worker == workers - 1, total / workers, total)
