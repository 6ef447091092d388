"""Newton-DB: square roots and inverse square roots together, in products only."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.optimizers.roots.damping import Damping
from jaxopt_suite.optimizers.roots.iterations import (
    SCALES,
    ScaleName,
    Values,
    check_iterations,
    iterate,
    spectral_scale,
)
from jaxopt_suite.optimizers.roots.products import (
    distance_to_identity,
    identity_like,
    product,
    residual,
    symmetric_part,
)
from jaxopt_suite.optimizers.roots.solver import Solved, Solver
from jaxopt_suite.optimizers.roots.stack import Stack, damped, fill_padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewtonDB(Solver):
    r"""Denman and Beavers' iteration in product form, for p a power of two.

    With $s \ge \lambda_{\max}$, from $Y = A/s$ and $Z = I$:

    $$E = \tfrac32 I - \tfrac12 ZY, \quad Y \leftarrow YE, \quad Z \leftarrow EZ,$$

    until $\max_{ij}|ZY - I|$ is at most ``tolerance``: then $\sqrt s\, Y = A^{1/2}$ and
    $Z/\sqrt s = A^{-1/2}$. For p = 4 the square root, with scale s, is followed by its inverse
    square root, with scale $\sqrt s$; and so on. A step is three products, and the first of each
    stage two.

    Departures from DASH: it makes 10 steps of each stage, whatever the matrix
    (``max_iterations=10, tolerance=None``), which gives up to twice the root where an eigenvalue is
    about 1e-4 of the largest, so that the residual is of order ten; ours goes on until each matrix
    has converged. Its scale is computed in bfloat16, ours in the matrices' dtype.

    Attributes:
      max_iterations: of each stage, at least 1.
      tolerance: at least 0; ``None`` makes exactly ``max_iterations`` steps.
      scale: s, see ``spectral_scale``; DASH's default is ``"power"``.

    References:
      Denman and Beavers, "The Matrix Sign Function and Computations in Systems", 1976; Modoranu et
      al., "DASH: Faster Shampoo via Batched Block Preconditioning and Efficient Inverse-Root
      Solvers", 2026, arXiv:2602.02016.
    """

    max_iterations: int = 50
    tolerance: float | None = 1e-6
    scale: ScaleName = "frobenius"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_iterations(self.max_iterations, self.tolerance)
        core.check_choice("scale", self.scale, SCALES)

    def check(self, order: Fraction, damping: Damping) -> None:
        """See ``Solver.check``."""
        super().check(order, damping)
        p = order.numerator
        if order.denominator != 1 or p < 2 or p & (p - 1):
            raise ValueError(
                f"NewtonDB takes orders that are powers of two (2, 4, 8, ...), got {order}"
            )

    def solve(self, stack: Stack, order: Fraction) -> Solved:
        """See ``Solver.solve``."""
        ready = damped(stack)
        scale = spectral_scale(ready, self.scale)
        matrices = fill_padding(ready.matrices, ready.inside, scale)
        iterations = jnp.zeros((), jnp.int32)
        for _ in range(order.numerator.bit_length() - 2):
            matrices, _, turns = self._stage(matrices, scale)
            scale, iterations = jnp.sqrt(scale), iterations + turns
        _, root, turns = self._stage(matrices, scale)
        error = residual(root, ready.matrices, ready.inside, order.numerator)
        return Solved(root, error, iterations + turns, ready.largest)

    def _stage(
        self, matrices: jax.Array, scale: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Square roots, inverse square roots, and how many steps they took ``[k]``."""
        done = iterate(
            _step,
            lambda values: distance_to_identity(values[2]),
            _first_step(matrices / scale[:, None, None]),
            max_iterations=self.max_iterations - 1,
            tolerance=self.tolerance,
        )
        y, z, _ = map(symmetric_part, done.values)
        root_of_scale = jnp.sqrt(scale)[:, None, None]
        return y * root_of_scale, z / root_of_scale, done.iterations + 1


def _correction(zy: jax.Array) -> jax.Array:
    return 1.5 * identity_like(zy) - 0.5 * zy


def _first_step(a: jax.Array) -> Values:
    """Y, Z and ZY after a step from Y = A and Z = I."""
    z = _correction(a)
    y = product(a, z)
    return y, z, product(z, y)


def _step(values: Values) -> Values:
    y, z, zy = values
    e = _correction(zy)
    y, z = product(y, e), product(e, z)
    return y, z, product(z, y)
