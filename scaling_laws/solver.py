r"""Many robust fits at once: damped Newton steps on the true objective, vectorised over problems.

For $F(\theta) = \sum_i w_i \rho_\delta(r_i(\theta))$ with the Jacobian $J$ of the residuals, a step
is

$$(H + \lambda D)\, s = -J^\top w \psi, \qquad
H = J^\top \mathrm{diag}(w \rho'') J + \sum_i w_i \psi_i \nabla^2 r_i,$$

the semi-smooth Newton step, or, where that matrix is not positive definite, the Levenberg-Marquardt
step with $B = J^\top \mathrm{diag}(w \min(1, \delta/|r|)) J$ (iteratively re-weighted least
squares) in place of $H$. $D$ is the diagonal of $B$ in centred coordinates, which makes damping
independent of the scales of the parameters. A step is taken if the true objective falls, and
$\lambda$ follows.

*Continuation.* Huber's $\delta$ starts wide and is narrowed tenfold whenever the problem with the
present one is nearly solved: far from the data almost all residuals would be in the linear part.

*Bounds* are a box: a parameter at a bound with the gradient pointing out is held, the others move,
and a step that would leave the box is clipped (Bertsekas 1982). Equal bounds hold a parameter.

*Convergence.* The gradient is measured as the cosine between the weighted residuals and each
centred column of the Jacobian, over the parameters free to move; a problem is done when the largest
is below ``GRADIENT``, when the residuals are at round-off, or when no damping makes the objective
fall. Nothing here claims success: ``certificate`` judges.

This file is one problem; ``batch`` runs many at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite.scaling_laws import coordinates, objectives
from jaxopt_suite.scaling_laws.law import Law

GRADIENT = 1e-9  # cosine at which a problem is solved; round-off allows about 1e-13
NEARLY = 1e-2  # cosine at which a wider delta has served
PATIENCE = 12  # steps at a wider delta, at most
ROUND_OFF = 1e-14  # root mean square of residuals that is as good as none
FIRST_DAMPING = 1e-3
FIRST_GROWTH = 4.0
LEAST_DAMPING = 1e-14
LEAST_LENGTH = 1e-12  # squared length of a column, relative to the longest
STUCK = 1e12  # damping beyond which no step helps


class Rows(NamedTuple):
    """The runs a problem is fitted to."""

    inputs: dict[str, Any]  # float64 [n] each
    observed: Any  # float64 [n]


class Problem(NamedTuple):
    """What sets one problem of a batch apart, besides its start and rows."""

    weights: Any  # float64 [n]
    low: Any  # float64 [p]
    high: Any  # float64 [p]


class Settings(NamedTuple):
    """What the problems of a batch share; traced, so that no value of it compiles anew."""

    delta: Any  # float64 []: of the objective
    q: Any  # float64 []
    centring: Any  # float64 [p, p]
    back: Any  # float64 [p, p]: its inverse


class State(NamedTuple):
    """Where one problem stands."""

    theta: Any  # float64 [p]
    damping: Any  # float64 []
    growth: Any  # float64 []: factor of the damping after the next refusal
    stage: Any  # int32 []: delta is 10**stage times that of the objective
    age: Any  # int32 []: steps in this stage
    steps: Any  # int32 []: steps in all
    done: Any  # bool []


class Local(NamedTuple):
    """The objective around a point, in solver coordinates."""

    value: Any  # float64 []: F
    gradient: Any  # float64 [p]
    hessian: Any  # float64 [p, p]: H
    majoriser: Any  # float64 [p, p]: B
    level: Any  # float64 []: root mean square of the residuals, weighted as in B
    held: Any  # bool [p]: parameters at a bound that the gradient presses against
    cosine: Any  # float64 []: the measure of convergence


def look(
    law: Law,
    space: str,
    theta: Any,
    problem: Problem,
    rows: Rows,
    settings: Settings,
    stage: Any = 0,
) -> Local:
    """Value and derivatives of the objective at one point ``theta [p]``, with a wider delta."""

    def residuals(theta: Any) -> Any:
        predicted = law.predict(coordinates.from_theta(law, theta), rows.inputs)
        return objectives.residual(space, predicted, rows.observed)

    delta, q = settings.delta * 10.0**stage, settings.q
    r, push = jax.linearize(residuals, theta)
    jacobian = jax.vmap(push)(jnp.eye(theta.size))  # [p, n]
    pull = problem.weights * objectives.psi(r, delta, q)
    irls = problem.weights * objectives.majoriser(r, delta, q)
    smooth = problem.weights * objectives.curvature(r, delta, q)
    bend = jax.hessian(lambda t: jnp.sum(pull * residuals(t)))(theta)
    gradient, majoriser = jacobian @ pull, (jacobian * irls[None, :]) @ jacobian.T
    squares = jnp.sum(irls * r * r)
    held = _held(theta, gradient, problem)
    return Local(
        value=jnp.sum(problem.weights * objectives.rho(r, delta, q)),
        gradient=gradient,
        hessian=(jacobian * smooth[None, :]) @ jacobian.T + bend,
        majoriser=majoriser,
        level=jnp.sqrt(squares / jnp.sum(irls)),
        held=held,
        cosine=_cosine(jnp.where(held, 0.0, gradient), majoriser, squares, settings.back),
    )


def _held(theta: Any, gradient: Any, problem: Problem) -> Any:
    low, high = problem.low, problem.high
    outwards = ((theta <= low) & (gradient > 0)) | ((theta >= high) & (gradient < 0))
    return outwards | (low == high)


def _lengths(majoriser: Any, back: Any) -> Any:
    """Squared lengths ``[p]`` of the weighted Jacobian's centred columns."""
    return jnp.sum(back * (majoriser @ back), axis=0)


def _cosine(free: Any, majoriser: Any, squares: Any, back: Any) -> Any:
    size = jnp.sqrt(jnp.maximum(_lengths(majoriser, back), 0.0) * squares)
    return jnp.max(jnp.abs(back.T @ free) / jnp.maximum(size, jnp.finfo(size.dtype).tiny))


def damped_step(local: Local, damping: Any, settings: Settings) -> Any:
    """The step ``[p]`` of the module's text; zero for parameters that are held."""
    lengths = _lengths(local.majoriser, settings.back)
    # A term that has vanished has a column of zeros: it is damped too, or nothing could move.
    lengths = jnp.maximum(lengths, LEAST_LENGTH * jnp.max(lengths))
    added = damping * (settings.centring.T * lengths[None, :]) @ settings.centring
    blocked = local.held[:, None] | local.held[None, :]
    eye = jnp.eye(local.held.size)
    factor = lambda matrix: jnp.linalg.cholesky(jnp.where(blocked, eye, matrix + added))
    newton, safe = factor(local.hessian), factor(local.majoriser)
    lower = jnp.where(jnp.all(jnp.isfinite(newton)), newton, safe)
    free = jnp.where(local.held, 0.0, local.gradient)
    return -jax.scipy.linalg.cho_solve((lower, True), free)


def _better(there: Local, here: Local) -> Any:
    """Whether a trial is better: a lower value, or an equal one (within round-off) and calmer."""
    falls = there.value < here.value
    level = there.value <= here.value + 1e-14 * jnp.abs(here.value)
    return jnp.all(jnp.isfinite(there.hessian)) & (falls | (level & (there.cosine < here.cosine)))


def iterate(
    around: Callable[[Any, Any], Local],
    problem: Problem,
    settings: Settings,
    state: State,
    here: Local,
) -> tuple[State, Local]:
    """One step of one problem, or one look from the same point with a narrower delta.

    Args:
      around: ``look`` as a function of theta and stage.
      problem: with the bounds.
      settings: of the batch.
      state: where the problem stands.
      here: the objective there.

    Returns:
      The next state and the objective there; both unchanged, but for ``done``, if it is solved.
    """
    solved = (here.cosine <= GRADIENT) | (here.level <= ROUND_OFF) | ~(state.damping <= STUCK)
    served = solved | (here.cosine <= NEARLY) | (state.age >= PATIENCE)
    narrow = (state.stage > 0) & served
    stage = jnp.where(narrow, state.stage - 1, state.stage)
    done = state.done | (solved & (state.stage == 0))

    move = jnp.where(narrow, 0.0, damped_step(here, state.damping, settings))
    trial = jnp.clip(state.theta + move, problem.low, problem.high)
    there = around(trial, stage)
    taken = narrow | _better(there, here)
    damping = jnp.where(
        taken, jnp.maximum(state.damping / 6, LEAST_DAMPING), state.damping * state.growth
    )
    after = State(
        theta=jnp.where(taken, trial, state.theta),
        damping=jnp.where(narrow, FIRST_DAMPING, damping),
        growth=jnp.where(taken, FIRST_GROWTH, 2 * state.growth),
        stage=stage,
        age=jnp.where(narrow, 0, state.age + 1),
        steps=state.steps + 1,
        done=done,
    )
    return _choose(done, state._replace(done=done), after), _choose(taken & ~done, there, here)


def _choose(condition: Any, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)
