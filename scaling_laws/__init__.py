"""Scaling laws fitted from logged runs."""

from jaxopt_suite.scaling_laws import laws, objectives
from jaxopt_suite.scaling_laws.certificate import Certificate
from jaxopt_suite.scaling_laws.comparison import Score, compare
from jaxopt_suite.scaling_laws.fit_result import Band, Fit
from jaxopt_suite.scaling_laws.fitting import certify, fit
from jaxopt_suite.scaling_laws.frontier import Frontier
from jaxopt_suite.scaling_laws.law import (
    Law,
    Parameter,
    Preset,
    coefficient,
    exponent,
    floor,
    power,
)
from jaxopt_suite.scaling_laws.noise_scale import noise_scale, read_noise_scale
from jaxopt_suite.scaling_laws.objectives import absolute, huber, quantile, squares
from jaxopt_suite.scaling_laws.refusals import (
    FitRefused,
    MixedRuns,
    NoInteriorOptimum,
    NotSeparable,
    TooFewRuns,
)
from jaxopt_suite.scaling_laws.runs import Runs, load_runs
from jaxopt_suite.scaling_laws.starts import grid

__all__ = [
    "Band",
    "Certificate",
    "Fit",
    "FitRefused",
    "Frontier",
    "Law",
    "MixedRuns",
    "NoInteriorOptimum",
    "NotSeparable",
    "Parameter",
    "Preset",
    "Runs",
    "Score",
    "TooFewRuns",
    "absolute",
    "certify",
    "coefficient",
    "compare",
    "exponent",
    "fit",
    "floor",
    "grid",
    "huber",
    "laws",
    "load_runs",
    "noise_scale",
    "objectives",
    "power",
    "quantile",
    "read_noise_scale",
    "squares",
]
