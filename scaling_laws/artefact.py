"""A fit as one JSON object: enough to predict, plot and refit without the logs it came from."""

import dataclasses
import importlib.metadata
import json
import math
import platform
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxopt_suite.core.plain import plain
from jaxopt_suite.scaling_laws import laws
from jaxopt_suite.scaling_laws.certificate import Certificate
from jaxopt_suite.scaling_laws.law import Law
from jaxopt_suite.scaling_laws.objectives import Objective
from jaxopt_suite.scaling_laws.table import Table
from jaxopt_suite.scaling_laws.uncertainty import Draws

if TYPE_CHECKING:
    from jaxopt_suite.scaling_laws.fit_result import Fit

FORMAT = 1


def write(fit: "Fit") -> str:
    """The fit as JSON text without NaN or infinity; what is infinite is ``null``."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "numpy")}
    content = {
        "format": FORMAT,
        "law": {"name": fit.law.name, "formula": fit.law.formula},
        "parameters": fit.coefficients,
        "centred": fit.centred,
        "standard_errors": fit.standard_errors,
        "fixed": dict(fit.fixed),
        "objective": dataclasses.asdict(fit.objective) | {"text": str(fit.objective)},
        "certificate": dataclasses.asdict(fit.certificate) | {"status": fit.certificate.status},
        "covariance": fit.covariance,
        "theta": fit.theta,
        "starts": fit.starts,
        "draws": None if fit.draws is None else dataclasses.asdict(fit.draws),
        "runs": dataclasses.asdict(fit.table) | {"digest": fit.table.digest},
        "allow": list(fit.allow),
        "seed": fit.seed,
        "versions": {"python": platform.python_version(), **versions},
    }
    return json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read(text: str, law: Law | None = None) -> dict[str, Any]:
    """The fields of the fit that ``write`` wrote.

    Args:
      text: JSON.
      law: for a law that is not in ``laws.registry()``; its name must be the stored one.

    Raises:
      ValueError: for text that is no stored fit, an unknown law, or runs that do not have the
        digest stored with them.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a stored fit: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not a stored fit of format {FORMAT}: {text[:40]!r}")
    name = content["law"]["name"]
    law = law or laws.registry().get(name)
    if law is None or law.name != name:
        raise ValueError(f"this is a fit of {name!r}: give that law, got {law and law.name!r}")
    runs = content["runs"]
    table = Table(
        inputs={key: np.array(column) for key, column in runs["inputs"].items()},
        observed=np.array(runs["observed"]),
        weights=np.array(runs["weights"]),
        conventions=runs["conventions"],
    )
    if table.digest != runs["digest"]:
        raise ValueError(
            f"the runs of this fit were changed: {table.digest} is not {runs['digest']}"
        )
    return {
        "law": law,
        "table": table,
        "objective": _objective(content["objective"]),
        "theta": np.array(content["theta"]),
        "fixed": content["fixed"],
        "starts": np.array(content["starts"]),
        "certificate": _certificate(content["certificate"]),
        "draws": _draws(content["draws"], len(law.names)),
        "allow": tuple(content["allow"]),
        "seed": content["seed"],
    }


def _objective(stored: dict[str, Any]) -> Objective:
    delta = math.inf if stored["delta"] is None else stored["delta"]
    return Objective(stored["kind"], stored["space"], delta, stored["q"])


def _certificate(stored: dict[str, Any]) -> Certificate:
    values = {f.name: stored[f.name] for f in dataclasses.fields(Certificate)}
    infinite = dict.fromkeys(("objective", "gradient", "step", "condition"), math.inf)
    values |= {name: inf for name, inf in infinite.items() if values[name] is None}
    flat = tuple(tuple(names) for names in values.pop("flat"))
    return Certificate(**values | {"flat": flat, "bounds": tuple(values["bounds"])})


def _draws(stored: dict[str, Any] | None, p: int) -> Draws | None:
    if stored is None:
        return None
    return Draws(**stored | {"theta": np.array(stored["theta"], np.float64).reshape(-1, p)})
