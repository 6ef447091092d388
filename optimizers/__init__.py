"""Gradient transformations: optax-style, pure, one algorithm family a file."""

from jaxopt_suite.optimizers.grams import ScaleByGramsState, grams, scale_by_grams
from jaxopt_suite.optimizers.registry import Paper, Recipe, registry
from jaxopt_suite.optimizers.subset_norm import (
    ScaleBySubsetNormState,
    adagrad_sn,
    adam_sn,
    rmsprop_sn,
    scale_by_subset_norm,
)
from jaxopt_suite.optimizers.subspace_momentum import (
    ScaleBySubspaceMomentumState,
    adam_snsm,
    scale_by_subspace_momentum,
)

__all__ = [
    "Paper",
    "Recipe",
    "ScaleByGramsState",
    "ScaleBySubsetNormState",
    "ScaleBySubspaceMomentumState",
    "adagrad_sn",
    "adam_sn",
    "adam_snsm",
    "grams",
    "registry",
    "rmsprop_sn",
    "scale_by_grams",
    "scale_by_subset_norm",
    "scale_by_subspace_momentum",
]
