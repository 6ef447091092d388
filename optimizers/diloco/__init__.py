"""Outer loops: workers that train on their own, and step together now and then."""

from jaxopt_suite.optimizers.diloco.co2 import (
    SlowMomentumState,
    co2,
    relative_movement,
    slow_momentum,
)
from jaxopt_suite.optimizers.diloco.delayed import OneRoundLateState, one_round_late
from jaxopt_suite.optimizers.diloco.diloco import diloco
from jaxopt_suite.optimizers.diloco.eager import EagerState, eager_diloco, mean_outer_params
from jaxopt_suite.optimizers.diloco.late_recipes import co2_adamw, eager_diloco_adamw
from jaxopt_suite.optimizers.diloco.outer import mean_over_workers, nesterov
from jaxopt_suite.optimizers.diloco.recipes import diloco_adamw, streaming_diloco_adamw
from jaxopt_suite.optimizers.diloco.savic import SavicState, savic
from jaxopt_suite.optimizers.diloco.state import DilocoState, outer_params
from jaxopt_suite.optimizers.diloco.streaming import streaming_diloco

__all__ = [
    "DilocoState",
    "EagerState",
    "OneRoundLateState",
    "SavicState",
    "SlowMomentumState",
    "co2",
    "co2_adamw",
    "diloco",
    "diloco_adamw",
    "eager_diloco",
    "eager_diloco_adamw",
    "mean_outer_params",
    "mean_over_workers",
    "nesterov",
    "one_round_late",
    "outer_params",
    "relative_movement",
    "savic",
    "slow_momentum",
    "streaming_diloco",
    "streaming_diloco_adamw",
]
