"""``python -m benchmarks.roots``: how exact each root solver is, and how long it takes.

Errors are those of float32 roots against an eigendecomposition in float64 of the same float32
matrix, with the same damping: Frobenius norm of the difference over that of the root. Times are of
one stack, each solver and the eigendecomposition by turns in one run.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import _results
from benchmarks.step_time import timing
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.config import at_least
from jaxopt_suite.optimizers import roots
from jaxopt_suite.optimizers.roots.solver import ByProducts, Solver

ORDER = 4
DAMPING = 1e-6
SIZES = (64, 256, 1000)
LARGE = 1000  # of which only the spectra of ``_AT_LARGE`` are measured: minutes on a CPU
_AT_LARGE = ("1e+06", "rank n/8")
STACKS = ((64, 128), (32, 256))
CONDITIONS = (1e2, 1e4, 1e6, 1e8, 1e12)
RESULTS = _results.RESULTS / "roots.json"

_solve = jax.jit(roots.inverse_root, static_argnames=("order", "solver"))


def spectra(size: int) -> dict[str, np.ndarray]:
    """Eigenvalues ``[size]`` by name: log-uniform ones, and those of an eighth of the rank."""
    found = {f"{c:.0e}": np.logspace(0, -np.log10(c), size) for c in CONDITIONS}
    found["rank n/8"] = np.where(np.arange(size) < size // 8, np.logspace(0, -3, size), 0.0)
    return found


def matrix(values: np.ndarray) -> np.ndarray:
    """A float32 matrix with these eigenvalues, up to its own rounding."""
    rng = np.random.default_rng(len(values))
    q = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    a = (q * values) @ q.T
    return (0.5 * (a + a.T)).astype(np.float32)


def exact(a: np.ndarray) -> np.ndarray:
    """The damped root in float64."""
    values, q = np.linalg.eigh(a.astype(np.float64))
    return (q * (np.maximum(values, 0) + DAMPING * values[-1]) ** (-1 / ORDER)) @ q.T


def accuracy(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """One entry for each solver, size and spectrum."""
    entries = []
    for size in sizes:
        named = spectra(size)
        if size >= LARGE:
            named = {name: named[name] for name in _AT_LARGE}
        a = np.stack([matrix(values) for values in named.values()])
        expected = [exact(one) for one in a]
        for name, solver in _solvers(size).items():
            found = _solve(a, ORDER, solver=solver)
            for i, spectrum in enumerate(named):
                difference = np.linalg.norm(np.asarray(found.root[i], np.float64) - expected[i])
                entries.append(
                    {
                        "solver": name,
                        "size": size,
                        "spectrum": spectrum,
                        "error": float(difference / np.linalg.norm(expected[i])),
                        "residual": float(found.error[i]),
                        "iterations": int(found.iterations[i]),
                        "ok": bool(found.ok[i]),
                    }
                )
    return entries


def _solvers(size: int) -> dict[str, Solver]:
    """Each by name, and of the smallest matrices those that can with the kernel for products.

    It is interpreted, which for larger ones takes minutes.
    """
    found = {name: make() for name, make in roots.SOLVERS.items()}
    if size == min(SIZES):
        for name, make in roots.SOLVERS.items():
            if issubclass(make, ByProducts):
                found[f"{name}, one triangle"] = make(product_impl="interpret")
    return found


def times(stacks: Sequence[tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of one stack ``[k, b, b]`` of sample covariances, and over those of ``Eigh``."""
    entries = []
    for k, b in stacks:
        g = np.random.default_rng(b).standard_normal((k, b, 4 * b)).astype(np.float32)
        a = jax.numpy.asarray(g @ g.transpose(0, 2, 1))
        for solver in list(roots.SOLVERS)[1:]:
            found = timing.compare(_timer(a, solver), _timer(a, "eigh"), rounds=rounds, warm_up=1)
            entries.append(
                {
                    "solver": solver,
                    "stack": [k, b, b],
                    "ms": found.ms,
                    "eigh_ms": found.baseline_ms,
                    "ratio": found.ratio,
                }
            )
    return entries


def _timer(a: jax.Array, solver: str) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(_solve(a, ORDER, solver=solver))
        return 1e3 * (time.perf_counter() - start)

    return run


def _show(row: dict[str, Any]) -> None:
    for entry in row["accuracy"]:
        print(
            f"{entry['solver']:34s} {entry['size']:5d}  {entry['spectrum']:8s} "
            f"error {entry['error']:.1e}, residual {entry['residual']:.1e}, "
            f"{entry['iterations']:3d} steps{'' if entry['ok'] else ', NOT OK'}"
        )
    for entry in row["times"]:
        print(
            f"{entry['solver']:34s} {entry['stack']}: {entry['ms']:.0f} ms, "
            f"{entry['ratio']:.2f} times Eigh's {entry['eigh_ms']:.0f} ms"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roots", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="timed roots of each stack")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="file to append to")
    options = parser.parse_args(arguments)
    try:
        at_least("rounds", options.rounds, 1)
        row = {
            "order": ORDER,
            "damping": DAMPING,
            "accuracy": accuracy(SIZES),
            "times": times(STACKS, options.rounds),
        }
        row |= _results.stamp(f"python -m benchmarks.roots --rounds {options.rounds}")
        _show(row)
        _results.append(options.results, row)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
