"""The kernels of ``signs`` for TPUs.

Of a matrix of rows that are a multiple of 8 the eight entries of a byte lie in the same column of
eight slabs of rows. The kernels take such slabs side by side, as they lie: a byte is then a sum
over eight arrays, and nothing moves between the lanes of a register.
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
from jaxopt_suite.kernels.signs import WIDEST, Scale

_SLABS = 8
_TILE = 32, WIDEST  # rows of each slab and columns, at most: 1 MiB of float32
_ROWS = 64  # of a matrix that is taken as it lies, a multiple: each slab is whole tiles of 8 rows


def encode(
    x: jax.Array, *, block: int, scale: Scale, impl: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bits, scales and decoded message of ``kernels.sign_encode``.

    Args:
      x: float32, any shape that ``signs_take``.
      block: a multiple of 128, at most ``WIDEST``.
      scale: ``"l1"`` or ``"l2"``.
      impl: as ``resolve`` gives it.
    """
    view = _View.of(x.shape, block)
    codes, scales, decoded = _encode_view(x.reshape(view.slabs), view, scale, impl)
    bits = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    return bits.reshape(-1), scales.reshape(-1), decoded.reshape(x.shape)


class _View(NamedTuple):
    """A tensor as eight slabs of rows, in which the blocks lie."""

    rows: int  # of a slab
    columns: int  # a multiple of block
    block: int

    @classmethod
    def of(cls, shape: tuple[int, ...], block: int) -> "_View":
        """As it lies, or laid out anew where that is not in whole slabs and blocks."""
        size = math.prod(shape)
        columns = shape[-1]
        if columns % block or size // columns % _ROWS:
            blocks, most = size // (_SLABS * block), _TILE[1] // block
            columns = block * max(n for n in range(1, most + 1) if blocks % n == 0)
        return cls(size // columns // _SLABS, columns, block)

    @property
    def slabs(self) -> tuple[int, int, int]:
        return _SLABS, self.rows, self.columns

    @property
    def scales(self) -> tuple[int, int, int]:
        return _SLABS, self.rows, self.columns // self.block

    @property
    def tile(self) -> tuple[int, int]:
        """Rows of every slab and columns of what is done at a time."""
        columns = min(self.columns, _TILE[1] // self.block * self.block)
        return min(self.rows, _TILE[0]), columns

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.rows // self.tile[0]), -(-self.columns // self.tile[1])


def _encode_view(x: jax.Array, view: _View, scale: Scale, impl: str) -> Any:
    rows, columns = view.tile
    entries = pl.BlockSpec((_SLABS, rows, columns), lambda i, j: (0, i, j))
    scales = pl.BlockSpec((_SLABS, rows, view.scales[2]), lambda i, j: (0, i, 0))
    body = functools.partial(
        _encode_kernel, block=view.block, groups=columns // view.block, scale=scale
    )
    return pl.pallas_call(
        body,
        name="sign_encode",
        grid=view.grid,
        in_specs=[entries],
        out_specs=[pl.BlockSpec((rows, columns), lambda i, j: (i, j)), scales, entries],
        out_shape=[
            struct_like(view.slabs[1:], jnp.int8, x),
            struct_like(view.scales, jnp.float32, x),
            struct_like(view.slabs, jnp.float32, x),
        ],
        compiler_params=parameters(impl, "parallel", "arbitrary", allow_input_fusion=[True]),
        cost_estimate=pl.CostEstimate(
            flops=6 * x.size,
            bytes_accessed=8 * x.size + x.size // 8 + 4 * x.size // view.block,
            transcendentals=0,
        ),
        interpret=interpreter(impl),
    )(x)


def _encode_kernel(
    x_ref: Any,  # float32 [8, rows, columns]
    codes_ref: Any,  # int8 [rows, columns]: the bits of an unsigned byte
    scales_ref: Any,  # float32 [8, rows, blocks]: of whole rows, while the tiles go along them
    decoded_ref: Any,  # float32 [8, rows, columns]
    *,
    block: int,
    groups: int,
    scale: Scale,
) -> None:
    first = pl.program_id(1) * groups
    place = jax.lax.broadcasted_iota(jnp.int32, scales_ref.shape[1:], 1)
    for group in range(groups):
        columns = slice(group * block, (group + 1) * block)
        code = jnp.zeros((x_ref.shape[1], block), jnp.int32)
        for slab in range(_SLABS):
            x = x_ref[slab, :, columns]
            size = _mean_magnitude(x) if scale == "l1" else _root_mean_square(x)
            decoded_ref[slab, :, columns] = jnp.where(x >= 0, size, -size)
            scales_ref[slab] = jnp.where(place == first + group, size, scales_ref[slab])
            power = 1 << slab if slab < 7 else -128  # of a byte with a sign
            code += jnp.where(x >= 0, power, 0)
        codes_ref[:, columns] = code.astype(jnp.int8)


def _mean_magnitude(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(x), axis=1, keepdims=True) / x.shape[1]


def _root_mean_square(x: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    unit = x / jnp.where(largest == 0, 1.0, largest)
    return largest * jnp.sqrt(jnp.sum(jnp.square(unit), axis=1, keepdims=True) / x.shape[1])


def mean(
    worker: jax.Array,
    bits: jax.Array,
    scales: jax.Array,
    *own: jax.Array,
    shape: tuple[int, ...],
    block: int,
    impl: str,
) -> jax.Array:
    """As ``kernels.sign_mean``.

    Args:
      worker: whose message is given, int32 ``[]``.
      bits: uint8 ``[workers, ceil(n / 8)]``.
      scales: float32 ``[workers, ceil(n / block)]``.
      *own: that message, float32 of the shape; or nothing.
      shape: of the messages.
      block: as they were encoded.
      impl: as ``resolve`` gives it.
    """
    view, workers = _View.of(shape, block), len(bits)
    codes = jax.lax.bitcast_convert_type(bits, jnp.int8).reshape(workers, *view.slabs[1:])
    operands = [jnp.reshape(worker, 1), codes, scales.reshape(workers, *view.scales)]
    operands += [x.reshape(view.slabs) for x in own]
    return _mean_view(alike_varying(*operands), view, impl).reshape(shape)


def _mean_view(operands: tuple[jax.Array, ...], view: _View, impl: str) -> jax.Array:
    rows, columns = view.tile
    workers, has_own = len(operands[1]), len(operands) == 4
    size = math.prod(view.slabs)
    entries = pl.BlockSpec((_SLABS, rows, columns), lambda i, j, worker: (0, i, j))
    body = functools.partial(
        _mean_kernel, block=view.block, groups=columns // view.block, workers=workers
    )
    return pl.pallas_call(
        body if has_own else without_own(body),
        name="sign_mean",
        grid=(*view.grid, workers),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((1, rows, columns), lambda i, j, worker: (worker, i, j)),
            pl.BlockSpec((1, _SLABS, rows, view.scales[2]), lambda i, j, worker: (worker, 0, i, 0)),
            *[entries] * has_own,
        ],
        out_specs=entries,
        out_shape=struct_like(view.slabs, jnp.float32, operands[1]),
        compiler_params=parameters(impl, "parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=3 * workers * size,
            bytes_accessed=workers * (size // 8 + 4 * size // view.block)
            + 4 * (1 + has_own) * size,
            transcendentals=0,
        ),
        interpret=interpreter(impl),
    )(*operands)


def _mean_kernel(
    owner_ref: Any,  # int32 [1]
    codes_ref: Any,  # int8 [1, rows, columns], of one worker
    scales_ref: Any,  # float32 [1, 8, rows, blocks], of whole rows
    own_ref: Any,  # float32 [8, rows, columns], or None
    out_ref: Any,  # float32 [8, rows, columns]: the sum, while the workers go by
    *,
    block: int,
    groups: int,
    workers: int,
) -> None:
    first, worker = pl.program_id(1) * groups, pl.program_id(2)
    place = jax.lax.broadcasted_iota(jnp.int32, scales_ref.shape[2:], 1)
    for group in range(groups):
        columns = slice(group * block, (group + 1) * block)
        code = codes_ref[0, :, columns].astype(jnp.int32)
        for slab in range(_SLABS):
            here = jnp.where(place == first + group, scales_ref[0, slab], 0.0)
            size = jnp.sum(here, axis=1, keepdims=True)  # one of these and zeros: exact
            decoded = jnp.where(code & (1 << slab) != 0, size, -size)
            if own_ref is not None:
                decoded = jnp.where(worker == owner_ref[0], own_ref[slab, :, columns], decoded)
            total = jnp.where(worker == 0, 0.0, out_ref[slab, :, columns]) + decoded
            out_ref[slab, :, columns] = jnp.where(worker == workers - 1, total / workers, total)
