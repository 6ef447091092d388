"""Scaling laws fitted from logged runs."""

from jaxopt_suite.scaling_laws import laws, objectives
from jaxopt_suite.scaling_laws.certificate import Certificate
from jaxopt_suite.scaling_laws.comparison import Score, compare
from jaxopt_suite.scaling_laws.envelope import Envelope, envelope
from jaxopt_suite.scaling_laws.fit_result import Band, Fit
from jaxopt_suite.scaling_laws.fitting import certify, fit
from jaxopt_suite.scaling_laws.frontier import Frontier
from jaxopt_suite.scaling_laws.isoflop import IsoFLOP, isoflop
from jaxopt_suite.scaling_laws.law import (
    Law,
    Parameter,
    Preset,
    coefficient,
    exponent,
    floor,
    power,
)
from jaxopt_suite.scaling_laws.next_run import NextRun
from jaxopt_suite.scaling_laws.noise_scale import noise_scale, read_noise_scale
from jaxopt_suite.scaling_laws.objectives import absolute, huber, quantile, squares
from jaxopt_suite.scaling_laws.refusals import (
    FitRefused,
    MixedRuns,
    NoInteriorOptimum,
    NotSeparable,
    TooFewRuns,
    TooFewSlices,
)
from jaxopt_suite.scaling_laws.runs import Runs, load_runs
from jaxopt_suite.scaling_laws.starts import grid

__all__ = [
    "Band",
    "Certificate",
    "Envelope",
    "Fit",
    "FitRefused",
    "Frontier",
    "IsoFLOP",
    "Law",
    "MixedRuns",
    "NextRun",
    "NoInteriorOptimum",
    "NotSeparable",
    "Parameter",
    "Preset",
    "Runs",
    "Score",
    "TooFewRuns",
    "TooFewSlices",
    "absolute",
    "certify",
    "coefficient",
    "compare",
    "envelope",
    "exponent",
    "fit",
    "floor",
    "grid",
    "huber",
    "isoflop",
    "laws",
    "load_runs",
    "noise_scale",
    "objectives",
    "power",
    "quantile",
    "read_noise_scale",
    "squares",
]
