"""What has gone wrong with published fits, point by point, answered for one fit.

The points follow the checklist of (Mis)Fitting: A Survey of Scaling Laws (arXiv:2502.18969, 2025).
Where the runs do not say, the answer is that they do not.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from jaxopt_suite.experiments.fit_study import Study, Variant, compute, leverage
from jaxopt_suite.experiments.markup import Block, Grid, Item, Listing, Paragraph
from jaxopt_suite.scaling_laws import Frontier

_NOT_SAID = "not stated"
_LISTED = 100  # rows left out that are listed
_FAR = 100.0  # factor beyond the runs from which every number is doubtful


def checklist(study: Study) -> dict[str, list[Block]]:
    """Every point by its title."""
    return {
        "The law and what it counts": _conventions(study),
        "Runs": _rows(study),
        "Ranges": _ranges(study),
        "Schedules and tuning": _tuning(study),
        "What is minimised, and whether it is": _solution(study),
        "Residuals": _residuals(study),
        "Other objectives, and without some runs": _variants(study.sensitivity),
        "Intervals": [_listing(_intervals(study))],
        "Runs held out": _holdouts(study),
        "Beyond the runs": _beyond(study),
        "Other forms": _rivals(study),
    }


def _listing(lines: Iterable[str]) -> Listing:
    return Listing([Item(line) for line in lines])


def _conventions(study: Study) -> list[Block]:
    law, rules = study.fit.law, study.runs.conventions
    units = [f"{p.name} ({p.unit})" if p.unit else p.name for p in law.parameters]
    lines = [
        f"form: {law.formula}",
        f"parameters: {', '.join(units)}; inputs: {', '.join(law.inputs)}",
        f"source of the form: {law.source or _NOT_SAID}",
        f"N counts: {rules.n_rule or _NOT_SAID}",
        f"FLOP count: {rules.flop_rule or _NOT_SAID}",
        f"loss: {rules.loss_kind or _NOT_SAID}",
        f"tokenizer: {study.fit.table.conventions.get('tokenizer', _NOT_SAID)}",
        *(f"{name} was computed: {how}" for name, how in rules.derived.items()),
        *(f"{name} was read from {key}" for name, key in rules.sources.items() if name != key),
    ]
    return [_listing(lines)]


def _rows(study: Study) -> list[Block]:
    runs = study.runs
    used = f"{len(runs)} used, {len(runs.dropped)} left out; digest {runs.digest[:16]}"
    blocks: list[Block] = [Paragraph(used)]
    if runs.dropped:
        rows = [(each.where, each.reason) for each in runs.dropped[:_LISTED]]
        blocks.append(Grid(("row left out", "because"), rows))
    if len(runs.dropped) > _LISTED:
        blocks.append(Paragraph(f"and {len(runs.dropped) - _LISTED} more, in summary.json"))
    return blocks


def _ranges(study: Study) -> list[Block]:
    table, columns = study.fit.table, dict(study.fit.table.inputs)
    flops = compute(study.fit)
    if flops is not None:
        columns |= {"6ND": flops, "D/N": columns["D"] / columns["N"]}
    columns[study.fit.law.output] = table.observed
    rows = [(k, f"{v.min():.4g}", f"{v.max():.4g}") for k, v in columns.items()]
    blocks: list[Block] = [Grid(("", "smallest", "largest"), rows)]
    positive = {k: v for k, v in table.inputs.items() if (v > 0).all() and np.ptp(v) > 0}
    if len(positive) > 1:
        logs = np.log(np.stack(list(positive.values())))
        logs -= logs.mean(axis=1, keepdims=True)
        least = np.linalg.svd(logs, compute_uv=False)[-1] / np.sqrt(table.n)
        blocks.append(
            Paragraph(
                f"Correlation of ln {' and ln '.join(list(positive)[:2])}: "
                f"{np.corrcoef(logs)[0, 1]:.3f}. Narrowest spread of the logarithms in any "
                f"direction: {least:.3g} nats."
            )
        )
    return blocks


def _tuning(study: Study) -> list[Block]:
    columns, lines = study.runs.columns, []
    finished = columns.get("decay_finished")
    lines.append(
        "share of runs whose schedule had finished: "
        + (_NOT_SAID if finished is None else f"{np.mean(finished == 1):.0%}")
    )
    if "lr" in columns:
        known = columns["lr"][~np.isnan(columns["lr"])]
        if known.size:
            lines.append(f"learning rates: {known.min():.3g} to {known.max():.3g}")
    edge = columns.get("edge_of_sweep")
    lines.append(
        "share of runs at the edge of their hyperparameter sweep: "
        + (_NOT_SAID if edge is None else f"{np.mean(edge == 1):.0%}")
    )
    return [_listing(lines)]


def _solution(study: Study) -> list[Block]:
    fit = study.fit
    weights = "1 each" if np.ptp(fit.table.weights) == 0 else f"column {study.config.weights}"
    lines = [
        f"{fit.objective}: {fit.certificate.objective:.9g}; weights: {weights}",
        f"{len(fit.starts)} best of {study.config.starts} spread starts and the published values",
        str(fit.certificate),
        f"held: {', '.join(f'{k} = {v:g}' for k, v in fit.fixed.items()) or 'nothing'}",
    ]
    return [_listing(lines)]


def _residuals(study: Study) -> list[Block]:
    fit = study.fit
    columns, flops = dict(fit.table.inputs), compute(fit)
    if flops is not None:
        columns["6ND"] = flops
    rows = []
    for name, values in columns.items():
        edges = np.quantile(values, [0, 1 / 3, 2 / 3, 1])
        for low, high in itertools.pairwise(edges):
            last = high == edges[-1]
            inside = (values >= low) & ((values <= high) if last else (values < high))
            if inside.any():
                rows.append((f"{name} {low:.3g} to {high:.3g}", *_moments(fit.residuals[inside])))
    for name in ("family", "group", "optimizer"):
        for value in sorted(set(study.runs.columns.get(name, ()))):
            inside = study.runs.columns[name] == value
            rows.append((f"{name} {value or _NOT_SAID}", *_moments(fit.residuals[inside])))
    pull = leverage(fit)
    return [
        Grid(("runs with", "number", "mean", "root mean square"), rows),
        Paragraph(
            f"Largest residual {np.abs(fit.residuals).max():.4g}; largest leverage "
            f"{pull.max():.3g}, of a mean of {pull.mean():.3g}. One record of each run was "
            "fitted: there is no autocorrelation within runs to look at."
        ),
    ]


def _moments(residuals: np.ndarray) -> tuple[str, str, str]:
    rms = np.sqrt(np.mean(residuals**2))
    return str(len(residuals)), f"{residuals.mean():+.4f}", f"{rms:.4f}"


def _variants(variants: Sequence[Variant]) -> list[Block]:
    names = list(dict.fromkeys(name for variant in variants for name in variant.coefficients))
    rows = [
        (v.label, *(f"{v.coefficients[n]:.5g}" if n in v.coefficients else "" for n in names),
         v.status)
        for v in variants
    ]  # fmt: skip
    return [Grid(("fit", *names, "status"), rows)]


def _intervals(study: Study) -> list[str]:
    fit = study.fit
    if fit.draws is None:
        return [f"from the covariance and Student's t, {fit.degrees} degrees of freedom"]
    unit = "runs" if fit.draws.unit == "rows" else f"groups of equal {fit.draws.unit}"
    return [
        f"{len(fit.draws.theta)} bootstrap resamples of {fit.draws.units} {unit}, every one solved "
        f"anew; {fit.draws.resolved} needed more starts, {fit.draws.unsolved} left out",
        "where starts of the solver end is no part of them: that is the share that agrees, above",
    ]


def _holdouts(study: Study) -> list[Block]:
    if not study.holdouts:
        return [Paragraph("Too few runs to hold any out.")]
    names = study.fit.law.names
    rows = [
        (
            split.label,
            f"{split.trained}",
            f"{split.held_out}",
            f"{split.mean:.3%}",
            f"{split.worst:.3%}",
            *(f"{split.parameters[name]:.4g}" for name in names),
        )
        for split in study.holdouts
    ]
    heads = ("held out", "fitted", "predicted", "mean error", "worst", *names)
    return [
        Grid(heads, rows),
        Paragraph(
            "Errors are relative, on losses the fit has not seen. They say little of exponents: "
            "look at how those move."
        ),
    ]


def _beyond(study: Study) -> list[Block]:
    found = study.frontier
    if found is None:
        return [Paragraph("No budget was asked for: --at FLOPS gives the compute-optimal size.")]
    rows = []
    for i, flops in enumerate(found.flops):
        far = f"{found.extrapolation[i]:.3g}x"
        rows.append(
            (
                f"{flops:.3g} FLOP",
                *(_with_interval(found, name, i) for name in ("n", "d", "tokens_per_parameter")),
                _with_interval(found, "output", i),
                far + (" DOUBTFUL" if found.extrapolation[i] > _FAR else ""),
            )
        )
    heads = ("budget", "N*", "D*", "D*/N*", study.fit.law.output, "beyond the largest run")
    blocks: list[Block] = [Grid(heads, rows)]
    if (found.extrapolation > _FAR).any():
        blocks.append(
            Paragraph(
                f"Budgets more than {_FAR:g} times the largest run are beyond what any interval "
                "here covers: the form itself is untested there."
            )
        )
    return blocks


def _with_interval(found: Frontier, name: str, i: int) -> str:
    text = f"{getattr(found, name)[i]:.4g}"
    if not found.intervals:
        return text
    low, high = found.intervals[name][i]
    return f"{text} [{low:.3g}, {high:.3g}]"


def _rivals(study: Study) -> list[Block]:
    rows = [
        (
            rival.label,
            "" if rival.aic is None else f"{rival.aic:.1f}",
            "" if rival.error is None else f"{rival.error:.3%}",
            rival.status,
        )
        for rival in study.rivals
    ]
    heads = ("form", "AIC", "mean error on the largest quarter, held out", "status")
    return [Grid(heads, rows)]
