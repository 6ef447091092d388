"""Projections of a matrix onto few dimensions: singular vectors, or single rows.

For a matrix ``[..., m, n]`` let a = min(m, n) and b = max(m, n); leading axes are a stack of
matrices. A matrix is *tall* if m > n and *wide* otherwise, so a square one is wide: its last axis,
the output axis of a Flax kernel, plays the part of the first axis of a PyTorch weight.

- A *basis* projection keeps r orthonormal directions of the smaller side, ``[..., a, r]``; what is
  projected has shape ``[..., b, r]``.
- A *row* projection keeps r indices into the larger side, int32 ``[..., r]``; what is projected has
  shape ``[..., r, a]``.

The same rank r therefore stores rb + ra elements in the one case and ra + r in the other.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from jaxopt_suite import core

ProjectionName = Literal["svd", "approx_svd", "uniform_rows", "top_rows"]
PROJECTIONS = ("svd", "approx_svd", "uniform_rows", "top_rows")


@dataclasses.dataclass(frozen=True)
class Projection:
    """How to choose, apply and lift a projection; all of it for gradients ``[..., m, n]``.

    Attributes:
      init: ``(shape, dtype) -> projector``: a legal projector before any gradient was seen.
      fit: ``(gradient [m, n], key) -> projector``: chooses one; for a single matrix.
      down: ``(projector, x) -> projected``.
      add_up: ``(projector, x, projected) -> x + lift(projected)``, shape of ``x``.
    """

    init: Callable[[tuple[int, ...], jnp.dtype], jax.Array]
    fit: Callable[[jax.Array, jax.Array], jax.Array]
    down: Callable[[jax.Array, jax.Array], jax.Array]
    add_up: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def make_projection(
    name: ProjectionName, rank: int, *, sketch_scale: int | None = None
) -> Projection:
    """Builds one of the projections, all of whose shapes are fixed by ``rank`` and the matrix's
    shape.

    Args:
      name: ``"svd"``: the top r singular vectors of the smaller side. ``"approx_svd"``: the same,
        of a sketch of the gradient: the larger side is mixed by a subsampled randomised Hadamard
        transform down to ``sketch_scale * rank`` (exact where that is not fewer). ``"top_rows"``:
        the r rows of a tall matrix, columns of a wide one, of largest norm. ``"uniform_rows"``: r
        of them at random.
      rank: r, at least 1; clipped to a for a basis, to b for rows.
      sketch_scale: for ``"approx_svd"`` only; ``None`` is 2.

    Returns:
      The projection.

    Raises:
      ValueError, TypeError: for a bad argument, or a ``sketch_scale`` with no use.
    """
    core.check_choice("projection", name, PROJECTIONS)
    core.check_int("rank", rank, low=1)
    if name == "approx_svd":
        scale = 2 if sketch_scale is None else sketch_scale
        core.check_int("sketch_scale", scale, low=1)
        return _basis(rank, lambda tall, key: _sketch(tall, key, scale * rank))
    if sketch_scale is not None:
        raise ValueError(
            f"sketch_scale={sketch_scale!r} is for projection='approx_svd', got {name!r}"
        )
    if name == "svd":
        return _basis(rank, lambda tall, key: tall)
    return _rows(rank, uniform=name == "uniform_rows")


def _is_tall(shape: tuple[int, ...]) -> bool:
    return shape[-2] > shape[-1]


def _as_tall(x: jax.Array) -> jax.Array:
    """The matrix with its larger side first: ``[..., b, a]``."""
    return x if _is_tall(x.shape) else jnp.swapaxes(x, -1, -2)


def _basis(rank: int, sketch: Callable[[jax.Array, jax.Array], jax.Array]) -> Projection:
    def init(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        a = min(shape[-2:])
        eye = jnp.eye(a, min(rank, a), dtype=dtype)
        return jnp.broadcast_to(eye, (*shape[:-2], *eye.shape))

    def fit(gradient: jax.Array, key: jax.Array) -> jax.Array:
        a = min(gradient.shape)
        _, _, vectors = jnp.linalg.svd(sketch(_as_tall(gradient), key), full_matrices=False)
        return vectors[: min(rank, a)].T

    def down(basis: jax.Array, x: jax.Array) -> jax.Array:
        spec = "...mn,...nr->...mr" if _is_tall(x.shape) else "...mn,...mr->...nr"
        return jnp.einsum(spec, x, basis)

    def add_up(basis: jax.Array, x: jax.Array, projected: jax.Array) -> jax.Array:
        spec = "...mr,...nr->...mn" if _is_tall(x.shape) else "...nr,...mr->...mn"
        return x + jnp.einsum(spec, projected, basis)

    return Projection(init, fit, down, add_up)


def _sketch(tall: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """``[b, a] -> [min(size, B), a]``: sampled rows of a Hadamard transform with random signs.

    B is the power of two not below b. Row i of the Hadamard matrix has entries (-1)**popcount(i &
    j), so the sampled rows are written down directly and the transform is one matrix product.
    """
    b = tall.shape[0]
    order = 1 << max(0, b - 1).bit_length()
    size = min(size, order)
    sign_key, row_key = jax.random.split(key)
    signs = jax.random.rademacher(sign_key, (b,), tall.dtype)
    rows = _distinct(row_key, order, size)
    parity = jnp.bitwise_count(rows[:, None] & jnp.arange(b)[None, :]) & 1
    mixing = (1 - 2 * parity.astype(tall.dtype)) * signs[None, :]  # the count is unsigned
    return mixing @ tall / math.sqrt(size)


def _distinct(key: jax.Array, population: int, size: int) -> jax.Array:
    """``size`` different integers below ``population``, uniformly; int32 ``[size]``."""
    return jax.lax.top_k(jax.random.uniform(key, (population,)), size)[1].astype(jnp.int32)


def _rows(rank: int, *, uniform: bool) -> Projection:
    def init(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        del dtype  # indices
        rows = jnp.arange(min(rank, max(shape[-2:])), dtype=jnp.int32)
        return jnp.broadcast_to(rows, (*shape[:-2], *rows.shape))

    def fit(gradient: jax.Array, key: jax.Array) -> jax.Array:
        tall = _as_tall(gradient)
        r = min(rank, tall.shape[0])
        if uniform:
            return _distinct(key, tall.shape[0], r)
        return jax.lax.top_k(jnp.sum(jnp.square(tall), axis=1), r)[1].astype(jnp.int32)

    def down(rows: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(_as_tall(x), rows[..., None], axis=-2)

    def add_up(rows: jax.Array, x: jax.Array, projected: jax.Array) -> jax.Array:
        add = lambda x, i, p: x.at[i].add(p) if _is_tall(x.shape) else x.at[:, i].add(p.T)
        for _ in x.shape[:-2]:
            add = jax.vmap(add)
        return add(x, rows, projected)

    return Projection(init, fit, down, add_up)
