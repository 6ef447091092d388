"""Inverse roots by eigendecomposition."""

import dataclasses
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.optimizers.roots.damping import Damping
from jaxopt_suite.optimizers.roots.products import product
from jaxopt_suite.optimizers.roots.solver import Solved, Solver
from jaxopt_suite.optimizers.roots.stack import Stack, fill_padding, without_padding

_COLUMNS = 16  # as many as a tile of a matrix unit takes for the price of one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eigh(Solver):
    r"""$A = Q \mathrm{diag}(\lambda) Q^T$, and the root is $Q \mathrm{diag}(\lambda^{-1/p}) Q^T$.

    Any order, and every damping. One batched decomposition on accelerators, one matrix after
    another on a CPU (``core.batch_factorisation``).

    In float32 a decomposition has an error of some 1e-7 of the largest eigenvalue: the roots of the
    smallest ones are worse than those of the iterations (``benchmarks.roots``).

    The residual is that of the decomposition, $\max_{ij} |Q^T A Q - \mathrm{diag}(\lambda)|_{ij} /
    \sqrt{\mu_i \mu_j}$ with the eigenvalues µ of which the root was taken: that of $X^p A - I$ but
    for what ``negative`` changed on purpose. Of more than 16 columns j, 16 are looked at: those of
    the 8 least eigenvalues, where rounding counts most, and 8 spread over the others.

    Attributes:
      negative: what becomes of eigenvalues of the damped matrix that are below what was added, as
        rounding makes them. ``"clip"``: they count as that much, as in the code of Anil et al.
        ``"shift"``: all grow by what the least one lacks, as in Meta's paper and code. With a
        pseudo-inverse they are cut off.
    """

    negative: Literal["clip", "shift"] = "clip"

    def __post_init__(self) -> None:
        super().__post_init__()
        core.check_choice("negative", self.negative, ("clip", "shift"))

    def check(self, order: Fraction, damping: Damping) -> None:
        """Takes any order and any damping."""
        del order, damping

    def solve(self, stack: Stack, order: Fraction) -> Solved:
        """See ``Solver.solve``."""
        values, vectors = _ascending(stack.matrices, stack.inside)
        largest = jnp.max(jnp.where(stack.inside, values, 0), axis=1)
        used, kept = self._corrected(values, stack, largest)
        weights = jnp.where(kept, jnp.where(kept, used, 1) ** float(-1 / order), 0)
        root = product(vectors * weights[:, None, :], jnp.swapaxes(vectors, 1, 2))
        error = _residual(stack.matrices, vectors, values, jnp.where(kept, used, jnp.inf))
        return Solved(root, error, jnp.zeros_like(stack.exponent), largest)

    def _corrected(
        self, values: jax.Array, stack: Stack, largest: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The eigenvalues to take roots of, and which directions have one."""
        inside, cutoff = stack.inside, stack.cutoff(largest)
        if cutoff is not None:
            return values, inside & (values > cutoff[:, None])
        ridge = stack.ridge(largest)[:, None]
        if self.negative == "clip":
            return jnp.maximum(values, 0) + ridge, inside
        least = jnp.min(jnp.where(inside, values, 0), axis=1, keepdims=True, initial=0)
        return values - least + ridge, inside


def decompose(matrices: jax.Array, inside: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues ``[k, b]`` in descending order, and eigenvectors ``[k, b, b]`` in columns.

    The padding has eigenvalues below all others, and so comes last; its columns are the identity's.

    Args:
      matrices: ``[k, b, b]``, symmetric, entries of order one at most, zero in the padding.
      inside: bool ``[k, b]``, which rows are not padding.
    """
    values, vectors = _ascending(-matrices, inside)
    vectors = without_padding(vectors, inside)
    return -values, fill_padding(vectors, inside, jnp.ones_like(values[:, 0]))


def _ascending(matrices: jax.Array, inside: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues in ascending order and eigenvectors; the padding comes last, as its rows do."""
    above = 1 + jnp.max(jnp.sum(jnp.abs(matrices), axis=2), axis=1)
    values, rows = core.batch_factorisation(_by_rows, tpu=_jacobi)(
        fill_padding(matrices, inside, above)
    )
    return values, jnp.swapaxes(rows, -1, -2)


def _by_rows(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, and eigenvectors in rows.

    LAPACK counts by columns: to it the transposed matrix, which is the same, and these rows lie in
    memory as they do here, and nothing has to be copied.
    """
    values, vectors = jnp.linalg.eigh(matrix.T, symmetrize_input=False)
    return values, vectors.T


def _jacobi(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same of a batch by rotations: what JAX takes up to 256 rows on TPUs.

    Beyond that its choice is a recursion, which has no types for a ``shard_map`` and takes minutes
    to compile.
    """
    method = jax.lax.linalg.EighImplementation.JACOBI
    vectors, values = jax.lax.linalg.eigh(matrices, symmetrize_input=False, implementation=method)
    return values, jnp.swapaxes(vectors, 1, 2)


def _residual(
    matrices: jax.Array, vectors: jax.Array, values: jax.Array, used: jax.Array
) -> jax.Array:
    """What of some columns of ``Q^T A Q`` the eigenvalues do not explain, in the root's scale."""
    weights = jax.lax.rsqrt(used)
    rows = jnp.swapaxes(_looked_at(vectors) * _looked_at(weights)[:, None, :], 1, 2)
    found = product(rows, matrices, vectors) * weights[:, None, :]
    identity = jnp.eye(values.shape[1], dtype=values.dtype)
    explained = _looked_at(identity).T[None] * (values / used)[:, None, :]
    return jnp.max(jnp.abs(found - explained), axis=(1, 2))


def _looked_at(columns: jax.Array) -> jax.Array:
    """Those, of columns in ascending order of the eigenvalues, where a residual shows."""
    b, half = columns.shape[-1], _COLUMNS // 2
    if b <= _COLUMNS:
        return columns
    others = columns[..., half :: (b - half) // half][..., :half]
    return jnp.concatenate([columns[..., :half], others], axis=-1)
