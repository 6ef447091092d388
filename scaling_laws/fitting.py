"""``fit``: a law and runs in, a certified optimum with resampled fits out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxopt_suite import core
from jaxopt_suite.scaling_laws import certificate, coordinates, objectives, starts, uncertainty
from jaxopt_suite.scaling_laws.batch import Batch, Solutions
from jaxopt_suite.scaling_laws.certificate import Certificate
from jaxopt_suite.scaling_laws.fit_result import HOLDOUT_STARTS, Fit
from jaxopt_suite.scaling_laws.law import Law
from jaxopt_suite.scaling_laws.objectives import Objective
from jaxopt_suite.scaling_laws.solver import Rows
from jaxopt_suite.scaling_laws.table import Table, columns_of, read

DEFAULT = objectives.huber()


def fit(
    law: Law,
    runs: Any,
    *,
    objective: Objective = DEFAULT,
    weights: Any = None,
    fixed: Mapping[str, float] | None = None,
    starts: int | Mapping[str, Any] = 256,
    screen: int = 512,
    bootstrap: int = 1000,
    resample: str = "rows",
    seed: int = 0,
    allow: Sequence[str] = (),
) -> Fit:
    """Fits a law to runs from many starts, judges the optimum, and resamples the runs.

    Everything is computed in double precision, whatever the global setting, on JAX's default
    device.

    Args:
      law: from ``laws``, or one's own; see ``Law``.
      runs: a mapping from column names to numbers, a data frame, or what ``load_runs`` gives.
        Columns that say how runs were counted (``N_rule``, ``flop_rule``, ``loss_kind``,
        ``tokenizer``, ``schedule``, ``decay_finished``) must have one value each.
      objective: ``huber(1e-3)`` on log residuals by default.
      weights: of the runs, numbers or a column's name; 1 each by default.
      fixed: parameters to hold at a value.
      starts: how many to spread, besides the law's published values; or values by parameter name,
        ``[starts]`` each, such as ``grid(...)`` makes.
      screen: of more starts than this only the best so many are refined.
      bootstrap: number of resamples; 0 for none.
      resample: ``"rows"``, or a column whose equal values are drawn together: the run a checkpoint
        belongs to, the model size.
      seed: of starts, resamples and perturbations.
      allow: checks to leave out: ``"few_runs"``, ``"collinear"``, ``"mixed"``.

    Raises:
      ValueError: for a column or argument that is illegal.
      FitRefused: if the runs cannot support the fit: ``TooFewRuns``, ``NotSeparable``,
        ``MixedRuns``.
    """
    core.check_int("screen", screen)
    core.check_int("bootstrap", bootstrap, low=0)
    core.check_int("seed", seed, low=0)
    batch, table, held = _prepare(law, runs, objective, weights, fixed, allow)
    points = _points(batch, starts, seed)
    found = _refine(batch, points, screen)
    order = np.argsort(found.value, kind="stable")
    theta = found.theta[order[0]]
    best = found.theta[order[:HOLDOUT_STARTS]]
    share = certificate.agreement(found)
    verdict = certificate.judge(batch, theta, fixed=tuple(held), agreement=share, seed=seed)
    draws = None
    if bootstrap:
        draws = uncertainty.bootstrap(
            batch,
            theta,
            best,
            groups=_groups(runs, resample, table.n),
            unit=resample,
            replicates=bootstrap,
            seed=seed,
        )
    return Fit(
        law=law,
        table=table,
        objective=objective,
        theta=theta,
        fixed=held,
        starts=best,
        certificate=verdict,
        draws=draws,
        allow=tuple(allow),
        seed=seed,
    )


def certify(
    law: Law,
    runs: Any,
    values: Mapping[str, float],
    *,
    objective: Objective = DEFAULT,
    weights: Any = None,
    fixed: Sequence[str] = (),
    seed: int = 0,
    allow: Sequence[str] = (),
) -> Certificate:
    """Judges parameter values from anywhere: a paper, another program, another objective.

    Args:
      law: they belong to.
      runs: as for ``fit``.
      values: by parameter name.
      objective: they are claimed to minimise.
      weights: as for ``fit``.
      fixed: names of those that were held.
      seed: of the perturbations.
      allow: as for ``fit``.

    Raises:
      ValueError: as ``fit``.
    """
    theta = coordinates.to_theta(law, values)
    held = {name: values[name] for name in fixed}
    batch, _, held = _prepare(law, runs, objective, weights, held, allow)
    return certificate.judge(batch, theta, fixed=tuple(held), seed=seed)


def _prepare(
    law: Law,
    runs: Any,
    objective: Objective,
    weights: Any,
    fixed: Mapping[str, float] | None,
    allow: Sequence[str],
) -> tuple[Batch, Table, dict[str, float]]:
    held = {name: float(value) for name, value in (fixed or {}).items()}
    low, high = coordinates.box(law, held)
    free = len(law.names) - len(held)
    table = read(law, runs, weights=weights, space=objective.space, free=free, allow=allow)
    rows = Rows(table.inputs, table.observed)
    centring = coordinates.centring(law, table.inputs)
    return Batch(law, objective, rows, centring, table.weights, low, high), table, held


def _points(batch: Batch, wanted: int | Mapping[str, Any], seed: int) -> np.ndarray:
    points = starts.resolve(
        batch.law, wanted, batch.centring, float(np.min(batch.rows.observed)), seed
    )
    return np.clip(points, batch.low, batch.high)


def _refine(batch: Batch, points: np.ndarray, screen: int) -> Solutions:
    """Minimises from the starts, or from the ``screen`` of them with the lowest objectives."""
    if len(points) > screen:
        seen = batch.view(points, batch.problems(len(points)))
        points = points[np.argsort(seen.value, kind="stable")[:screen]]
    return batch.solve(points, batch.problems(len(points)), stages=batch.stages)


def _groups(runs: Any, resample: str, n: int) -> np.ndarray:
    """Labels of what is resampled together, ``[n]``."""
    if resample == "rows":
        return np.arange(n)
    columns = columns_of(runs)
    if resample not in columns:
        raise ValueError(
            f"resample must be 'rows' or a column ({', '.join(map(str, columns))}), "
            f"got {resample!r}"
        )
    labels = np.asarray(columns[resample])
    if labels.shape != (n,):
        raise ValueError(f"column {resample!r} has shape {labels.shape}, the runs are {n}")
    return labels
