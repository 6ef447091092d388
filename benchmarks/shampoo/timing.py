"""Traces: the milliseconds of each step of several programs, taken in turns."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any


def traces(
    programs: Mapping[str, Callable[[], float]], *, steps: int, warm_up: int
) -> dict[str, list[float]]:
    """Milliseconds of the steps after the first ones; every program takes each step in turn.

    Args:
      programs: each takes one step and returns its milliseconds.
      steps: whose times are kept.
      warm_up: steps before them, which touch memory for the first time.
    """
    taken: dict[str, list[float]] = {name: [] for name in programs}
    names = list(programs)
    for step in range(warm_up + steps):
        for name in names[step % len(names) :] + names[: step % len(names)]:
            taken[name].append(programs[name]())
    return {name: [round(ms, 2) for ms in times[warm_up:]] for name, times in taken.items()}


def summary(trace: list[float], *, cycle: int) -> dict[str, Any]:
    """Mean, median and slowest, with the trace that they are of.

    Args:
      trace: milliseconds of each step.
      cycle: after how many steps the same work comes again. ``slowest_of_cycle`` is the slowest of
        these, each of them the median of its times: what other work on the machine added to a
        single step is not in it.
    """
    return {
        "mean": round(statistics.fmean(trace), 2),
        "median": round(statistics.median(trace), 2),
        "slowest": max(trace),
        "slowest_of_cycle": round(max(statistics.median(trace[i::cycle]) for i in range(cycle)), 2),
        "ms": trace,
    }


def line(name: str, row: Mapping[str, Any]) -> str:
    """For people to read while it runs."""
    return (
        f"{name:24s} mean {row['mean']:8.1f} ms, median {row['median']:8.1f}, "
        f"slowest {row['slowest']:8.1f}, of the cycle {row['slowest_of_cycle']:8.1f}"
    )
