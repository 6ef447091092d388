"""Inverse roots by a Chebyshev polynomial of fixed degree."""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_suite import core
from jaxopt_suite.optimizers.roots.iterations import SCALES, ScaleName, spectral_scale
from jaxopt_suite.optimizers.roots.products import (
    Multiply,
    identity_like,
    residual,
    symmetric_part,
)
from jaxopt_suite.optimizers.roots.solver import ByProducts, Solved
from jaxopt_suite.optimizers.roots.stack import Stack, damped, without_padding

_NODES = 10_000  # as many as DASH has

_Pair = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chebyshev(ByProducts):
    r"""A polynomial in A, by Clenshaw's recurrence; ``degree - 1`` products, whatever the matrix.

    The series $\sum_k c_k T_k$ of $x^{-1/p}$ on $[\epsilon, 1 + \epsilon]$, taken at $A/s$ with $s
    \ge \lambda_{\max}$, is $(A/s + \epsilon I)^{-1/p}$ but for the truncation, and the result is
    that times $s^{-1/p}$: a factor which the code of DASH leaves out, so that its preconditioner
    does not scale with the gradient (a graft hides it).

    **It is an approximation**, and ε is damping besides what is added to A. The truncation's error
    falls like $e^{-2\sqrt\epsilon\,\mathrm{degree}}$: at ε = 4/degree² it is some percent. DASH's
    ε of 1e-10 is not resolved by any degree in use: at p = 4 and degree 60 that is a ripple of 20 %
    over the whole spectrum, and at p = 1 or 2 nothing of use. Since eigenvalues below ε s are far
    from inverted, ``max_residual`` is 2: what it finds is a spectrum outside the interval, where
    the polynomial explodes.

    Attributes:
      degree: at least 2; 20 in DASH's code, 60 in its runs.
      epsilon: where the interval begins, relative to s, in (0, 1]; ``None`` is 4/degree².
      scale: s, see ``spectral_scale``.

    References:
      Modoranu et al., "DASH: Faster Shampoo via Batched Block Preconditioning and Efficient
      Inverse-Root Solvers", 2026, arXiv:2602.02016.
    """

    degree: int = 60
    epsilon: float | None = None
    scale: ScaleName = "frobenius"
    max_residual: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        core.check_int("degree", self.degree, low=2)
        if self.epsilon is not None:
            core.check_number("epsilon", self.epsilon, low=0.0, high=1.0, low_open=True)
        core.check_choice("scale", self.scale, SCALES)

    def solve(self, stack: Stack, order: Fraction) -> Solved:
        """See ``Solver.solve``."""
        ready = damped(stack)
        scale = spectral_scale(ready, self.scale)
        shifted = (2 / scale)[:, None, None] * ready.matrices - identity_like(ready.matrices)
        epsilon = 4 / self.degree**2 if self.epsilon is None else self.epsilon
        series = jnp.asarray(coefficients(self.degree, epsilon, order), scale.dtype)
        root = _clenshaw(shifted, series, self.multiply)
        root = root * (scale ** float(-1 / order))[:, None, None]
        root = without_padding(symmetric_part(root), stack.inside)
        error = residual(root, ready.matrices, ready.inside, order.numerator, order.denominator)
        steps = jnp.full_like(stack.exponent, self.degree)
        return Solved(root, error, steps, ready.largest)


@functools.cache
def coefficients(degree: int, epsilon: float, order: Fraction) -> np.ndarray:
    """Chebyshev coefficients c_0 to c_degree of ``x**(-1/order)`` on ``[epsilon, 1 + epsilon]``.

    Returns:
      float64 ``[degree + 1]``, c_0 halved: the sum of ``c_k T_k(2 (x - epsilon) - 1)``.
    """
    angles = np.pi * (np.arange(_NODES) + 0.5) / _NODES
    values = (0.5 * np.cos(angles) + 0.5 + epsilon) ** float(-1 / order)
    found = 2 / _NODES * np.cos(np.outer(np.arange(degree + 1), angles)) @ values
    found[0] /= 2
    return found


def _clenshaw(s: jax.Array, series: jax.Array, multiply: Multiply) -> jax.Array:
    """``sum_k series[k] T_k(s)`` for matrices with spectrum in [-1, 1]."""
    identity = identity_like(s)

    def step(later: _Pair, c: jax.Array) -> tuple[_Pair, None]:
        first, second = later
        return (2 * multiply(s, first) - second + c * identity, first), None

    last = jnp.zeros_like(s) + series[-1] * identity
    before = 2 * series[-1] * s + series[-2] * identity
    (first, second), _ = jax.lax.scan(step, (before, last), series[-3:0:-1])
    return multiply(s, first) - second + series[0] * identity
