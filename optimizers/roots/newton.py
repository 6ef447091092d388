"""Coupled Newton iterations for inverse p-th roots: of second order, and of any higher one."""

import dataclasses
import functools
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.optimizers.roots.damping import Damping
from jaxopt_suite.optimizers.roots.iterations import (
    SCALES,
    Iterated,
    ScaleName,
    Values,
    check_iterations,
    iterate,
    spectral_scale,
)
from jaxopt_suite.optimizers.roots.products import (
    Multiply,
    distance_to_identity,
    identity_like,
    power,
    residual,
    symmetric_part,
)
from jaxopt_suite.optimizers.roots.solver import ByProducts, Solved, check_whole
from jaxopt_suite.optimizers.roots.stack import Damped, Stack, damped, fill_padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoupledNewton(ByProducts):
    r"""Coupled inverse Newton iteration, for integer p.

    With $s \ge \lambda_{\max}$ and $z = (p+1)/(2s)$, from $X = z^{1/p} I$ and $M = zA$:

    $$N = I + (I - M)/p, \quad X \leftarrow XN, \quad M \leftarrow N^p M,$$

    until $\max_{ij}|M - I|$ is at most ``tolerance``; $M = X^p A$ throughout. At p = 4 a step is
    four products. Small eigenvalues are approached from below, by (1 + 1/p) a step: after n steps
    no eigenvalue of X exceeds $((1+1/p)^n)\, z^{1/p}$, so that few steps are damping by themselves,
    of which the residual then is up to 1: give a ``max_residual`` above it.

    Departures from the code of Meta and of DASH: each matrix stops by itself (DASH stops the
    stack together), and one whose error grows, or no longer falls, stops too.

    Attributes:
      max_iterations: at least 1. 100 in the code of Meta and of Google, 10 in DASH.
      tolerance: at least 0; ``None`` makes exactly ``max_iterations`` steps.
      scale: s, see ``spectral_scale``.

    References:
      Guo and Higham, "A Schur-Newton Method for the Matrix pth Root and its Inverse", 2006; Anil et
      al., "Scalable Second Order Optimization for Deep Learning", 2020, arXiv:2002.09018.
    """

    max_iterations: int = 100
    tolerance: float | None = 1e-6
    scale: ScaleName = "frobenius"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_iterations(self.max_iterations, self.tolerance)
        core.check_choice("scale", self.scale, SCALES)

    def check(self, order: Fraction, damping: Damping) -> None:
        """See ``Solver.check``."""
        super().check(order, damping)
        check_whole(order, "CoupledNewton")

    def solve(self, stack: Stack, order: Fraction) -> Solved:
        """See ``Solver.solve``."""
        p, ready = order.numerator, damped(stack)
        z = (p + 1) / (2 * spectral_scale(ready, self.scale))
        step = functools.partial(_step, p=p, order=2, multiply=self.multiply)
        done = _iterate(step, _begin(ready, z, p), self.max_iterations, self.tolerance)
        return _finish(ready, done, order, self.multiply)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoupledHigherOrder(ByProducts):
    r"""Coupled iteration of order r: N is a polynomial of degree r - 1 instead of 1.

    With $E = I - M$, N is the beginning of the series of $(I - E)^{-1/p}$,

    $$N = \sum_{i<r} c_i E^i, \quad c_0 = 1, \quad c_i = c_{i-1} \frac{1 + (i-1)p}{ip},$$

    by Horner's rule: r - 2 products more in a step than Newton's, in fewer steps. It starts from
    $z = 1/\mathrm{tr}(A)$ with one step of Newton. A rational p = a/b is the b-th power of the
    root of order a, and the residual is that of the latter.

    Departures from Meta's code: it stops a stalled iteration when the error repeats to the last
    bit, ours when it is no longer halved; it raises on a residual above 0.1, ours says so in
    ``ok``.

    Attributes:
      order: r, at least 2; 2 is Newton's method.
      max_iterations: at least 1, the first step included.
      tolerance: at least 0; ``None`` makes exactly ``max_iterations`` steps.

    References:
      Lakić, "On the Computation of the Matrix k-th Root", 1998; Shi et al., "A Distributed
      Data-Parallel PyTorch Implementation of the Distributed Shampoo Optimizer", 2023,
      arXiv:2309.06497, whose code has it.
    """

    order: int = 3
    max_iterations: int = 100
    tolerance: float | None = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        core.check_int("order", self.order, low=2)
        check_iterations(self.max_iterations, self.tolerance)

    def solve(self, stack: Stack, order: Fraction) -> Solved:
        """See ``Solver.solve``."""
        p, ready = order.numerator, damped(stack)
        trace = jnp.trace(ready.matrices, axis1=1, axis2=2)
        z = 1 / jnp.maximum(trace, jnp.finfo(trace.dtype).tiny ** 0.5)
        step = functools.partial(_step, p=p, multiply=self.multiply)
        begun = step(_begin(ready, z, p), order=2)
        step = functools.partial(step, order=self.order)
        done = _iterate(step, begun, self.max_iterations - 1, self.tolerance)
        done = done._replace(iterations=done.iterations + 1)
        return _finish(ready, done, order, self.multiply)


def _begin(stack: Damped, z: jax.Array, p: int) -> Values:
    """X and M to begin with; in the padding M is the identity, and stays it."""
    filled = fill_padding(stack.matrices, stack.inside, 1 / z)
    start = identity_like(filled) * (z ** (1 / p))[:, None, None]
    return start, filled * z[:, None, None]


def _step(values: Values, p: int, order: int, multiply: Multiply) -> Values:
    x, m = values
    identity = identity_like(m)
    error = identity - m
    *lower, n = _coefficients(p, order)
    factor = lower.pop() * identity + n * error
    for c in reversed(lower):
        factor = c * identity + multiply(factor, error)
    return multiply(x, factor), multiply(power(factor, p, multiply), m)


def _coefficients(p: int, order: int) -> list[float]:
    """Of ``(1 - e)**(-1/p)`` in powers of e, the first ``order``."""
    found = [1.0]
    for i in range(1, order):
        found.append(found[-1] * (1 + (i - 1) * p) / (i * p))
    return found


def _iterate(
    step: Callable[[Values], Values],
    begun: Values,
    max_iterations: int,
    tolerance: float | None,
) -> Iterated:
    return iterate(
        step,
        lambda values: distance_to_identity(values[1]),
        begun,
        max_iterations=max_iterations,
        tolerance=tolerance,
    )


def _finish(stack: Damped, done: Iterated, order: Fraction, multiply: Multiply) -> Solved:
    """Residual of the root of the numerator's order, and its power."""
    root = symmetric_part(done.values[0])
    error = residual(root, stack.matrices, stack.inside, order.numerator)
    return Solved(power(root, order.denominator, multiply), error, done.iterations, stack.largest)
