"""The result of a fit: coefficients, how sure they are, and what follows from them."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxopt_suite import core
from jaxopt_suite.scaling_laws import artefact, coordinates, summary, uncertainty, validation
from jaxopt_suite.scaling_laws.batch import Batch
from jaxopt_suite.scaling_laws.certificate import Certificate
from jaxopt_suite.scaling_laws.distributions import student_quantile
from jaxopt_suite.scaling_laws.double import in_double
from jaxopt_suite.scaling_laws.frontier import FlopRule, Frontier, frontier
from jaxopt_suite.scaling_laws.law import Law
from jaxopt_suite.scaling_laws.objectives import Objective
from jaxopt_suite.scaling_laws.refusals import FitRefused
from jaxopt_suite.scaling_laws.solver import Rows
from jaxopt_suite.scaling_laws.table import Table
from jaxopt_suite.scaling_laws.uncertainty import Draws, Profile

METHODS = ("bootstrap", "covariance", "profile")
HOLDOUT_STARTS = 32  # the best of the fit's own starts serve the fits of a validation


@dataclasses.dataclass(frozen=True)
class Band:
    """Predictions with an interval of the curve, without the scatter of single runs.

    Attributes:
      value: of the fit, shape of the inputs.
      low: lower end.
      high: upper end.
      level: share of resampled fits between them.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A fitted law. Made by ``fit``; stored and read by ``to_json`` and ``from_json``.

    Attributes:
      law: that was fitted.
      table: the runs.
      objective: that was minimised, part of what the numbers mean.
      theta: solver vector ``[p]`` of the optimum.
      fixed: parameters that were held, by name.
      starts: the solver vectors ``[starts, p]`` that reached the lowest objectives, best first.
      certificate: whether the optimum is one.
      draws: fits of resampled runs, or ``None``.
      allow: checks that were left out.
      seed: of starts and resamples.
    """

    law: Law
    table: Table
    objective: Objective
    theta: np.ndarray
    fixed: Mapping[str, float]
    starts: np.ndarray
    certificate: Certificate
    draws: Draws | None
    allow: tuple[str, ...]
    seed: int

    @property
    def coefficients(self) -> dict[str, float]:
        """The parameters by name, in the units of the law."""
        return {k: float(v) for k, v in coordinates.from_theta(self.law, self.theta).items()}

    @property
    def centred(self) -> dict[str, float]:
        """Centred coordinates by parameter; see ``coordinates``."""
        return dict(zip(self.law.names, (self.batch.centring @ self.theta).tolist(), strict=True))

    @property
    def converged(self) -> bool:
        """Whether the optimum was certified; see ``certificate``."""
        return self.certificate.converged

    @functools.cached_property
    def batch(self) -> Batch:
        """The runs and objective as the solver takes them."""
        centring = coordinates.centring(self.law, self.table.inputs)
        return Batch(
            self.law,
            self.objective,
            Rows(self.table.inputs, self.table.observed),
            centring,
            self.table.weights,
            *coordinates.box(self.law, self.fixed),
        )

    @property
    def free(self) -> np.ndarray:
        """Which parameters were fitted and are not at a bound, ``bool [p]``."""
        bound = set(self.certificate.bounds) | set(self.fixed)
        return np.array([name not in bound for name in self.law.names])

    @property
    def degrees(self) -> int:
        """Degrees of freedom: runs with a weight less fitted parameters."""
        fitted = len(self.law.names) - len(self.fixed)
        return self.table.used - fitted

    @functools.cached_property
    def residuals(self) -> np.ndarray:
        """Residuals ``[n]`` in the objective's space; over-prediction is positive."""
        return uncertainty.linearise(self.batch, self.theta)[0]

    @functools.cached_property
    def covariance(self) -> np.ndarray:
        """Covariance ``[p, p]`` of the solver vector: of logarithms for positive parameters."""
        return uncertainty.covariance(self.batch, self.theta, self.free)

    @functools.cached_property
    def standard_errors(self) -> dict[str, float]:
        """From the resampled fits in the law's units; from the covariance where there are none."""
        if self.draws is not None:
            spread = self._drawn()
            return {name: float(np.std(spread[name])) for name in self.law.names}
        values = self.coefficients
        errors = np.sqrt(np.diag(self.covariance)).tolist()
        return {
            p.name: error * values[p.name] if p.positive else error
            for p, error in zip(self.law.parameters, errors, strict=True)
        }

    def interval(
        self, name: str, level: float = 0.9, *, method: str | None = None
    ) -> tuple[float, float]:
        """A confidence interval of one parameter.

        Args:
          name: of the parameter.
          level: share of such intervals that hold the truth, in (0, 1).
          method: ``"bootstrap"`` (quantiles of resampled fits), ``"covariance"`` (Student's ``t``
            around the optimum, in the logarithm for positive parameters) or ``"profile"``. By
            default the bootstrap where the fit has one, else the covariance.

        Raises:
          ValueError: for an unknown name or method.
          FitRefused: if the fit has no resamples to take quantiles of, or no degrees of freedom.
        """
        parameter = self.law.parameter(name)
        core.check_number("level", level, low=0.0, high=1.0, low_open=True, high_open=True)
        method = method or ("covariance" if self.draws is None else "bootstrap")
        core.check_choice("method", method, METHODS)
        if method == "bootstrap":
            tails = [(1 - level) / 2, (1 + level) / 2]
            low, high = np.quantile(self._drawn()[name], tails).tolist()
            return low, high
        if self.degrees < 1:
            raise FitRefused(f"no degrees of freedom left: {method} says nothing of {name}")
        if method == "profile":
            return self.profile(name).interval(level)
        index = self.law.names.index(name)
        reach = student_quantile(level, self.degrees) * np.sqrt(self.covariance[index, index])
        ends = self.theta[index] + np.array([-reach, reach])
        with np.errstate(over="ignore"):  # what is not determined at all ends at infinity
            low, high = (np.exp(ends) if parameter.positive else ends).tolist()
        return low, high

    def profile(self, name: str) -> Profile:
        """The objective along one parameter, the others fitted at each of its values.

        Raises:
          FitRefused: if it is held or at a bound.
        """
        index = self.law.names.index(self.law.parameter(name).name)
        best = self.batch.view(self.theta[None], self.batch.problems(1)).take(0)
        return uncertainty.profile(self.batch, best, self.covariance, index)

    @in_double
    def predict(self, inputs: Mapping[str, Any], *, level: float | None = None) -> Any:
        """The law's value at new inputs.

        Args:
          inputs: arrays of one shape by the law's input names, or numbers.
          level: for an interval of the curve; ``None`` gives the value alone.

        Returns:
          A float64 array in the shape of the inputs, or a ``Band``.

        Raises:
          ValueError: if an input is missing.
          FitRefused: for an interval of a fit without resamples.
        """
        missing = set(self.law.inputs) - set(inputs)
        if missing:
            raise ValueError(f"{self.law.name} reads {', '.join(self.law.inputs)}, got {[*inputs]}")
        given = [np.asarray(inputs[name], np.float64) for name in self.law.inputs]
        columns = dict(zip(self.law.inputs, np.broadcast_arrays(*given), strict=True))
        value = np.asarray(self.law.predict(self.coefficients, columns))
        if level is None:
            return value
        core.check_number("level", level, low=0.0, high=1.0, low_open=True, high_open=True)
        ones = (1,) * value.ndim
        spread = {k: v.reshape(-1, *ones) for k, v in self._drawn().items()}
        curves = np.asarray(self.law.predict(spread, {k: v[None] for k, v in columns.items()}))
        low, high = np.quantile(curves, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return Band(value, low, high, level)

    def compute_optimal(
        self, flops: Any, *, rule: FlopRule | None = None, level: float = 0.9, **others: float
    ) -> Frontier:
        """The best model and data size for budgets of compute.

        Args:
          flops: FLOPs of training, a number or ``[budgets]``.
          rule: FLOPs of a run of ``N`` parameters on ``D`` tokens, as a function of arrays that
            rises in both; ``None`` for ``6 N D``.
          level: of intervals, which come from the resampled fits and are left out without them.
          **others: values of the law's inputs besides ``N`` and ``D``.

        Raises:
          ValueError: if the law lacks ``N`` or ``D``, or a budget is not positive.
          NoInteriorOptimum: if the search ends at an edge.
        """
        n, d = (self.table.inputs.get(name, np.ones(1)) for name in ("N", "D"))
        return frontier(
            self.law,
            self.coefficients,
            None if self.draws is None else self._drawn(),
            flops,
            rule=rule,
            others=others,
            largest=float(np.max(6 * n * d if rule is None else rule(n, d))),
            level=level,
        )

    def holdout(
        self,
        by: str | np.ndarray,
        *,
        largest: float | None = None,
        cuts: Sequence[float] | None = None,
    ) -> list[validation.Holdout]:
        """Errors on runs that a fit did not see, refitted with all else the same.

        Args:
          by: an input's name, or numbers ``[n]``, to split by.
          largest: hold out this share of the runs, those with the largest values.
          cuts: hold out the runs from each of these values on, one fit for each.
            With neither, each different value is held out in turn.

        Raises:
          ValueError: for an unknown column or both ways to split.
          TooFewRuns: if a split leaves too few runs.
        """
        if largest is not None and cuts is not None:
            raise ValueError("holdout takes largest or cuts, got both")
        name = by if isinstance(by, str) else "value"
        values = self._column(by)
        if largest is not None:
            core.check_number("largest", largest, low=0, high=1, low_open=True, high_open=True)
            masks = validation.largest(values, name, largest)
        elif cuts is not None:
            masks = validation.rolling(values, name, cuts)
        else:
            masks = validation.leave_one_out(values, name)
        return validation.holdouts(self.batch, self.starts, masks)

    def summary(self, level: float = 0.9) -> str:
        """A plain-text table of coefficients and intervals, the certificate, and warnings."""
        return summary.summary(self, level)

    def to_json(self) -> str:
        """One JSON object with the runs, the optimum, the certificate and the resamples."""
        return artefact.write(self)

    @classmethod
    def from_json(cls, text: str, law: Law | None = None) -> "Fit":
        """The fit that ``to_json`` wrote.

        Args:
          text: JSON.
          law: for a law that is not in ``laws.registry()``.

        Raises:
          ValueError: for other text, an unknown law, or runs without the digest stored with them.
        """
        return cls(**artefact.read(text, law))

    def _column(self, by: str | np.ndarray) -> np.ndarray:
        if isinstance(by, str) and by in self.table.inputs:
            return self.table.inputs[by]
        values = np.asarray(by)
        if isinstance(by, str) or values.shape != (self.table.n,):
            raise ValueError(
                f"by must be one of {', '.join(self.table.inputs)} or {self.table.n} numbers, "
                f"got {by!r}"
            )
        return values

    def _drawn(self) -> dict[str, np.ndarray]:
        """Parameters of the resampled fits, ``[replicates]`` each."""
        if self.draws is None:
            raise FitRefused("this fit has no resamples: fit with bootstrap=1000")
        return coordinates.from_theta(self.law, self.draws.theta)
