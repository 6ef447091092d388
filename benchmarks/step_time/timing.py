"""Two programs timed in turns, so that whatever else the machine does falls on both."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.step_time.programs import Program


class Runner:
    """A program with its buffers; each call makes one update and waits for it."""

    def __init__(
        self, program: Program, tx: optax.GradientTransformation, params: Any, grads: Any
    ) -> None:
        self._step = program.step
        self._grads = grads
        self._params = jax.tree.map(lambda x: x.copy(), params)  # donated: must be this one's own
        self._state = jax.jit(tx.init)(self._params)

    def __call__(self) -> float:
        """Milliseconds for one update."""
        start = time.perf_counter()
        self._state, self._params = self._step(self._grads, self._state, self._params)
        jax.block_until_ready((self._state, self._params))
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
