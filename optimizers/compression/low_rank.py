"""A matrix as the product of two thin ones, by one step of the power method, as in PowerSGD.

A tensor is seen as a matrix X with m rows and c columns: its last axis, which is the output axis of
a Flax kernel, against all others together. Then P̂ = orth(X Q), Q' = Xᵀ P̂ and C(X) = P̂ Q'ᵀ, the
projection of X on the span of P̂. The compressor draws Q anew for every tensor. A method that starts
from the last step's Q, and averages X Q and Xᵀ P̂ over the workers, calls the four steps itself; for
a stack of matrices it wraps them in ``jax.vmap``.

Orthogonalisation is Gram-Schmidt, each column against all before it, twice, which leaves it
orthogonal to rounding. It needs only matrix products, whose result is the same on every replica and
every stack; r is small, so the r steps cost less than X Q. A Cholesky factor of PᵀP squares the
condition number and fails on dependent columns; Householder QR makes up directions for them, and
calls a solver that works through a stack matrix by matrix on GPUs.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.optimizers.compression.compressor import Compressor, Shape

_PRECISION = jax.lax.Precision.HIGHEST  # a TPU's default multiplies float32 as bfloat16
_DEPENDENT = 1e-5  # what is left of a dependent column is rounding, some 1e-7 of it


class LowRankPayload(NamedTuple):
    """What ``low_rank`` sends for a tensor with m rows and c columns."""

    p_hat: jax.Array  # float32 [m, r]: orthonormal columns, or zero ones
    q: jax.Array  # float32 [c, r]


def low_rank(rank: int) -> Compressor:
    """The projection of a matrix on ``rank`` random directions of its range.

    Args:
      rank: r; lowered to the smaller side of the matrix. Tensors of fewer than two axes, and those
        whose factors would be no smaller, r(m + c) ≥ mc, are sent as they are.

    Returns:
      4 r (m + c) bytes. In expectation over Q, δ = r / min(m, c): with A the diagonal matrix of
      squared singular values, and U an orthonormal basis of the span of Q as the right singular
      vectors see it, the energy kept is tr((UᵀAU)⁻¹ UᵀA²U) ≥ tr(UᵀAU), whose mean over a uniformly
      random span is r/min(m, c) of tr A. Gradients, whose spectrum falls, do far better. A zero
      matrix gives zeros; a non-finite entry makes the whole tensor non-finite.
    """
    core.check_int("rank", rank, low=1)

    def encode(x: jax.Array, key: jax.Array) -> LowRankPayload | jax.Array:
        sizes = factor_sizes(x.shape, rank)
        if sizes is None:
            return x.reshape(-1)
        _, columns, r = sizes
        p_hat = orthogonalise(factor(x, jax.random.normal(key, (columns, r))))
        return LowRankPayload(p_hat, cofactor(x, p_hat))

    def decode(payload: LowRankPayload | jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        if isinstance(payload, LowRankPayload):
            return rebuild(payload.p_hat, payload.q, like.shape)
        return payload.reshape(like.shape)

    def nbytes(shape: Shape) -> int:
        sizes = factor_sizes(shape, rank)
        return 4 * (math.prod(shape) if sizes is None else (sizes[0] + sizes[1]) * sizes[2])

    def contraction(shape: Shape) -> float:
        sizes = factor_sizes(shape, rank)
        return 1.0 if sizes is None else sizes[2] / min(sizes[:2])

    return Compressor(
        name="low_rank",
        encode=encode,
        decode=decode,
        nbytes=nbytes,
        linear=False,  # the orthogonalisation is not
        shared_key=False,
        block=0,
        contraction=contraction,
        variance=None,
    )


def factor_sizes(shape: Shape, rank: int) -> tuple[int, int, int] | None:
    """Rows m, columns c and rank r of the factors, or ``None`` if they would save nothing."""
    if len(shape) < 2:
        return None
    rows, columns = math.prod(shape[:-1]), shape[-1]
    r = min(rank, rows, columns)
    return (rows, columns, r) if r * (rows + columns) < rows * columns else None


def factor(x: jax.Array, q: jax.Array) -> jax.Array:
    """P = X Q, ``[m, r]``; its mean over workers is that of the mean X.

    Args:
      x: float32 tensor, m rows and c columns as a matrix.
      q: float32 ``[c, r]``.
    """
    return jnp.matmul(_matrix(x), q, precision=_PRECISION)


def cofactor(x: jax.Array, p_hat: jax.Array) -> jax.Array:
    """Q' = Xᵀ P̂, ``[c, r]``; its mean over workers is that of the mean X.

    Args:
      x: float32 tensor, m rows and c columns as a matrix.
      p_hat: float32 ``[m, r]``.
    """
    return jnp.matmul(_matrix(x).T, p_hat, precision=_PRECISION)


def rebuild(p_hat: jax.Array, q: jax.Array, shape: Shape) -> jax.Array:
    """The tensor P̂ Qᵀ of the given shape."""
    return jnp.matmul(p_hat, q.T, precision=_PRECISION).reshape(shape)


def _matrix(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def orthogonalise(p: jax.Array) -> jax.Array:
    """Orthonormal columns with the span of those of ``p``, from the first to the last.

    A column that depends on those before it comes out as zeros, as does a zero column: P̂P̂ᵀ is then
    still the projection on the span. NaN and infinity come out as NaN.

    Args:
      p: float32 ``[m, r]``.

    Returns:
      float32 ``[m, r]``.
    """
    p = _scale_columns(p)
    column_ids = jnp.arange(p.shape[1])[None, :]

    def orthogonalise_one(j: jax.Array, done: jax.Array) -> jax.Array:
        column = jax.lax.dynamic_index_in_dim(done, j, axis=1, keepdims=False)
        before = jnp.where(column_ids < j, done, 0.0)
        rest = column
        for _ in range(2):
            overlap = jnp.matmul(before.T, rest, precision=_PRECISION)
            rest = rest - jnp.matmul(before, overlap, precision=_PRECISION)
        norm = jnp.linalg.norm(rest)
        dependent = norm <= _DEPENDENT * jnp.linalg.norm(column)
        unit = jnp.where(dependent, 0.0, rest / jnp.where(dependent, 1.0, norm))
        return jax.lax.dynamic_update_index_in_dim(done, unit, j, axis=1)

    return jax.lax.fori_loop(0, p.shape[1], orthogonalise_one, p)


def _scale_columns(p: jax.Array) -> jax.Array:
    """Columns whose largest entry is ±1, so that no square leaves float32's range."""
    scale = jnp.max(jnp.abs(p), axis=0, keepdims=True)
    return p / jnp.where(scale == 0, 1.0, scale)


def revive(
    q: jax.Array, previous: jax.Array, *, total: Callable[[jax.Array], jax.Array] = lambda x: x
) -> jax.Array:
    """``q`` with its columns of zeros replaced by those of ``previous``, both ``[c, r]``.

    A start from a zero column would stay zero for ever. One appears where X is zero or has a rank
    below r.

    Args:
      q: the new factor.
      previous: what takes the place of its columns of zeros.
      total: adds up, over the devices that hold the other rows, what this one has of each column.
    """
    size = total(jnp.sum(jnp.abs(q), axis=0, keepdims=True))
    return jnp.where(size == 0, previous, q)
