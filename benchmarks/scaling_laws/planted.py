"""Random laws of every form, fitted back: exactly without noise, within their intervals with it."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.scaling_laws.designs import Design, designs
from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import coordinates, distributions, starts, uncertainty
from jaxopt_suite.scaling_laws.batch import Batch, Solutions
from jaxopt_suite.scaling_laws.double import in_double
from jaxopt_suite.scaling_laws.objectives import Objective
from jaxopt_suite.scaling_laws.solver import Rows

LAWS = 200
LEVEL, NOISE = 0.9, 0.01
LEAST, MOST = 0.85, 0.95  # share of intervals that should hold the truth
EXACT = 1e-5  # relative error of a parameter that is recovered


@in_double
def outputs(design: Design, truth: Mapping[str, np.ndarray]) -> np.ndarray:
    """What planted laws ``[count, 1]`` predict for the design's runs, ``[count, n]``."""
    count = len(next(iter(truth.values())))
    inputs = {k: np.broadcast_to(v, (count, len(v))) for k, v in design.inputs.items()}
    return np.asarray(design.law.predict(truth, inputs))


def batch_of(design: Design, observed: np.ndarray, objective: Objective) -> Batch:
    """One problem for each row of outputs ``[problems, n]``, all in one batch."""
    rows = Rows({k: np.broadcast_to(v, observed.shape) for k, v in design.inputs.items()}, observed)
    centring = coordinates.centring(design.law, design.inputs)
    box = coordinates.box(design.law, {})
    return Batch(design.law, objective, rows, centring, np.ones(observed.shape[-1]), *box)


def fit_all(
    design: Design,
    observed: np.ndarray,
    objective: Objective,
    truth: Mapping[str, np.ndarray] | None = None,
) -> Solutions:
    """The best of the design's starts for each row of outputs ``[count, n]``.

    Args:
      design: of the law and runs.
      observed: outputs.
      objective: to minimise.
      truth: where given, its parameters that the design holds are held.
    """
    tries, law = design.starts, design.law
    batch = batch_of(design, np.repeat(observed, tries, axis=0), objective)
    points = [starts.spread(law, batch.centring, y.min(), tries, 0) for y in observed]
    theta = np.concatenate(points)
    low, high = (np.tile(end, (len(theta), 1)) for end in (batch.low, batch.high))
    for name in design.held if truth is not None else ():
        index = law.names.index(name)
        held = _theta(law, truth)[:, index]
        low[:, index] = high[:, index] = np.repeat(held, tries)
    found = batch.solve(theta, batch.problems(len(theta), low=low, high=high), stages=batch.stages)
    best = found.value.reshape(-1, tries).argmin(axis=1)
    return found.take(best + tries * np.arange(len(observed)))


def _theta(law: scaling_laws.Law, truth: Any) -> np.ndarray:
    return coordinates.to_theta(law, {k: v[:, 0] for k, v in truth.items()})


def recovery(design: Design, count: int = LAWS, seed: int = 0) -> dict[str, np.ndarray]:
    """Relative errors ``[count]`` of each parameter, fitted to runs without noise."""
    truth = design.plant(count, seed)
    found = fit_all(design, outputs(design, truth), scaling_laws.huber())
    values = coordinates.from_theta(design.law, found.theta)
    return {name: np.abs(values[name] / v[:, 0] - 1) for name, v in truth.items()}


def coverage(design: Design, count: int = LAWS, seed: int = 0) -> dict[str, float]:
    """Share of intervals from the covariance that hold the truth, by parameter that is fitted."""
    truth = design.plant(count, seed)
    exact = outputs(design, truth)
    noise = NOISE * np.random.default_rng(seed + 1).standard_normal(exact.shape)
    observed = exact * np.exp(noise)
    found = fit_all(design, observed, scaling_laws.squares(), truth)
    free = np.array([name not in design.held for name in design.law.names])
    reach = distributions.student_quantile(LEVEL, exact.shape[1] - int(free.sum()))
    inside = []
    for y, best, true in zip(observed, found.theta, _theta(design.law, truth), strict=True):
        own = _single(design, y)
        errors = np.sqrt(np.diag(uncertainty.covariance(own, best, free)))
        inside.append(np.abs(best - true) <= reach * errors)
    share = np.mean(inside, axis=0)[free]
    names = np.array(design.law.names)[free]
    return dict(zip(names.tolist(), share.tolist(), strict=True))


def _single(design: Design, observed: np.ndarray) -> Batch:
    centring = coordinates.centring(design.law, design.inputs)
    box = coordinates.box(design.law, {})
    rows = Rows(dict(design.inputs), observed)
    return Batch(design.law, scaling_laws.squares(), rows, centring, np.ones(len(observed)), *box)


def measure(name: str) -> dict[str, Any]:
    """One row: how one law's parameters came back."""
    design = designs()[name]
    began = time.perf_counter()
    errors = recovery(design)
    worst = np.max(list(errors.values()), axis=0)
    shares = coverage(design)
    return {
        "law": name,
        "laws": LAWS,
        "runs": len(next(iter(design.inputs.values()))),
        "starts": design.starts,
        "recovered": float(np.mean(worst <= EXACT)),
        "worst_error": float(worst.max()),
        "median_error": float(np.median(worst)),
        "coverage": {k: round(v, 3) for k, v in shares.items()},
        "held_with_noise": list(design.held),
        "seconds": round(time.perf_counter() - began, 1),
    }


def kept(row: dict[str, Any]) -> bool:
    """Whether every law came back, and every share of intervals is as promised."""
    shares = row["coverage"].values()
    return row["recovered"] == 1.0 and all(LEAST <= share <= MOST for share in shares)
