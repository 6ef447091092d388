"""From a preset and an optimizer to the plan of its train step."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import model
from jaxopt_suite.experiments.assembly import (
    abstract_model,
    assemble_step,
    find_preset,
    mesh_sizes,
    of_layout,
)
from jaxopt_suite.experiments.config import CompareConfig, LayoutConfig
from jaxopt_suite.experiments.entries import Entry, entries
from jaxopt_suite.experiments.plan_config import PlanConfig
from jaxopt_suite.experiments.steps import find_recipe
from jaxopt_suite.parallel.meshes import BATCH_AXES
from jaxopt_suite.parallel.planning import Plan, plan
from jaxopt_suite.parallel.topologies import Topology, describe
from jaxopt_suite.parallel.train_step import TrainStep


def make_plans(config: PlanConfig, *, topology: Topology | None = None) -> dict[str, Plan]:
    """Compiles the train step of each optimizer that ``config`` names.

    Args:
      config: what to plan for.
      topology: instead of the one that ``config`` names.

    Returns:
      Plans by optimizer, in the order named.

    Raises:
      UserError: if something named does not exist, does not fit together, or needs an extra that is
        not installed.
    """
    config.validate()
    sizes = mesh_sizes(config) or {}
    find_preset(config.preset)
    chosen = _entries(config)
    try:
        pod = topology or describe(config.topology)
        return {entry.recipe.name: _plan(config, entry, pod, sizes) for entry in chosen}
    except (ValueError, ModuleNotFoundError) as error:
        raise UserError(str(error)) from error


def model_flops(config: model.ModelConfig, *, sequences: int, seq_len: int) -> float:
    """FLOPs that a step of the model needs: no recomputation, nothing but matrix products.

    Forward two for each weight of a matrix and token, and two products of ``seq_len`` by the width
    for attention (the masked half is computed too); backward twice that. Looking up an embedding
    is no product.

    Args:
      config: the sizes.
      sequences: per step.
      seq_len: tokens predicted per sequence.
    """
    weights = model.n_params(config) - config.vocab_size * config.d_model
    weights -= (2 * config.n_layers + 1) * config.d_model  # scales of the norms
    attention = 2 * config.n_layers * config.d_model * seq_len
    return 6.0 * sequences * seq_len * (weights + attention)


def _entries(config: PlanConfig) -> list[Entry]:
    """The recipes named, with their settings."""
    for name in config.names():
        find_recipe(name)
    layout = {field.name: getattr(config, field.name) for field in dataclasses.fields(LayoutConfig)}
    return entries(CompareConfig(optimizers=",".join(config.names()), set=config.set, **layout))


def _plan(config: PlanConfig, entry: Entry, pod: Topology, mesh: Mapping[str, int]) -> Plan:
    sizes = find_preset(config.preset)
    graphdef, params = abstract_model(sizes, config)
    layout = of_layout(entry.recipe, config)
    optimizer = entry.recipe.make(entry.rate.value, **{**layout, **entry.settings})

    def make_step(mesh: Mesh) -> TrainStep:
        return assemble_step(
            config,
            optimizer,
            sizes=sizes,
            graphdef=graphdef,
            mesh=mesh,
            clip=config.clip,
            communicates=entry.recipe.communicates,
        )

    parts = math.prod(size for name, size in mesh.items() if name in BATCH_AXES)
    sequences = config.batch_size or parts * config.accumulate
    return plan(
        make_step,
        params,
        jax.ShapeDtypeStruct((sequences, config.seq_len + 1), jnp.int32),
        topology=pod,
        mesh=mesh,
        model_flops=model_flops(sizes, sequences=sequences, seq_len=config.seq_len),
        steps_per_round=entry.steps_per_round(),
    )
