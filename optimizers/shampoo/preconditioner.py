"""Kronecker-factored preconditioners of stacked blocks: their statistics, and roots of these."""

import dataclasses
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import kernels
from jaxopt_suite.optimizers import roots
from jaxopt_suite.optimizers.shampoo import kronecker
from jaxopt_suite.optimizers.shampoo.batches import in_batches
from jaxopt_suite.optimizers.shampoo.blocks import where_rows


class Preconditioner(NamedTuple):
    """Of a stack of blocks ``[rows, d1, ..., dk]``."""

    factors: tuple[jax.Array, ...]  # factor_dtype [rows, di, di] for each mode: statistics
    weights: jax.Array  # f32 or f64 [rows, k]: sum of the weights of the mean's gradients
    roots: tuple[jax.Array, ...]  # root_dtype [rows, di, di] for each mode: the roots in use
    failures: jax.Array  # int32 [rows, k]: how often in a row the root has failed


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

    def observe(self, old: Preconditioner, gradients: jax.Array) -> Preconditioner:
        """With the statistics of a step's gradients ``[rows, d1, ..., dk]``."""
        weight = jnp.asarray(jnp.where(self.b2 == 1, 1.0, 1.0 - self.b2), gradients.dtype)
        decay = jnp.asarray(self.b2, gradients.dtype)
        new = kronecker.observe(old.factors, gradients, decay, weight, self.gram_impl)
        weights = (decay * old.weights + weight).astype(old.weights.dtype)
        return old._replace(factors=new, weights=weights)

    def apply(self, part: Preconditioner, blocks: jax.Array) -> jax.Array:
        """The blocks, multiplied along every mode by its root."""
        return kronecker.multiply(blocks, part.roots)

    def refresh(self, due: dict[str, Preconditioner]) -> dict[str, Preconditioner]:
        """New roots for all that are given; matrices of one size and order are one batch.

        A root that fails leaves the one before in use, and so does a statistic of zeros, whose
        root says nothing but how small the damping is. A statistic that is not finite will never
        be so again: it begins anew from zero, and so does the sum of its weights.
        """
        places = {
            (name, mode): (
                factor,
                part.weights[:, mode],
                part.roots[mode],
                part.failures[:, mode],
            )
            for name, part in due.items()
            for mode, factor in enumerate(part.factors)
        }
        order = lambda place: self._order(len(due[place[0]].factors))
        fresh = in_batches(self._refresh_batch, places, order)
        collected = {
            name: zip(*(fresh[name, mode] for mode in range(len(part.factors))), strict=True)
            for name, part in due.items()
        }
        return {
            name: Preconditioner(
                factors, jnp.stack(weights, axis=1), in_use, jnp.stack(failures, axis=1)
            )
            for name, (factors, weights, in_use, failures) in collected.items()
        }

    def _refresh_batch(
        self,
        order: Fraction,
        factors: jax.Array,
        weights: jax.Array,
        in_use: jax.Array,
        failures: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """The same for matrices ``[n, d, d]`` of one size."""
        statistic = factors.astype(jnp.promote_types(factors.dtype, jnp.float32))
        statistic = statistic / self._correction(weights).astype(statistic.dtype)[:, None, None]
        found = roots.inverse_root(statistic, order, solver=self.solver, damping=self.damping)
        new, failures = roots.keep_last_good(found, in_use, failures)
        return (
            where_rows(found.finite, factors, 0),
            where_rows(found.finite, weights, 0),
            where_rows(found.largest > 0, new, in_use),
            failures,
        )

    def _order(self, modes: int) -> Fraction:
        return 1 / (self.exponent or Fraction(1, 2 * modes))

    def _correction(self, weights: jax.Array) -> jax.Array:
        """What statistics are divided by; ``1 - b2**t`` for those of t gradients."""
        used = self.bias_correction & (self.b2 != 1) & (weights > 0)
        return jnp.where(used, weights, 1)
