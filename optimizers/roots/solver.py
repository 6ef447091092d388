"""What a root solver is: a frozen object with its settings, and one method."""

import dataclasses
from fractions import Fraction
from typing import NamedTuple

import jax

from jaxopt_suite import core, kernels
from jaxopt_suite.optimizers.roots.damping import Damping, PseudoInverse
from jaxopt_suite.optimizers.roots.stack import Stack


class Solved(NamedTuple):
    """A solver's answer for a stack."""

    root: jax.Array  # [k, b, b]: of the scaled matrices; whatever it likes in the padding
    error: jax.Array  # [k]: residual without a unit, 0 for an exact root
    iterations: jax.Array  # int32 [k]
    largest: jax.Array  # [k]: the largest eigenvalue or an estimate, scaled, before damping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solver:
    """A way to compute inverse roots of a stack of matrices.

    Attributes:
      max_residual: a root whose residual is larger is a failure; above 0. The official codes have
        0.1, which in float32 refuses good roots of rank-deficient matrices: with a damping of 1e-6
        rounding alone leaves up to 0.34 (``benchmarks.roots``). A residual of 0.5 is an error of a
        tenth at p = 4, in one direction.
    """

    max_residual: float = 0.5

    def __post_init__(self) -> None:
        core.check_number("max_residual", self.max_residual, low=0.0, low_open=True)

    def check(self, order: Fraction, damping: Damping) -> None:
        """Raises ``ValueError`` for an order or a damping that this solver cannot serve."""
        del order
        if isinstance(damping, PseudoInverse):
            raise ValueError(
                f"PseudoInverse needs the eigenvalues, so solver must be Eigh, got {self!r}"
            )

    def solve(self, stack: Stack, order: Fraction) -> Solved:
        """Inverse roots of the stack's matrices.

        Args:
          stack: scaled, and still to be damped.
          order: p, for the exponent -1/p.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it solves")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByProducts(Solver):
    """A solver that multiplies polynomials of one matrix, so that its products are symmetric.

    Attributes:
      product_impl: how: ``"auto"``, ``"xla"``, or by the kernel of ``kernels.symmetric_product``,
        for float32 on TPUs and Hopper GPUs, which computes one triangle. Rounding errors that the
        two triangles have each for itself are then the same in both: roots of p = 4 are off by
        twice to three times as much. ``NewtonDB`` multiplies factors that rounding makes commute no
        longer, and stands on that: with symmetric products it diverges from a condition number of
        1e4 on.
    """

    product_impl: kernels.Impl = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        core.check_choice("product_impl", self.product_impl, kernels.IMPLS)

    def multiply(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """The products of two stacks ``[k, b, b]``."""
        return kernels.symmetric_product(a, b, impl=self.product_impl)


def check_whole(order: Fraction, name: str) -> None:
    """Raises ``ValueError`` unless ``order`` is an integer."""
    if order.denominator != 1:
        raise ValueError(
            f"{name} takes integer orders, got {order} (exponent {-1 / order}); Eigh, "
            "CoupledHigherOrder and Chebyshev take rational ones"
        )
