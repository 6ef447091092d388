"""Scaling laws fitted from logged runs."""

from jaxopt_suite.scaling_laws.runs import Runs as Runs
from jaxopt_suite.scaling_laws.runs import load_runs as load_runs

__all__ = ["Runs", "load_runs"]
