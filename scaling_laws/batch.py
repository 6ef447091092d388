"""Batches of fits: starts, resamples, held parameters and data sets, all through one program.

Programs have fixed shapes. A batch goes through in chunks of problems; after every few steps those
that are done leave and the rest close ranks, so that a slow one does not hold up the others.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxopt_suite.scaling_laws import solver
from jaxopt_suite.scaling_laws.double import in_double
from jaxopt_suite.scaling_laws.law import Law
from jaxopt_suite.scaling_laws.objectives import Objective
from jaxopt_suite.scaling_laws.solver import Local, Problem, Rows, Settings, State

CHUNK = 256  # problems in one program: with 240 runs and 5 parameters 2.5 MB of Jacobians
SMALL_CHUNK = 16
CHUNK_ROWS = 2**20  # at most so many rows in one program
STEPS = 6  # between two looks at which problems are done
MOST_STEPS = 600

ACCEPTED = 1e-6  # cosine below which a gradient counts as zero
NOTHING_LEFT = 1e-11  # root mean square of residuals that are round-off


@dataclasses.dataclass(frozen=True)
class Solutions:
    """Where a batch of problems ended; arrays have a leading axis [problems].

    Attributes:
      theta: solver vectors, ``[problems, p]``.
      local: the objective there, at the objective's own delta.
      steps: taken or refused.
    """

    theta: np.ndarray
    local: Local
    steps: np.ndarray

    @property
    def value(self) -> np.ndarray:
        """The minimised sum; infinite where it is not a number."""
        return np.where(np.isfinite(self.local.value), self.local.value, np.inf)

    @property
    def solved(self) -> np.ndarray:
        """Which have a gradient of zero within ``ACCEPTED``, or nothing left; ``bool``."""
        return (self.local.cosine <= ACCEPTED) | (self.local.level <= NOTHING_LEFT)

    def take(self, index: Any) -> "Solutions":
        """Those of some problems."""
        return jax.tree.map(lambda a: a[index], self)

    def replace(self, index: np.ndarray, others: "Solutions") -> "Solutions":
        """These, with the problems of ``index`` exchanged for others."""

        def exchanged(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            old = old.copy()
            old[index] = new
            return old

        return jax.tree.map(exchanged, self, others)


jax.tree_util.register_dataclass(Solutions)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What the problems of a batch have in common.

    Attributes:
      law: to fit.
      objective: to minimise.
      rows: ``[n]`` each, or ``[problems, n]`` where every problem has its own.
      centring: matrix ``[p, p]`` of ``coordinates.centring``.
    """

    law: Law
    objective: Objective
    rows: Rows
    centring: np.ndarray

    def problems(self, count: int, weights: Any, low: Any, high: Any) -> Problem:
        """Weights ``[n]`` and bounds ``[p]`` as those of ``count`` problems; a leading axis is kept."""
        n, p = self.rows.observed.shape[-1], len(self.law.names)
        spread = lambda a, size: np.broadcast_to(np.asarray(a, np.float64), (count, size))
        return Problem(spread(weights, n), spread(low, p), spread(high, p))

    @in_double
    def view(self, theta: np.ndarray, problem: Problem) -> Solutions:
        """The objective at given vectors ``[problems, p]``, which stay where they are."""
        run = _viewer(self.law, self.objective.space, self._own_rows)
        found = _empty(theta)
        for index in self._chunks(np.arange(len(theta))):
            local = run(theta[index], _at(problem, index), self._rows(index), self._settings())
            _store(found.local, index, local)
        return found

    @in_double
    def solve(self, theta: np.ndarray, problem: Problem, *, stages: int = 0) -> Solutions:
        """Minimises from given vectors.

        Args:
          theta: starts ``[problems, p]``; they are clipped into their boxes.
          problem: weights and bounds with a leading axis, from ``problems``.
          stages: how many times tenfold delta is narrowed on the way.
        """
        run = _program(self.law, self.objective.space, self._own_rows)
        state = _begin(np.clip(theta, problem.low, problem.high), stages)
        found = _empty(state.theta)
        waiting = np.arange(len(theta))
        while len(waiting):
            for index in self._chunks(waiting):
                own = _at(problem, index)
                out = run(_at(state, index), own, self._rows(index), self._settings())
                _store((state, found.local), index, out)
            unfinished = ~state.done[waiting] & (state.steps[waiting] < MOST_STEPS)
            waiting = waiting[unfinished]
        return Solutions(state.theta, found.local, state.steps)

    @property
    def _own_rows(self) -> bool:
        return np.ndim(self.rows.observed) == 2

    def _rows(self, index: np.ndarray) -> Rows:
        return _at(self.rows, index) if self._own_rows else self.rows

    def _settings(self) -> Settings:
        back = np.linalg.inv(self.centring)
        return Settings(self.objective.delta, self.objective.q, self.centring, back)

    def _chunks(self, waiting: np.ndarray) -> Iterator[np.ndarray]:
        """Indices in pieces of one size; the last is filled up with repeats of its first."""
        most = max(SMALL_CHUNK, min(CHUNK, CHUNK_ROWS // self.rows.observed.shape[-1]))
        size = SMALL_CHUNK if len(waiting) <= SMALL_CHUNK else most
        for first in range(0, len(waiting), size):
            piece = waiting[first : first + size]
            yield np.concatenate([piece, np.repeat(piece[:1], size - len(piece))])


def stages(objective: Objective, rows: Rows) -> int:
    """How often tenfold narrowing takes delta from the spread of the data to its own value."""
    if not np.isfinite(objective.delta):
        return 0
    widest = 1.0 if objective.space == "log" else float(np.ptp(rows.observed))
    return max(0, int(np.ceil(np.log10(max(widest, objective.delta) / objective.delta))))


def _begin(theta: np.ndarray, stages: int) -> State:
    count = len(theta)
    full = lambda value, dtype: np.full(count, value, dtype)
    return State(
        theta=theta.astype(np.float64),
        damping=full(solver.FIRST_DAMPING, np.float64),
        growth=full(4.0, np.float64),
        stage=full(stages, np.int32),
        age=full(0, np.int32),
        steps=full(0, np.int32),
        done=full(False, bool),
    )


def _empty(theta: np.ndarray) -> Solutions:
    """Solutions of which nothing but the vectors is known."""
    count, p = theta.shape
    scalar, matrix = np.full(count, np.inf), np.full((count, p, p), np.nan)
    local = Local(
        value=scalar.copy(),
        gradient=np.full((count, p), np.nan),
        hessian=matrix.copy(),
        majoriser=matrix.copy(),
        level=scalar.copy(),
        held=np.zeros((count, p), bool),
        cosine=scalar.copy(),
    )
    return Solutions(theta, local, np.zeros(count, np.int32))


def _at(tree: Any, index: np.ndarray) -> Any:
    return jax.tree.map(lambda a: a[index], tree)


def _store(tree: Any, index: np.ndarray, results: Any) -> None:
    """Writes a chunk's results where they belong; repeats write the same numbers again."""
    for array, result in zip(jax.tree.leaves(tree), jax.tree.leaves(results), strict=True):
        array[index] = np.asarray(result)


def _advance(
    law: Law, space: str, state: State, problem: Problem, rows: Rows, settings: Settings
) -> tuple[State, Local]:
    """A few steps of one problem, and the objective where they end."""
    around = lambda theta, stage: solver.look(law, space, theta, problem, rows, settings, stage)
    once = lambda _, carry: solver.iterate(around, problem, settings, *carry)
    start = (state, around(state.theta, state.stage))
    return jax.lax.fori_loop(0, STEPS, once, start)


def _view(
    law: Law, space: str, theta: Any, problem: Problem, rows: Rows, settings: Settings
) -> Local:
    return solver.look(law, space, theta, problem, rows, settings)


@functools.lru_cache(maxsize=128)
def _program(law: Law, space: str, own_rows: bool) -> Callable[..., tuple[State, Local]]:
    """``_advance`` compiled for chunks; with ``own_rows`` the rows have a leading axis too."""
    axes = (0, 0, 0 if own_rows else None, None)
    return jax.jit(jax.vmap(functools.partial(_advance, law, space), in_axes=axes))


@functools.lru_cache(maxsize=128)
def _viewer(law: Law, space: str, own_rows: bool) -> Callable[..., Local]:
    axes = (0, 0, 0 if own_rows else None, None)
    return jax.jit(jax.vmap(functools.partial(_view, law, space), in_axes=axes))
