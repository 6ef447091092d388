"""Outer loops: workers that train on their own, and step together now and then."""

from jaxopt_suite.optimizers.diloco.diloco import diloco
from jaxopt_suite.optimizers.diloco.outer import mean_over_workers, nesterov
from jaxopt_suite.optimizers.diloco.recipes import diloco_adamw, streaming_diloco_adamw
from jaxopt_suite.optimizers.diloco.state import DilocoState, outer_params
from jaxopt_suite.optimizers.diloco.streaming import streaming_diloco

__all__ = [
    "DilocoState",
    "diloco",
    "diloco_adamw",
    "mean_over_workers",
    "nesterov",
    "outer_params",
    "streaming_diloco",
    "streaming_diloco_adamw",
]
