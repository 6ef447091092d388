"""Meshes, workers, sharded state, train steps, bytes on the wire, and plans for pods.

Everything here takes any optax transformation; nothing here knows one of ours.
"""

from jaxopt_suite.parallel import wire
from jaxopt_suite.parallel.layout import TrainState
from jaxopt_suite.parallel.meshes import make_mesh, parse_mesh
from jaxopt_suite.parallel.metrics import Metrics
from jaxopt_suite.parallel.planning import Plan, plan
from jaxopt_suite.parallel.processes import ProcessInfo, initialize
from jaxopt_suite.parallel.specs import check_specs, fsdp_specs, undivided, zero_specs
from jaxopt_suite.parallel.state_specs import state_specs
from jaxopt_suite.parallel.train_step import TrainStep, make_train_step
from jaxopt_suite.parallel.workers import run_workers

__all__ = [
    "Metrics",
    "Plan",
    "ProcessInfo",
    "TrainState",
    "TrainStep",
    "check_specs",
    "fsdp_specs",
    "initialize",
    "make_mesh",
    "make_train_step",
    "parse_mesh",
    "plan",
    "run_workers",
    "state_specs",
    "undivided",
    "wire",
    "zero_specs",
]
