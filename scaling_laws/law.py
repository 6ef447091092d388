"""What a scaling law is: a formula, its parameters with units, and the values others published.

**How to write one.** A law needs a name, the columns it reads, its parameters, and ``predict``::

    def predict(p, x):
        return p["E"] + p["A"] * power(x["N"], -p["alpha"])

    law = Law(
        name="power",
        formula="L = E + A N^-alpha",
        inputs=("N",),
        parameters=(floor("E"), coefficient("A", of={"N": "-alpha"}), exponent("alpha")),
        predict=predict,
    )

``predict`` gets mappings from names to arrays, all inputs of one shape, and returns an array of
that shape; it is traced by JAX and differentiated twice, so it uses ``jax.numpy`` and plain
arithmetic. Rules that make a law fit well:

- Write a power as ``power(x, a)``: twice as fast as ``x**a`` under XLA on a CPU.
- Any column can be an input: unique tokens, experts, batch size, a learning rate. A categorical one
  is a column of integers, and ``predict`` picks a parameter by it with ``jnp.where``: this is how
  some parameters are shared between groups of runs and others are not.
- A piecewise law uses ``jnp.where`` with both branches finite. One that is given implicitly solves
  its equation by a fixed number of Newton steps inside ``predict``. Where automatic derivatives are
  slow or wrong, ``jax.custom_jvp`` on ``predict`` supplies analytic ones.
- ``of`` says which powers a coefficient multiplies. It is optional and changes no optimum: the
  solver then works with the size of that term in the middle of the runs, which moves independently
  of the exponent, and starts are spread there. Without it, give the coefficient a ``start``.
- A law of another quantity than the loss names its column in ``output``.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

Arrays = Mapping[str, Any]
Predict = Callable[[Arrays, Arrays], Any]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a law, in its own unit.

    Attributes:
      name: as in the formula, and the key under which ``predict`` finds it.
      unit: ``"loss"``, ``"tokens"``, or empty for a number without one.
      positive: whether the solver works with its logarithm.
      bounds: smallest and largest value; zero is not reached by a positive parameter.
      start: range that starts are spread over, evenly in the logarithm if positive.
      relative: whether ``start`` is in units of the smallest observed output.
      of: the powers this parameter multiplies, such as ``{"N": "-alpha"}``.
    """

    name: str
    unit: str = ""
    positive: bool = False
    bounds: tuple[float, float] = (-math.inf, math.inf)
    start: tuple[float, float] = (-1.0, 1.0)
    relative: bool = False
    of: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.positive and self.bounds[0] < 0:
            object.__setattr__(self, "bounds", (0.0, self.bounds[1]))
        low, high = self.bounds
        if not low < high:
            raise ValueError(f"bounds of {self.name} must rise, got {self.bounds}")
        least = 0.0 if self.positive else -math.inf
        if not (least < self.start[0] <= self.start[1] < math.inf):
            raise ValueError(
                f"start of {self.name} must be a rising pair of finite "
                f"{'positive ' if self.positive else ''}numbers, got {self.start}"
            )


def coefficient(
    name: str,
    *,
    unit: str = "loss",
    of: Mapping[str, str] | None = None,
    start: tuple[float, float] | None = None,
    bounds: tuple[float, float] = (0.0, math.inf),
) -> Parameter:
    """A positive factor, fitted as its logarithm.

    Args:
      name: of the parameter.
      unit: of the term it multiplies powers in.
      of: the powers it multiplies: ``{"N": "-alpha"}`` for $A N^{-\\alpha}$.
      start: range of starts; without one the *term* starts within a factor $e^3$ of the smallest
        observed output in the middle of the runs.
      bounds: smallest and largest value.
    """
    relative = start is None
    start = start or (math.exp(-3), math.exp(3))
    return Parameter(name, unit, True, bounds, start, relative, dict(of or {}))


def exponent(
    name: str,
    *,
    start: tuple[float, float] = (0.05, 1.5),
    bounds: tuple[float, float] = (0.0, 10.0),
) -> Parameter:
    """A dimensionless exponent, fitted as it is. The sign is the formula's."""
    return Parameter(name, "", False, bounds, start)


def floor(name: str, *, unit: str = "loss") -> Parameter:
    """An irreducible part, at least 0. It is fitted as it is, so that 0 is a bound it can reach."""
    return Parameter(name, unit, False, (0.0, math.inf), (0.0, 0.95), True)


def power(x: Any, a: Any) -> Any:
    """``x**a`` for positive ``x``, as an exponential: XLA has a fast one of doubles on CPUs."""
    return jnp.exp(a * jnp.log(x))


@dataclasses.dataclass(frozen=True)
class Preset:
    """Parameter values somebody published.

    Attributes:
      values: by parameter name, in the units of the law.
      source: title, arXiv id, year, and what was done to the numbers.
    """

    values: Mapping[str, float]
    source: str


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    """A scaling law. See the module's text for how to write one.

    Attributes:
      name: under which a stored fit finds its law again.
      formula: as a person writes it.
      inputs: columns that ``predict`` reads.
      parameters: in the order of tables and covariance matrices.
      predict: ``(parameters, inputs) -> output``, traced by JAX.
      output: the column that is predicted.
      source: title, arXiv id, year.
      presets: published values by name.
      optimum: ``(parameters, flops) -> (N, D)`` that minimise the output under ``6 N D = flops``,
        where a closed form exists; arrays broadcast.
    """

    name: str
    formula: str
    inputs: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    predict: Predict
    output: str = "loss"
    source: str = ""
    presets: Mapping[str, Preset] = dataclasses.field(default_factory=dict)
    optimum: Callable[[Arrays, Any], tuple[Any, Any]] | None = None

    def __post_init__(self) -> None:
        names = self.names
        if len(set(names)) != len(names):
            raise ValueError(f"parameters of {self.name} must have different names, got {names}")
        for parameter in self.parameters:
            self._check_powers(parameter)
        for key, preset in self.presets.items():
            if set(preset.values) != set(names):
                raise ValueError(
                    f"preset {key!r} of {self.name} must give {', '.join(names)}, "
                    f"got {', '.join(preset.values)}"
                )

    def _check_powers(self, parameter: Parameter) -> None:
        linear = {p.name for p in self.parameters if not p.positive}
        for column, signed in parameter.of.items():
            if column not in self.inputs or signed.removeprefix("-") not in linear:
                raise ValueError(
                    f"{parameter.name} of {self.name} multiplies a power of an input "
                    f"({', '.join(self.inputs)}) with an exponent that is not fitted as a "
                    f"logarithm ({', '.join(sorted(linear))}), got {column!r}: {signed!r}"
                )
        if parameter.of and not parameter.positive:
            raise ValueError(f"{parameter.name} of {self.name} multiplies powers: make it positive")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(p.name for p in self.parameters)

    def parameter(self, name: str) -> Parameter:
        """One parameter by name.

        Raises:
          ValueError: if there is none of that name.
        """
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise ValueError(f"{self.name} has parameters {', '.join(self.names)}, got {name!r}")
