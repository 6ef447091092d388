"""Two programs timed in turns, so that whatever else the machine does falls on both."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.step_time.programs import Program
from jaxopt_suite.experiments import model
from jaxopt_suite.parallel import make_train_step


class Runner:
    """A program with its buffers; each call makes one update and waits for it.

    ``draws`` are gradients, of which each update takes the next, over and over.
    """

    def __init__(
        self, program: Program, tx: optax.GradientTransformation, params: Any, draws: Sequence[Any]
    ) -> None:
        self._step = program.step
        self._draws = itertools.cycle(draws)
        self._params = jax.tree.map(lambda x: x.copy(), params)  # donated: must be this one's own
        self._state = jax.jit(tx.init)(self._params)

    def __call__(self) -> float:
        """Milliseconds for one update."""
        return milliseconds(functools.partial(self._update, next(self._draws)))

    def _update(self, grads: Any) -> Any:
        self._state, self._params = self._step(grads, self._state, self._params)
        return self._state, self._params


def train_step(
    graphdef: Any, params: Any, tx: optax.GradientTransformation, *, batch_size: int, seq_len: int
) -> Callable[[], float]:
    """Takes a whole train step of a model on one device, and gives its milliseconds."""
    step = make_train_step(functools.partial(model.loss_fn, graphdef), tx, None)
    rng = np.random.default_rng(0)  # any bytes do
    tokens = rng.integers(0, 256, (batch_size, seq_len + 1), np.int32)
    state = step.init(jax.tree.map(jnp.copy, params))

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, tokens)
        return state, metrics

    return functools.partial(milliseconds, run)


def milliseconds(run: Callable[[], Any]) -> float:
    """Until all that ``run`` returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return 1e3 * (time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Times in milliseconds, and their ratio.

    Attributes:
      ms: median time of the subject.
      baseline_ms: median time of the baseline, in the same rounds.
      ratio: of the two medians.
      low: lower quartile of the ratios of single rounds.
      high: upper quartile of them.
      rounds: how many rounds there were.
    """

    ms: float
    baseline_ms: float
    ratio: float
    low: float
    high: float
    rounds: int


def compare(
    subject: Callable[[], float], baseline: Callable[[], float], *, rounds: int, warm_up: int = 3
) -> Comparison:
    """Times both in turns: A B, then B A, and so on.

    Args:
      subject: makes one update, returns its milliseconds.
      baseline: the same for the baseline.
      rounds: pairs of timed updates.
      warm_up: pairs made before that and not counted: the first update of a projecting optimizer is
        a refresh, and the first touch of new memory is slow.
    """
    pairs = []
    for number in range(warm_up + rounds):
        first, second = (subject, baseline) if number % 2 else (baseline, subject)
        times = first(), second()
        pairs.append(times if number % 2 else times[::-1])
    mine, theirs = zip(*pairs[warm_up:], strict=True)
    low, high = np.quantile([a / b for a, b in zip(mine, theirs, strict=True)], [0.25, 0.75])
    ms, baseline_ms = statistics.median(mine), statistics.median(theirs)
    return Comparison(ms, baseline_ms, ms / baseline_ms, float(low), float(high), rounds)
