"""Scaling laws fitted from logged runs."""

from jaxopt_suite.scaling_laws.noise_scale import noise_scale as noise_scale
from jaxopt_suite.scaling_laws.noise_scale import read_noise_scale as read_noise_scale
from jaxopt_suite.scaling_laws.runs import Runs as Runs
from jaxopt_suite.scaling_laws.runs import load_runs as load_runs

__all__ = ["Runs", "load_runs", "noise_scale", "read_noise_scale"]
