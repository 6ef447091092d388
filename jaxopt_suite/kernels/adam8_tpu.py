"""The kernel of ``adam8`` for TPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxopt_suite.kernels import adam8_tile, dynamic8
from jaxopt_suite.kernels.calls_tpu import interpreter, parameters
from jaxopt_suite.kernels.implementations import struct_like

_ENTRIES = 2**18  # of a tile
_GROUPS = 8  # blocks side by side in a tile, at most: their scales lie in tiles of 8 by 128
_ROWS = 128  # of a tile, or all there are
_OPERATIONS = 150  # an entry, counted in the kernel's program


def update(
    numbers: jax.Array, gradient: jax.Array, *moments: jax.Array, block: int, impl: str
) -> tuple[jax.Array, ...]:
    """The direction and the moments of ``kernels.adam8_update``, of one matrix.

    Args:
      numbers: of the step, float32 ``[7]``.
      gradient: ``[rows, columns]``.
      *moments: the codes and scales of both, codes uint8 ``[rows, columns]``, scales float32
        ``[blocks, rows]``.
      block: a multiple of 128.
      impl: as ``resolve`` gives it.
    """
    (rows, columns), blocks = gradient.shape, len(moments[1])
    groups = min(_GROUPS, blocks)
    height = min(rows, max(_ROWS, _ENTRIES // (groups * block) // _ROWS * _ROWS))
    entries = pl.BlockSpec((height, groups * block), lambda i, j: (i, j))
    scales = pl.BlockSpec((groups, height), lambda i, j: (j, i))
    body = functools.partial(_kernel, block=block, groups=groups, columns=columns)
    return pl.pallas_call(
        body,
        name="adam8_update",
        grid=(-(-rows // height), -(-blocks // groups)),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), entries, *[entries, scales] * 2],
        out_specs=[entries, *[entries, scales] * 2],
        out_shape=[struct_like(x.shape, x.dtype, gradient) for x in (gradient, *moments)],
        # All but the numbers. The interpreter pads what it writes over, and does not cut it again.
        input_output_aliases={} if impl == "interpret" else {i + 1: i for i in range(5)},
        compiler_params=parameters(impl, "parallel", "parallel"),
        cost_estimate=pl.CostEstimate(
            flops=_OPERATIONS * gradient.size,
            bytes_accessed=(4 + 2 * gradient.dtype.itemsize) * gradient.size + 16 * rows * blocks,
            transcendentals=gradient.size,
        ),
        interpret=interpreter(impl),
    )(numbers, gradient, *moments)


def _kernel(
    numbers_ref: Any,  # float32 [7]
    gradient_ref: Any,  # [rows, groups of B columns]
    mu_ref: Any,  # uint8, likewise
    mu_scales_ref: Any,  # float32 [groups, rows]
    nu_ref: Any,
    nu_scales_ref: Any,
    direction_ref: Any,
    new_mu_ref: Any,
    new_mu_scales_ref: Any,
    new_nu_ref: Any,
    new_nu_scales_ref: Any,
    *,
    block: int,
    groups: int,
    columns: int,
) -> None:
    signed, unsigned = dynamic8.code_book(True), dynamic8.code_book(False)
    numbers = [numbers_ref[i] for i in range(7)]
    mu_scales, nu_scales = mu_scales_ref[...].T, nu_scales_ref[...].T
    new_scales = []
    for group in range(groups):
        part, own = slice(group * block, (group + 1) * block), slice(group, group + 1)
        g = gradient_ref[:, part].astype(jnp.float32)
        mu = adam8_tile.entries(mu_ref[:, part], signed) * mu_scales[:, own]
        nu = adam8_tile.entries(nu_ref[:, part], unsigned) * nu_scales[:, own]
        inside = None
        if columns % block:  # what lies beyond the end of a row is anything
            start = (pl.program_id(1) * groups + group) * block
            inside = jax.lax.broadcasted_iota(jnp.int32, g.shape, 1) < columns - start
        mu, nu, direction = adam8_tile.moved(g, mu, nu, numbers, inside)
        direction_ref[:, part] = direction.astype(direction_ref.dtype)
        new_mu_ref[:, part], mu_scale = _written(mu, signed)
        new_nu_ref[:, part], nu_scale = _written(nu, unsigned)
        new_scales.append((mu_scale, nu_scale))
    for ref, columns_of in zip(
        (new_mu_scales_ref, new_nu_scales_ref), zip(*new_scales, strict=True), strict=True
    ):
        ref[...] = jnp.concatenate(columns_of, axis=1).T


def _written(x: Any, book: dynamic8.CodeBook) -> tuple[Any, Any]:
    """Codes of a block a row, uint8, and its scale ``[rows, 1]``."""
    scale = adam8_tile.scale(jnp.max(jnp.abs(x), axis=1, keepdims=True))
    return adam8_tile.nearest(x, adam8_tile.divisor(scale), book), scale
