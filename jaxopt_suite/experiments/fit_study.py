"""A fit and everything a report says of it: refits, hold-outs, other forms, slices."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxopt_suite import scaling_laws
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.compress import parse_call
from jaxopt_suite.experiments.config import refuse
from jaxopt_suite.experiments.fit_config import FitConfig
from jaxopt_suite.scaling_laws import (
    Fit,
    FitRefused,
    Frontier,
    IsoFLOP,
    NextRun,
    Runs,
    coordinates,
    uncertainty,
)
from jaxopt_suite.scaling_laws.objectives import Objective
from jaxopt_suite.scaling_laws.runs import BadRuns
from jaxopt_suite.scaling_laws.validation import Holdout

OBJECTIVES = {
    factory.__name__: factory
    for factory in (
        scaling_laws.huber,
        scaling_laws.absolute,
        scaling_laws.squares,
        scaling_laws.quantile,
    )
}
Tell = Callable[[str], None]
_HELD_OUT = (0.1, 0.25, 0.5)  # shares of the runs, those with the most compute
_LEVERAGE = 3  # runs left out one by one
_TRIMMED = 0.02  # share of the runs left out for their residuals
_SLICE_TOLERANCE = 0.1  # nats of compute


@dataclasses.dataclass(frozen=True)
class Variant:
    """The same runs fitted in another way.

    Attributes:
      label: what was done otherwise.
      coefficients: by name.
      status: of the certificate.
      aic: Akaike's criterion, where the objective and the runs are the same.
      error: mean relative error on the largest runs, held out; ``None`` where it was not asked.
    """

    label: str
    coefficients: Mapping[str, float]
    status: str
    aic: float | None = None
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """What the command found.

    Attributes:
      config: what was asked.
      runs: that were read.
      fit: the law fitted to them.
      frontier: compute-optimal sizes at the budgets asked for.
      next_run: the run to make next, if a budget was given.
      holdouts: errors of fits that have not seen the largest runs.
      sensitivity: other objectives, and fits without some runs.
      rivals: other forms.
      isoflop: minima of slices, or why there are none.
    """

    config: FitConfig
    runs: Runs
    fit: Fit
    frontier: Frontier | None = None
    next_run: NextRun | None = None
    holdouts: Sequence[Holdout] = ()
    sensitivity: Sequence[Variant] = ()
    rivals: Sequence[Variant] = ()
    isoflop: IsoFLOP | str = "not asked for"


def find_law(name: str) -> scaling_laws.Law:
    """The law of that name.

    Raises:
      UserError: if there is none, with the list of those there are.
    """
    known = scaling_laws.laws.registry()
    if name not in known:
        refuse("law", name, f"one of {', '.join(known)}")
    return known[name]


@contextlib.contextmanager
def blaming_the_runs() -> Iterator[None]:
    """Turns what the library says about runs and arguments into one line for the terminal."""
    try:
        yield
    except BadRuns as error:
        raise UserError(
            f"{error.count} rows cannot be used, the first: {error.bad[0]}; correct the data, or "
            "give --on-bad drop to go on without them"
        ) from error
    except (ValueError, TypeError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error


def make(config: FitConfig, tell: Tell) -> Study:
    """Reads the runs, fits, and where there is to be a report, does what it needs.

    Args:
      config: what was asked.
      tell: called with what is about to be done.

    Raises:
      UserError: for everything the user can put right.
    """
    law = find_law(config.law)
    objective = parse_call("objective", config.objective, OBJECTIVES)
    tell("reading runs")
    with blaming_the_runs():
        runs = scaling_laws.load_runs(
            config.runs,
            columns=config.columns,
            keep=config.keep,
            on_bad=config.on_bad,
            n_rule=config.n_rule,
            flops=config.flops,
        )
        tell(f"fitting {len(runs)} runs, {config.bootstrap} resamples")
        found = _fit(config, law, runs, objective)
        study = Study(config, runs, found)
        study = dataclasses.replace(
            study,
            frontier=found.compute_optimal(config.at, level=config.level) if config.at else None,
            next_run=None if config.next_run is None else _next_run(config, found),
        )
    return study if config.out is None else _examined(study, tell)


def steps(config: FitConfig) -> int:
    """How often ``make`` tells what it does."""
    return 2 if config.out is None else 6


def _fit(config: FitConfig, law: scaling_laws.Law, runs: Runs, objective: Objective) -> Fit:
    return scaling_laws.fit(
        law,
        runs,
        objective=objective,
        weights=config.weights,
        starts=config.starts,
        bootstrap=config.bootstrap,
        resample=config.resample,
        seed=config.seed,
        allow=config.allow,
    )


def _next_run(config: FitConfig, found: Fit) -> NextRun:
    budget = config.next_run or 0.0
    return found.next_run(budget, at=max(config.at, default=budget))


def _examined(study: Study, tell: Tell) -> Study:
    found = study.fit
    tell("holding out the largest runs")
    study = dataclasses.replace(study, holdouts=_holdouts(found))
    tell("fitting other objectives, and without the runs that pull most")
    study = dataclasses.replace(study, sensitivity=_sensitivity(found))
    tell("fitting other forms")
    study = dataclasses.replace(study, rivals=_rivals(study))
    tell("looking for slices of equal compute")
    return dataclasses.replace(study, isoflop=_slices(study))


def compute(found: Fit) -> np.ndarray | None:
    """FLOPs by ``6 N D`` of the runs, or ``None`` for a law without these inputs."""
    inputs = found.table.inputs
    return 6 * inputs["N"] * inputs["D"] if {"N", "D"} <= inputs.keys() else None


def leverage(found: Fit) -> np.ndarray:
    """How much each run pulls the fit to itself, ``[n]``: the diagonal of the hat matrix."""
    jacobian = uncertainty.linearise(found.batch, found.theta)[1][:, found.free]
    scaled = np.sqrt(found.table.weights)[:, None] * jacobian
    q, _ = np.linalg.qr(scaled)
    return np.sum(q**2, axis=1)


def _refit(found: Fit, label: str, **changes: Any) -> tuple[Variant, Fit | None]:
    """The same runs from the starts that served the fit, something else changed."""
    law = changes.pop("law", found.law)
    if law is found.law:
        changes.setdefault("starts", coordinates.from_theta(law, found.starts))
    inputs = {name: found.table.inputs.get(name) for name in law.inputs}
    options: dict[str, Any] = {
        "objective": found.objective,
        "weights": found.table.weights,
        "fixed": found.fixed,
        "bootstrap": 0,
        "allow": ("few_runs", "collinear"),
    }
    try:
        other = scaling_laws.fit(
            law, {**inputs, law.output: found.table.observed}, **(options | changes)
        )
    except FitRefused as problem:
        return Variant(label, {}, str(problem)), None
    return Variant(label, other.coefficients, other.certificate.status), other


def _sensitivity(found: Fit) -> list[Variant]:
    space = found.objective.space
    others = [scaling_laws.huber(delta, space=space) for delta in (1e-3, 1e-2, 1e-1)]
    variants = [
        _refit(found, str(other), objective=other)[0]
        for other in (*others, scaling_laws.squares(space=space))
        if other != found.objective
    ]
    weights = found.table.weights
    worst = np.argsort(-np.abs(found.residuals) * (weights > 0))
    trimmed = weights.copy()
    trimmed[worst[: max(1, round(_TRIMMED * found.table.n))]] = 0
    count = int(np.count_nonzero(weights) - np.count_nonzero(trimmed))
    label = f"without the {count} largest residuals"
    variants.append(_refit(found, label, weights=trimmed)[0])
    for row in np.argsort(-leverage(found))[:_LEVERAGE]:
        without = weights.copy()
        without[row] = 0
        where = ", ".join(f"{k} {v[row]:.3g}" for k, v in found.table.inputs.items())
        variants.append(_refit(found, f"without the run at {where}", weights=without)[0])
    return variants


def _holdouts(found: Fit) -> list[Holdout]:
    by = compute(found)
    name = found.law.inputs[0] if by is None else "FLOP"
    values = found.table.inputs[found.law.inputs[0]] if by is None else by
    splits = []
    for share in _HELD_OUT:
        with contextlib.suppress(FitRefused):  # too few are left: the report says which there are
            splits += [
                dataclasses.replace(split, label=split.label.replace("value", name))
                for split in found.holdout(values, largest=share)
            ]
    return splits


def _rivals(study: Study) -> list[Variant]:
    """This form and others by Akaike's criterion and by their error on the largest runs."""
    found = study.fit
    changes: list[tuple[str, dict[str, Any]]] = [(found.law.name, {})]
    if "E" in found.law.names and "E" not in found.fixed:
        changes.append((f"{found.law.name}, E = 0", {"fixed": {**found.fixed, "E": 0.0}}))
    for name, law in scaling_laws.laws.registry().items():
        same = set(law.inputs) <= found.table.inputs.keys() and law.output == found.law.output
        if same and name != found.law.name:
            changes.append((name, {"law": law, "fixed": None}))
    fits = [_refit(found, label, **change) for label, change in changes]
    scores = {}
    for variant, other in fits:
        with contextlib.suppress(ValueError):  # nothing is left over: there is no likelihood
            if other is not None:
                (score,) = scaling_laws.compare([other])
                scores[variant.label] = score.aic
    return [
        dataclasses.replace(
            variant,
            aic=scores.get(variant.label),
            error=None if other is None else _error_on_largest(other, compute(found)),
        )
        for variant, other in fits
    ]


def _error_on_largest(other: Fit, flops: np.ndarray | None) -> float | None:
    values = other.table.inputs[other.law.inputs[0]] if flops is None else flops
    try:
        (split,) = other.holdout(values, largest=_HELD_OUT[1])
    except FitRefused:
        return None
    return split.mean


def _slices(study: Study) -> IsoFLOP | str:
    found = study.fit
    if compute(found) is None or found.law.output != "loss":
        return f"{found.law.name} is no law of the loss with N and D"
    runs = {**found.table.inputs, "loss": found.table.observed}
    try:
        return scaling_laws.isoflop(
            runs,
            tolerance=_SLICE_TOLERANCE,
            on_edge="drop",
            level=study.config.level,
            seed=study.config.seed,
        )
    except FitRefused as problem:
        return str(problem)
