"""A run that goes on with another number of workers.

What all workers share is as it was saved. Workers 0, 1, ... keep what was theirs; what those who
left had done since the last synchronisation, and what they still owed, is lost. A new worker begins
as a run begins: at the parameters that are evaluated (of an outer loop, the outer ones), with the
state that the optimizer has there, in which the schedules of the others count on.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxopt_suite.experiments.steps import Program
from jaxopt_suite.optimizers.diloco.local import counts_only
from jaxopt_suite.parallel.layout import TrainState
from jaxopt_suite.parallel.workers import map_axes


def of_workers(program: Program) -> TrainState:
    """For every leaf of the state, whether its first axis is that of the workers."""
    axes = program.train_step.layout(program.abstract_params).axes
    return map_axes(lambda axis, _: axis is not None, axes, program.abstract_state)


def with_joiners(program: Program, state: TrainState, before: int | None) -> TrainState:
    """The state in which workers that have joined have something to begin with.

    Args:
      program: of the run as it goes on.
      state: as restored, zeros for those who have joined.
      before: how many workers there were; None: nothing differs between workers.
    """
    if before is None or before >= program.train_step.placement.workers:
        return state
    layout, mesh = program.train_step.layout(program.abstract_params), program.train_step.mesh

    def start(state: TrainState) -> Any:
        there = lambda axis, x: x if axis is None else x[:before]
        return program.agreed(map_axes(there, layout.axes, layout.fetched(state)))

    def fill(state: TrainState, fresh: TrainState) -> TrainState:
        state, fresh = layout.fetched(state), layout.fetched(fresh)
        fresh = jax.tree.map(_count_on, fresh, state, is_leaf=counts_only)
        joined = lambda own, x, new: jnp.concatenate([x[:before], new[before:]]) if own else x
        return layout.put_back(jax.tree.map(joined, of_workers(program), state, fresh))

    whole = None
    if mesh is not None:
        whole = jax.tree.map(lambda spec: NamedSharding(mesh, spec), layout.param_specs)
    fresh = program.train_step.init(jax.jit(start, out_shardings=whole)(state))
    return jax.jit(fill, out_shardings=layout.state_shardings)(state, fresh)


def _count_on(new: Any, old: Any) -> Any:
    """A schedule's count, as far as the furthest worker was."""
    return jax.tree.map(lambda x: jnp.full_like(x, x.max()), old) if counts_only(new) else new
