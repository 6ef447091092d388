"""4500 starts and 4000 resamples of the 240-run Chinchilla problem, against SciPy.

Losses are made, not read: 240 runs at the sizes and budgets of a typical study, with 0.7 % noise of
heavy tails. Both minimise the same sum of Huber losses. SciPy does by BFGS with centred parameters
and the objective divided by delta, without which it fails; once with its own finite differences and
once with a gradient written by hand. It is timed on ``SAMPLE`` starts and as many resamples, and
that is scaled up.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize

from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import coordinates, uncertainty

LAW = scaling_laws.laws.Chinchilla
RUNS, STARTS, RESAMPLES, SAMPLE = 240, 4500, 4000, 100
DELTA = 1e-3
LIMIT_SECONDS, LIMIT_RATIO, LIMIT_COMPILE = 10.0, 25.0, 15.0


def runs(seed: int = 0) -> dict[str, np.ndarray]:
    """Runs of 44 million to 16 billion parameters, 6e18 to 3e21 FLOPs, and their losses."""
    rng = np.random.default_rng(seed)
    n = np.exp(rng.uniform(np.log(4.4e7), np.log(1.6e10), RUNS))
    d = np.exp(rng.uniform(np.log(6e18), np.log(3e21), RUNS)) / 6 / n
    loss = 1.8172 + 482.01 * n**-0.3478 + 2085.43 * d**-0.3658
    noise = 0.007 * rng.standard_t(3, RUNS)
    return {"N": n, "D": d, "loss": loss * np.exp(noise)}


def grid() -> dict[str, np.ndarray]:
    """The 4500 starts of Hoffmann et al. (2022), arXiv:2203.15556."""
    levels, floors, powers = (
        np.exp(5.0 * np.arange(6)),
        np.exp(np.arange(-2, 3) / 2),
        np.arange(5) / 2,
    )
    return scaling_laws.grid(A=levels, B=levels, E=floors, alpha=powers, beta=powers)


def ours(data: dict[str, np.ndarray]) -> dict[str, Any]:
    """Seconds of the first fit and of a second one of other runs, and what that one found."""
    options = {"starts": grid(), "bootstrap": RESAMPLES}
    first, _ = _timed(lambda: scaling_laws.fit(LAW, runs(1), **options))
    seconds, fit = _timed(lambda: scaling_laws.fit(LAW, data, **options))
    every, whole = _timed(lambda: scaling_laws.fit(LAW, data, **(options | {"screen": STARTS})))
    return {
        "seconds": seconds,
        "seconds_every_start_refined": every,
        "compile_seconds": first - seconds,
        "objective": fit.certificate.objective,
        "objective_every_start_refined": whole.certificate.objective,
        "status": fit.certificate.status,
        "unsolved_resamples": fit.draws.unsolved,
        "theta": fit.theta,
    }


def scipy(data: dict[str, np.ndarray], best: np.ndarray, by_hand: bool) -> dict[str, Any]:
    """Milliseconds of a start and of a resample, their total, and the best objective found."""
    inputs = {name: data[name] for name in LAW.inputs}
    back = np.linalg.inv(coordinates.centring(LAW, inputs))
    rng = np.random.default_rng(0)
    starts = coordinates.to_theta(LAW, grid())[rng.choice(STARTS, SAMPLE, replace=False)]
    counts = uncertainty.resample(np.arange(RUNS), SAMPLE, 0)
    ones = np.ones(RUNS)
    minimise = lambda theta, weights: _minimise(data, back, theta, weights, by_hand)
    start, values = _timed(lambda: [minimise(theta, ones) for theta in starts])
    resample, _ = _timed(lambda: [minimise(best, weights) for weights in counts])
    return {
        "start_ms": 1e3 * start / SAMPLE,
        "resample_ms": 1e3 * resample / SAMPLE,
        "seconds": (STARTS * start + RESAMPLES * resample) / SAMPLE,
        "objective": float(min(values)),
    }


def _minimise(
    data: dict[str, np.ndarray],
    back: np.ndarray,
    theta: np.ndarray,
    weights: np.ndarray,
    by_hand: bool,
) -> float:
    """The Huber sum that BFGS reaches; the floor is fitted as a logarithm, as is usual."""
    log_n, log_d, log_loss = (np.log(data[name]) for name in ("N", "D", "loss"))

    def evaluate(z: np.ndarray) -> tuple[float, np.ndarray]:
        a, b, e, alpha, beta = back @ z
        floor, size, tokens = np.exp(e), np.exp(a - alpha * log_n), np.exp(b - beta * log_d)
        predicted = floor + size + tokens
        r = np.log(predicted) - log_loss
        inside = np.clip(r, -DELTA, DELTA)
        pull = weights * inside / predicted / DELTA
        by_exponent = [-pull @ (size * log_n), -pull @ (tokens * log_d)]
        gradient = np.array([pull @ size, pull @ tokens, pull.sum() * floor, *by_exponent])
        return weights @ (inside * (r - 0.5 * inside)) / DELTA, back.T @ gradient

    start = np.linalg.solve(back, np.concatenate([theta[:2], [np.log(theta[2])], theta[3:]]))
    with np.errstate(all="ignore"):
        found = optimize.minimize(
            evaluate if by_hand else lambda z: evaluate(z)[0],
            start,
            jac=by_hand or None,
            method="BFGS",
            options={"gtol": 1e-6, "maxiter": 2000},
        )
    return found.fun * DELTA


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def measure() -> dict[str, Any]:
    """One row: seconds of ours, of SciPy's two ways, and the objectives."""
    data = runs()
    mine = ours(data)
    best = mine.pop("theta")
    differences, gradient = (scipy(data, best, by_hand) for by_hand in (False, True))
    return {
        "name": "chinchilla_240",
        "starts": STARTS,
        "resamples": RESAMPLES,
        **mine,
        "scipy_differences": differences,
        "scipy_gradient": gradient,
        "times_faster": differences["seconds"] / mine["seconds"],
        "times_faster_than_gradient": gradient["seconds"] / mine["seconds"],
    }


def kept(row: dict[str, Any]) -> bool:
    """Whether the row is within the limits, and ours found an objective as low as SciPy's."""
    return (
        row["seconds"] <= LIMIT_SECONDS
        and row["times_faster"] >= LIMIT_RATIO
        and row["compile_seconds"] <= LIMIT_COMPILE
        and row["objective"] <= row["scipy_gradient"]["objective"] * (1 + 1e-6)
        and row["status"] == "converged"
    )
