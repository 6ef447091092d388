"""Pallas kernels, each beside its definition in plain JAX; ``impl=`` says which of them runs."""

from jaxopt_suite.kernels.gram import gram_update
from jaxopt_suite.kernels.implementations import IMPLS, Impl, resolve

__all__ = ["IMPLS", "Impl", "gram_update", "resolve"]
