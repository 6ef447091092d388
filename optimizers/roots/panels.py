"""QR factors of a stack, panel by panel: products of matrices, and a program of one small QR.

XLA writes a TPU's Householder reflections out, block by block: a QR of 1024 by 1024 compiles some
thirty times longer than a panel of 128 columns.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_suite.core.varying import vary, varying_axes
from jaxopt_suite.optimizers.roots.products import product

_WIDTH = 128  # columns of a panel: a tile of the matrix unit
_TIMES = 4


def panel_qr(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Orthonormal Q with $A = QR$, and the diagonal of R.

    Block Gram-Schmidt: a panel loses its parts along the columns before it and is factorised, again
    and again. Columns that depend on those before come out of the first time with parts along them
    as large as any. A little noise gives them directions to go, also where zeros are exact; the
    second time leaves these, the third little else, and the fourth no more than a QR does. So Q is
    orthonormal to rounding whatever the rank of A.

    Args:
      matrices: ``[k, b, b]``, float32 or float64.

    Returns:
      Q ``[k, b, b]`` and the diagonal ``[k, b]``, whose signs are QR's for each panel.
    """
    size = matrices.shape[-1]
    missing = -size % _WIDTH
    if size <= _WIDTH:
        return _plain(matrices)
    padded = jnp.pad(matrices, [(0, 0), (0, missing), (0, missing)])
    padded += jnp.diag(jnp.arange(size + missing) >= size).astype(padded.dtype)[None]

    def one(i: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        before, diagonal = done  # columns that are still to come are zero
        panel = jax.lax.dynamic_slice_in_dim(padded, i * _WIDTH, _WIDTH, 2)
        noise = _noise(i, panel) * (jnp.arange(size + missing) < size)[None, :, None]

        def again(time: jax.Array, last: tuple[jax.Array, jax.Array]) -> Any:
            panel, lengths = last
            return _freed(before, panel + jnp.where(time == 1, noise, 0), lengths)

        panel, lengths = jax.lax.fori_loop(0, _TIMES, again, (panel, jnp.ones_like(panel[:, 0])))
        before = jax.lax.dynamic_update_slice_in_dim(before, panel, i * _WIDTH, 2)
        return before, jax.lax.dynamic_update_slice_in_dim(diagonal, lengths, i * _WIDTH, 1)

    start = jnp.zeros_like(padded), jnp.zeros_like(padded[:, 0])
    panels = padded.shape[1] // _WIDTH
    start = vary(start, varying_axes(matrices))
    factors, diagonal = jax.lax.fori_loop(0, panels, one, start)
    return factors[:, :size, :size], diagonal[:, :size]


def _noise(i: jax.Array, panel: jax.Array) -> jax.Array:
    """Of the size of an orthonormal panel's rounding errors, another for each panel."""
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), panel.shape[1:])
    return (jnp.finfo(panel.dtype).eps * noise.astype(panel.dtype))[None]


def _freed(before: jax.Array, panel: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The panel without its parts along the columns before it, orthonormal."""
    along = product(before, product(jnp.swapaxes(before, 1, 2), panel))
    panel, diagonal = _plain(panel - along)
    return panel, lengths * diagonal


def _plain(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    factors, triangle = jnp.linalg.qr(matrices)
    return factors, jnp.diagonal(triangle, axis1=1, axis2=2)
