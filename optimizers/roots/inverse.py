"""The one function for inverse roots, whatever the solver, and the guard for what comes of it."""

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers.roots.chebyshev import Chebyshev
from jaxopt_suite.optimizers.roots.damping import Damping, Relative, check_damping
from jaxopt_suite.optimizers.roots.newton import CoupledHigherOrder, CoupledNewton
from jaxopt_suite.optimizers.roots.newton_db import NewtonDB
from jaxopt_suite.optimizers.roots.solver import Solver
from jaxopt_suite.optimizers.roots.spectral import Eigh
from jaxopt_suite.optimizers.roots.stack import (
    make_stack,
    times_power_of_two,
    unscaled,
    without_padding,
)

SOLVERS: dict[str, type[Solver]] = {
    "eigh": Eigh,
    "coupled_newton": CoupledNewton,
    "coupled_higher_order": CoupledHigherOrder,
    "newton_db": NewtonDB,
    "chebyshev": Chebyshev,
}


class RootResult(NamedTuple):
    """Inverse roots of a stack, and how far they can be trusted."""

    root: jax.Array  # f32 or f64 [k, b, b]: symmetric, finite; zero in the padding
    error: jax.Array  # same dtype [k]: residual without a unit; inf where there is no number
    ok: jax.Array  # bool [k]: the input and the root are finite, and the residual is small
    iterations: jax.Array  # int32 [k]: steps of the solver; 0 for Eigh
    largest: jax.Array  # same dtype [k]: the largest eigenvalue, with Eigh; else an estimate
    finite: jax.Array  # bool [k]: whether the input is


def inverse_root(
    matrices: jax.Array,
    order: int | Fraction,
    *,
    solver: str | Solver = "eigh",
    damping: Damping = Relative(),  # noqa: B008  frozen
    sizes: jax.Array | None = None,
    symmetrize_input: bool = True,
) -> RootResult:
    r"""$(A + \rho I)^{-1/p}$ of every symmetric positive semidefinite matrix of a stack.

    Nothing raises for a bad matrix: of one that is not finite, or whose root is not, the root is
    zeros, the error infinite and ``ok`` false, and all other matrices are what they would be
    without it. Of a zero matrix the root is a finite multiple of the identity under the default
    damping. Eigenvalues that are negative by rounding are covered by the damping.

    Scale costs nothing: each matrix is divided by a power of two first, so that entries from 1e-25
    to the largest float32 give the same digits. Arithmetic is in float32, or in float64 if the
    matrices are; products ask for full precision (``roots.products`` says what that costs).

    The stack may be spread over devices: inside ``jax.shard_map`` there is no communication;
    outside, the partitioner adds one Boolean's reduction a turn of an iteration that stops by
    itself, none for one of fixed length.

    | solver | orders | products of b-by-b matrices |
    |---|---|---|
    | ``Eigh`` | any | a decomposition, and 1 |
    | ``CoupledNewton`` | integers | 4 a step at p = 4, 3 at 2; then 3 |
    | ``CoupledHigherOrder`` | any | 1 a step more at its order of 3 |
    | ``NewtonDB`` | 2, 4, 8, ... | 3 a step, in log2(p) stages; then 3 |
    | ``Chebyshev`` | any | its degree - 1, and 3 |

    Args:
      matrices: real floating ``[k, b, b]``; the symmetric part counts, see ``symmetrize_input``.
      order: p of the exponent -1/p, an int or ``Fraction`` above 0: ``Fraction(5, 2)`` for -2/5.
      solver: one of ``SOLVERS`` by name, with its defaults, or an object.
      damping: ρ: ``Relative``, ``Absolute``, or ``PseudoInverse`` (with ``Eigh``).
      sizes: int32 ``[k]``, from 0 to b: the true size of each matrix, where smaller ones are
        padded to b. Nothing in the padding is read, and the result is that of the matrix without
        it; a size of 0 makes a filler. ``None``: all are of size b.
      symmetrize_input: take the symmetric part first. ``False`` says that the matrices are
        symmetric but for rounding, as sums of ``G G^T`` are: on a CPU, where adding the transpose
        is a sixth of a decomposition's time, ``Eigh`` then reads one triangle, and others the
        matrix as it is.

    Returns:
      A ``RootResult``.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if it has a wrong shape or value, or the solver cannot serve the order or damping.
    """
    solver = make_solver(solver)
    check_damping(damping)
    order = _checked_order(order)
    solver.check(order, damping)
    stack = make_stack(matrices, damping, sizes, symmetrize_input)
    solved = solver.solve(stack, order)
    root = unscaled(without_padding(solved.root, stack.inside), stack.exponent, order)
    there = stack.finite & jnp.all(jnp.isfinite(root), axis=(1, 2)) & jnp.isfinite(solved.error)
    return RootResult(
        root=jnp.where(there[:, None, None], root, 0),
        error=jnp.where(there, solved.error, jnp.inf),
        ok=there & (solved.error <= solver.max_residual),
        iterations=solved.iterations,
        largest=times_power_of_two(solved.largest, stack.exponent),
        finite=stack.finite,
    )


def make_solver(solver: str | Solver) -> Solver:
    """A solver from its name, or the one that is given.

    Raises:
      TypeError: if it is neither.
      ValueError: if there is none of that name.
    """
    if isinstance(solver, str):
        core.check_choice("solver", solver, tuple(SOLVERS))
        return SOLVERS[solver]()
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a name or a roots.Solver, got {solver!r}")
    return solver


def _checked_order(order: int | Fraction) -> Fraction:
    if isinstance(order, bool) or not isinstance(order, int | Fraction):
        raise TypeError(f"order must be an int or a fractions.Fraction, got {order!r}")
    if order <= 0:
        raise ValueError(f"order must be above 0, got {order}")
    return Fraction(order)


def keep_last_good(
    result: RootResult, previous: jax.Array, failures: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The new roots where they are good, the previous ones where not.

    Selected, not blended: 0 * NaN is NaN.

    Args:
      result: of ``inverse_root``.
      previous: ``[k, b, b]``, the roots in use; the identity to begin with.
      failures: int32 ``[k]``, how often in a row each matrix has failed.

    Returns:
      The roots to use, in the dtype of ``previous``, and the new counts: 0 where a root is new.
    """
    good = result.ok[:, None, None]
    roots = jnp.where(good, result.root.astype(previous.dtype), previous)
    return roots, jnp.where(result.ok, 0, optax.safe_increment(failures))
