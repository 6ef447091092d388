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
STEPS = 4  # between two looks at which problems are done
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
      weights: of rows, ``[n]``, for problems that have none of their own.
      low: bounds ``[p]`` of the solver vector, likewise; equal ones hold a parameter.
      high: likewise.
    """

    law: Law
    objective: Objective
    rows: Rows
    centring: np.ndarray
    weights: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def stages(self) -> int:
        """How often tenfold narrowing takes delta from the spread of the data to its own value."""
        delta = self.objective.delta
        if not np.isfinite(delta):
            return 0
        widest = 1.0 if self.objective.space == "log" else float(np.ptp(self.rows.observed))
        return max(0, int(np.ceil(np.log10(max(widest, delta) / delta))))

    @property
    def back(self) -> np.ndarray:
        """From centred coordinates to the solver vector, ``[p, p]``."""
        return np.linalg.inv(self.centring)

    def problems(
        self, count: int, *, weights: Any = None, low: Any = None, high: Any = None
    ) -> Problem:
        """``count`` problems with the batch's weights and bounds, or with others.

        What is given has the batch's shape, or a leading axis ``[count]`` besides.
        """
        given = (weights, low, high)
        ours = (self.weights, self.low, self.high)
        return Problem(
            *(
                np.broadcast_to(a if b is None else b, (count, a.size))
                for a, b in zip(ours, given, strict=True)
            )
        )

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
        local = _empty(state.theta).local
        waiting = np.arange(len(theta))
        while len(waiting):
            for index in self._chunks(waiting):
                own = _at((state, local, problem), index)
                out = run(*own, self._rows(index), self._settings())
                _store((state, local), index, out)
            unfinished = ~state.done[waiting] & (state.steps[waiting] < MOST_STEPS)
            waiting = waiting[unfinished]
        return Solutions(state.theta, local, state.steps)

    @property
    def _own_rows(self) -> bool:
        return np.ndim(self.rows.observed) == 2

    def _rows(self, index: np.ndarray) -> Rows:
        return _at(self.rows, index) if self._own_rows else self.rows

    def _settings(self) -> Settings:
        return Settings(self.objective.delta, self.objective.q, self.centring, self.back)

    def _chunks(self, waiting: np.ndarray) -> Iterator[np.ndarray]:
        """Indices in pieces of one size; the last is filled up with repeats of its first."""
        most = max(SMALL_CHUNK, min(CHUNK, CHUNK_ROWS // self.rows.observed.shape[-1]))
        size = SMALL_CHUNK if len(waiting) <= SMALL_CHUNK else most
        for first in range(0, len(waiting), size):
            piece = waiting[first : first + size]
            yield np.concatenate([piece, np.repeat(piece[:1], size - len(piece))])


def _begin(theta: np.ndarray, stages: int) -> State:
    """States before the first look, one stage too wide: the first step narrows, and looks."""
    count = len(theta)
    full = lambda value, dtype: np.full(count, value, dtype)
    return State(
        theta=theta.astype(np.float64),
        damping=full(solver.FIRST_DAMPING, np.float64),
        growth=full(solver.FIRST_GROWTH, np.float64),
        stage=full(stages + 1, np.int32),
        age=full(0, np.int32),
        steps=full(0, np.int32),
        done=full(False, bool),
    )


def _empty(theta: np.ndarray) -> Solutions:
    """Solutions of which nothing but the vectors is known; a cosine of 0 says: go on."""
    count, p = theta.shape
    local = Local(
        value=np.full(count, np.inf),
        gradient=np.zeros((count, p)),
        hessian=np.zeros((count, p, p)),
        majoriser=np.zeros((count, p, p)),
        level=np.zeros(count),
        held=np.zeros((count, p), bool),
        cosine=np.zeros(count),
    )
    return Solutions(theta, local, np.zeros(count, np.int32))


def _at(tree: Any, index: np.ndarray) -> Any:
    return jax.tree.map(lambda a: a[index], tree)


def _store(tree: Any, index: np.ndarray, results: Any) -> None:
    """Writes a chunk's results where they belong; repeats write the same numbers again."""
    for array, result in zip(jax.tree.leaves(tree), jax.tree.leaves(results), strict=True):
        array[index] = np.asarray(result)


def _advance(
    law: Law,
    space: str,
    state: State,
    local: Local,
    problem: Problem,
    rows: Rows,
    settings: Settings,
) -> tuple[State, Local]:
    """A few steps of one problem, from its state and the objective there to the next of both."""
    around = lambda theta, stage: solver.look(law, space, theta, problem, rows, settings, stage)
    once = lambda _, carry: solver.iterate(around, problem, settings, *carry)
    return jax.lax.fori_loop(0, STEPS, once, (state, local))


def _view(
    law: Law, space: str, theta: Any, problem: Problem, rows: Rows, settings: Settings
) -> Local:
    return solver.look(law, space, theta, problem, rows, settings)


@functools.lru_cache(maxsize=128)
def _program(law: Law, space: str, own_rows: bool) -> Callable[..., tuple[State, Local]]:
    """``_advance`` compiled for chunks; with ``own_rows`` the rows have a leading axis too."""
    axes = (0, 0, 0, 0 if own_rows else None, None)
    return jax.jit(jax.vmap(functools.partial(_advance, law, space), in_axes=axes))


@functools.lru_cache(maxsize=128)
def _viewer(law: Law, space: str, own_rows: bool) -> Callable[..., Local]:
    axes = (0, 0, 0 if own_rows else None, None)
    return jax.jit(jax.vmap(functools.partial(_view, law, space), in_axes=axes))
