"""Gradient transformations: optax-style, pure, one algorithm family a file."""

from jaxopt_suite.optimizers.adamw_8bit import (
    ScaleByAdam8bitState,
    adamw_8bit,
    scale_by_adam_8bit,
)
from jaxopt_suite.optimizers.compression import compressors, feedback
from jaxopt_suite.optimizers.compression.mean import CompressedMeanState, compressed_mean
from jaxopt_suite.optimizers.demo import ScaleByDemoState, demo, scale_by_demo
from jaxopt_suite.optimizers.diloco import (
    DilocoState,
    EagerState,
    OneRoundLateState,
    SavicState,
    SlowMomentumState,
    co2,
    co2_adamw,
    diloco,
    diloco_adamw,
    eager_diloco,
    eager_diloco_adamw,
    mean_outer_params,
    mean_over_workers,
    nesterov,
    one_round_late,
    outer_params,
    relative_movement,
    savic,
    slow_momentum,
    streaming_diloco,
    streaming_diloco_adamw,
)
from jaxopt_suite.optimizers.grams import ScaleByGramsState, grams, scale_by_grams
from jaxopt_suite.optimizers.int8_mean import adamw_int8, intellect_int8
from jaxopt_suite.optimizers.onebit_adam import (
    ScaleByOnebitAdamState,
    onebit_adam,
    scale_by_onebit_adam,
)
from jaxopt_suite.optimizers.powersgd import powersgd
from jaxopt_suite.optimizers.registry import Paper, Recipe, registry
from jaxopt_suite.optimizers.shampoo import (
    ScaleByShampooState,
    ScaleBySoapState,
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    soap,
)
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
from jaxopt_suite.optimizers.terngrad import TerngradMeanState, terngrad, terngrad_mean

__all__ = [
    "CompressedMeanState",
    "DilocoState",
    "EagerState",
    "OneRoundLateState",
    "Paper",
    "Recipe",
    "SavicState",
    "ScaleByAdam8bitState",
    "ScaleByDemoState",
    "ScaleByGramsState",
    "ScaleByOnebitAdamState",
    "ScaleByShampooState",
    "ScaleBySoapState",
    "ScaleBySubsetNormState",
    "ScaleBySubspaceMomentumState",
    "SlowMomentumState",
    "TerngradMeanState",
    "adagrad_sn",
    "adam_sn",
    "adam_snsm",
    "adamw_8bit",
    "adamw_int8",
    "co2",
    "co2_adamw",
    "compressed_mean",
    "compressors",
    "demo",
    "diloco",
    "diloco_adamw",
    "eager_diloco",
    "eager_diloco_adamw",
    "feedback",
    "grams",
    "intellect_int8",
    "mean_outer_params",
    "mean_over_workers",
    "nesterov",
    "one_round_late",
    "onebit_adam",
    "outer_params",
    "powersgd",
    "registry",
    "relative_movement",
    "rmsprop_sn",
    "savic",
    "scale_by_adam_8bit",
    "scale_by_demo",
    "scale_by_grams",
    "scale_by_onebit_adam",
    "scale_by_shampoo",
    "scale_by_soap",
    "scale_by_subset_norm",
    "scale_by_subspace_momentum",
    "shampoo",
    "slow_momentum",
    "soap",
    "streaming_diloco",
    "streaming_diloco_adamw",
    "terngrad",
    "terngrad_mean",
]
