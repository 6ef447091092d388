"""Runs to fit laws to: read from files and frames, checked, and traced to where they came from."""

from jaxopt_suite.scaling_laws.runs.load import load_runs
from jaxopt_suite.scaling_laws.runs.table import BadRuns, Conventions, Dropped, Origins, Runs

__all__ = ["BadRuns", "Conventions", "Dropped", "Origins", "Runs", "load_runs"]
