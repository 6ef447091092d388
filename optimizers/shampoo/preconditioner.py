"""Kronecker-factored preconditioners of stacked blocks: their statistics, and roots of these."""

import dataclasses
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core, kernels
from jaxopt_suite.optimizers import roots
from jaxopt_suite.optimizers.shampoo import kronecker
from jaxopt_suite.optimizers.shampoo.batches import update_in_batches


class Preconditioner(NamedTuple):
    """Of a stack of blocks ``[rows, d1, ..., dk]``."""

    factors: tuple[jax.Array, ...]  # factor_dtype [rows, di, di] for each mode: statistics
    weights: jax.Array  # f32 or f64 [rows, k]: sum of the weights of the mean's gradients
    roots: tuple[jax.Array, ...]  # root_dtype [rows, di, di] for each mode: the roots in use
    failures: jax.Array  # int32 [rows, k]: how often in a row the root has failed


class InUse(NamedTuple):
    """What a refresh writes of a ``Preconditioner``; or of one of its modes."""

    weights: jax.Array  # [rows, k], of one mode [rows]
    roots: Any  # a tuple of [rows, di, di], of one mode that
    failures: jax.Array  # int32 [rows, k], of one mode [rows]


@dataclasses.dataclass(frozen=True)
class Kronecker:
    """How preconditioners are kept.

    Attributes:
      b2: decay of the statistics; 1 is a sum.
      exponent: of the roots, above 0; ``None`` is 1/(2k) for blocks of k dimensions.
      solver: takes the roots.
      damping: of the statistics, before that.
      bias_correction: whether a mean is corrected for its beginning at zero.
      factor_dtype: of the statistics; ``None`` is that of the arithmetic.
      root_dtype: of the roots in use; ``None`` likewise.
      gram_impl: how the statistics are updated, see ``kernels.gram_update``.
    """

    b2: jax.typing.ArrayLike
    exponent: Fraction | None
    solver: roots.Solver
    damping: roots.Damping
    bias_correction: bool
    factor_dtype: Any
    root_dtype: Any
    gram_impl: kernels.Impl

    def init(self, rows: int, block: tuple[int, ...], dtype: Any) -> Preconditioner:
        """No statistics, and roots that are the identity.

        Raises:
          ValueError: if the solver cannot take the roots of such blocks.
        """
        self.solver.check(self._order(len(block)), self.damping)
        eye = lambda d: jnp.eye(d, dtype=self.root_dtype or dtype)
        return Preconditioner(
            factors=tuple(jnp.zeros((rows, d, d), self.factor_dtype or dtype) for d in block),
            weights=jnp.zeros((rows, len(block)), dtype),
            roots=tuple(jnp.broadcast_to(eye(d), (rows, d, d)) for d in block),
            failures=jnp.zeros((rows, len(block)), jnp.int32),
        )

    def observe(
        self, factors: Any, weights: jax.Array, gradients: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Statistics, and their weights, with a step's gradients ``[rows, d1, ..., dk]``."""
        weight = jnp.asarray(jnp.where(self.b2 == 1, 1.0, 1.0 - self.b2), gradients.dtype)
        decay = jnp.asarray(self.b2, gradients.dtype)
        new = kronecker.observe(factors, gradients, decay, weight, self.gram_impl)
        return new, (decay * weights + weight).astype(weights.dtype)

    def refresh(
        self, due: dict[str, InUse], factors: dict[str, tuple[jax.Array, ...]]
    ) -> dict[str, InUse]:
        """New roots for all that are given; matrices of one size and order are one batch.

        A root that fails leaves the one before in use, and so does a statistic of zeros, whose
        root says nothing but how small the damping is. Of a statistic that is not finite the
        weight becomes zero, see ``begun_anew``.
        """
        places = {
            (name, mode): (
                InUse(part.weights[:, mode], part.roots[mode], part.failures[:, mode]),
                factor,
            )
            for name, part in due.items()
            for mode, factor in enumerate(factors[name])
        }
        order = lambda place: self._order(len(factors[place[0]]))
        fresh = update_in_batches(self._refresh_batch, places, order)
        modes = {name: [fresh[name, i] for i in range(len(x))] for name, x in factors.items()}
        return {
            name: InUse(
                weights=jnp.stack([mode.weights for mode in found], axis=1),
                roots=tuple(mode.roots for mode in found),
                failures=jnp.stack([mode.failures for mode in found], axis=1),
            )
            for name, found in modes.items()
        }

    def _refresh_batch(self, order: Fraction, old: InUse, factors: jax.Array) -> InUse:
        """The same for matrices ``[n, d, d]`` of one size."""
        statistic = factors.astype(jnp.promote_types(factors.dtype, jnp.float32))
        statistic = statistic / self._correction(old.weights).astype(statistic.dtype)[:, None, None]
        found = roots.inverse_root(
            statistic, order, solver=self.solver, damping=self.damping, symmetrize_input=False
        )
        new, failures = roots.keep_last_good(found, old.roots, old.failures)
        return InUse(
            weights=core.where_rows(found.finite, old.weights, 0),
            roots=core.where_rows(found.largest > 0, new, old.roots),
            failures=failures,
        )

    def begun_anew(
        self, factors: tuple[jax.Array, ...], weights: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Statistics, zero where a refresh has found that they are not finite.

        They would never be so again. As it is rare, nothing is written where there is none.
        """
        lost = weights == 0  # after a step's gradients each weight is above zero
        zeroed = lambda factors: tuple(
            core.where_rows(~lost[:, mode], x, 0) for mode, x in enumerate(factors)
        )
        branches = core.alike([zeroed, lambda same: same], factors)
        return jax.lax.cond(jnp.any(lost), *branches, factors)

    def _order(self, modes: int) -> Fraction:
        return 1 / (self.exponent or Fraction(1, 2 * modes))

    def _correction(self, weights: jax.Array) -> jax.Array:
        """What statistics are divided by; ``1 - b2**t`` for those of t gradients."""
        used = self.bias_correction & (self.b2 != 1) & (weights > 0)
        return jnp.where(used, weights, 1)
