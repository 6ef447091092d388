"""From a law's parameters to the vector the solver moves, and back.

The vector ``theta`` has the logarithms of positive parameters and the others as they are, so that
bounds stay a box. Beside it stand *centred* coordinates ``z = centring @ theta``: the logarithm of
a coefficient plus its exponents times the mean logarithms of its inputs, which is the size of its
term in the middle of the runs. The solver measures steps and spreads starts in those. On the
Chinchilla runs centring takes the condition number of the Gauss-Newton matrix from 4e6 to 4e3.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_suite.scaling_laws.law import Law


def to_theta(law: Law, values: Mapping[str, Any]) -> np.ndarray:
    """Solver vectors ``[..., p]`` of parameters by name.

    Raises:
      ValueError: if a name is missing or unknown, or a positive parameter is not positive.
    """
    if set(values) != set(law.names):
        raise ValueError(f"{law.name} needs {', '.join(law.names)}, got {', '.join(values)}")
    columns = []
    for parameter in law.parameters:
        value = np.asarray(values[parameter.name], np.float64)
        if parameter.positive and not np.all(value > 0):
            raise ValueError(f"{parameter.name} of {law.name} must be positive, got {value}")
        columns.append(np.log(value) if parameter.positive else value)
    return np.stack(np.broadcast_arrays(*columns), axis=-1)


def from_theta(law: Law, theta: Any) -> dict[str, Any]:
    """Parameters by name of solver vectors ``[..., p]``, in arrays of the same kind."""
    numpy = np if isinstance(theta, np.ndarray) else jnp
    return {
        p.name: numpy.exp(theta[..., i]) if p.positive else theta[..., i]
        for i, p in enumerate(law.parameters)
    }


def box(law: Law, fixed: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds ``[p]`` of the solver vector, equal for parameters that are held.

    Raises:
      ValueError: if a value to hold is not finite, not positive where it must be, or of no
        parameter.
    """
    with np.errstate(divide="ignore"):
        bounds = np.array([np.log(p.bounds) if p.positive else p.bounds for p in law.parameters])
    low, high = bounds[:, 0].copy(), bounds[:, 1].copy()
    for name, value in fixed.items():
        parameter = law.parameter(name)
        if not (np.isfinite(value) and (value > 0 or not parameter.positive)):
            kind = "positive and finite" if parameter.positive else "finite"
            raise ValueError(f"{name} can be fixed at a {kind} value, got {value}")
        index = law.names.index(name)
        low[index] = high[index] = np.log(value) if parameter.positive else value
    return low, high


def centring(law: Law, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The matrix ``[p, p]`` that takes a solver vector to centred coordinates.

    Args:
      law: whose coefficients say what powers they multiply.
      columns: inputs by name; means are over all of each array.
    """
    place = {name: i for i, name in enumerate(law.names)}
    matrix = np.eye(len(place))
    for parameter in law.parameters:
        for column, signed in parameter.of.items():
            sign = -1.0 if signed.startswith("-") else 1.0
            mean = float(np.mean(np.log(columns[column])))
            matrix[place[parameter.name], place[signed.removeprefix("-")]] += sign * mean
    return matrix
