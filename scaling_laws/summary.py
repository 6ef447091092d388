"""A fit in plain text, with what a reader must know to believe it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxopt_suite.scaling_laws.fit_result import Fit

FEW = 8  # runs below which the degrees of freedom stand beside every number


def summary(fit: "Fit", level: float = 0.9) -> str:
    """Coefficients with standard errors and intervals, the objective, the certificate, warnings."""
    lines = [
        f"{fit.law.name}: {fit.law.formula}",
        f"{fit.table.used} runs, {fit.objective}: {fit.certificate.objective:.9g}",
        *(f"{name}: {value}" for name, value in fit.table.conventions.items()),
        "",
        *_rows(fit, level),
        "",
        f"intervals: {level:.0%}, {_method(fit)}",
        str(fit.certificate),
        *(f"WARNING: {text}" for text in warnings(fit)),
    ]
    return "\n".join(lines)


def warnings(fit: "Fit") -> list[str]:
    """What makes the numbers doubtful; empty if nothing does."""
    certificate, found = fit.certificate, []
    if certificate.status == "not a minimum":
        found.append("this is not a minimum of the objective; the numbers mean nothing")
    for name in certificate.bounds:
        found.append(f"{name} is at a bound: the runs ask for another form or a wider range")
    for names in certificate.flat:
        found.append(f"the runs do not determine {' with '.join(names)}")
    if certificate.agreement is not None and certificate.agreement < 0.1:
        found.append(f"only {certificate.agreement:.0%} of the starts reached this optimum")
    if fit.draws is not None and fit.draws.unsolved:
        found.append(f"{fit.draws.unsolved} resamples were not solved and are left out")
    if fit.table.used < FEW:
        found.append(f"{fit.table.used} runs leave {fit.degrees} degrees of freedom")
    found += [f"the check of {name} was left out" for name in fit.allow]
    return found


def _rows(fit: "Fit", level: float) -> list[str]:
    few = f"  ({fit.degrees} d.o.f.)" if fit.table.used < FEW else ""
    rows = [f"{'':10} {'value':>12} {'std. error':>12}  interval"]
    for parameter in fit.law.parameters:
        name = parameter.name
        value, error = fit.coefficients[name], fit.standard_errors[name]
        rows.append(f"{name:10} {value:12.6g} {error:12.3g}  {_interval(fit, name, level)}{few}")
    return rows


def _interval(fit: "Fit", name: str, level: float) -> str:
    if name in fit.fixed:
        return "held"
    if fit.draws is None and fit.degrees < 1:
        return "none: no degrees of freedom"
    low, high = fit.interval(name, level)
    return f"[{low:.6g}, {high:.6g}]"


def _method(fit: "Fit") -> str:
    if fit.draws is None:
        return "from the covariance and Student's t"
    unit = "runs" if fit.draws.unit == "rows" else f"groups of equal {fit.draws.unit}"
    return f"from {len(fit.draws.theta)} bootstrap resamples of {fit.draws.units} {unit}"
