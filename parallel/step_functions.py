"""What of a train step is compiled: the state before the first step, and the step itself."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AxisType

from jaxopt_suite.parallel.gradients import loss_and_gradient
from jaxopt_suite.parallel.layout import Layout, Placement, TrainState, apply
from jaxopt_suite.parallel.metrics import Metrics, measure
from jaxopt_suite.parallel.placing import constrain
from jaxopt_suite.parallel.workers import map_workers


@dataclasses.dataclass(frozen=True, eq=False)
class StepFunctions:
    """The functions of a ``TrainStep``, all workers and all devices at once; pure, not yet jitted.

    Attributes:
      loss_fn: ``(params, batch) -> loss``, the mean over the batch.
      tx: the transformation.
      placement: mesh, workers and shardings.
      accumulate: micro-batches per step.
    """

    loss_fn: Callable[[Any, Any], jax.Array]
    tx: optax.GradientTransformationExtraArgs
    placement: Placement
    accumulate: int

    def initial(self, layout: Layout, params: Any) -> TrainState:
        """The state before the first step, of one worker's parameters."""
        make = lambda p: TrainState(p, self.tx.init(p))
        return self._on_mesh(self._per_worker(make, (None,), layout.axes), layout.state_shardings)(
            params
        )

    def step(
        self, layout: Layout, state: TrainState, batch: Any, *active: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """The state after a step and its metrics; ``active``, if given, is ``[workers]``."""
        if self.placement.worker_axis is not None:
            workers = self.placement.workers
            batch = jax.tree.map(lambda x: x.reshape(workers, -1, *x.shape[1:]), batch)
        one = self._per_worker(
            functools.partial(self._one_worker, layout),
            (layout.axes, 0, *(0 for _ in active)),
            (layout.axes, 0),
        )
        shardings = layout.state_shardings, self.placement.metrics
        state, metrics = self._on_mesh(one, shardings)(layout.fetched(state), batch, *active)
        return layout.put_back(state), metrics

    def _on_mesh(self, fn: Callable[..., Any], out_sharding: Any) -> Callable[..., Any]:
        """``fn`` traced with all axes left to the partitioner, whatever types the mesh has."""
        mesh = self.placement.mesh
        if mesh is None:
            return fn
        explicit = tuple(
            name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Explicit
        )
        if explicit:
            return jax.sharding.auto_axes(fn, axes=explicit, out_sharding=out_sharding)

        def in_context(*args: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return fn(*args)

        return in_context

    def _per_worker(self, fn: Callable[..., Any], in_axes: Any, out_axes: Any) -> Any:
        axis_name = self.placement.worker_axis
        if axis_name is None:
            return fn

        def mapped(*args: Any) -> Any:
            # The mesh of the context: its axes are automatic, where those of ours may be explicit.
            mesh = None if self.placement.mesh is None else jax.sharding.get_abstract_mesh()
            run = map_workers(
                fn,
                axis_name=axis_name,
                mesh=mesh,
                size=self.placement.workers,
                in_axes=in_axes,
                out_axes=out_axes,
            )
            return run(*args)

        return mapped

    def _one_worker(
        self, layout: Layout, state: TrainState, batch: Any, active: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        axis = self.placement.worker_axis
        with jax.named_scope("gradients"):
            gradient = loss_and_gradient(self.loss_fn, accumulate=self.accumulate, axis_name=axis)
            loss, grads = gradient(state.params, batch)
            grads = constrain(grads, layout.update_specs)
        with jax.named_scope("optimizer"):
            # With ZeRO axes each device updates its part of the parameters, and only then are they
            # put together again.
            at = state._replace(params=constrain(state.params, layout.update_specs))
            meshless = self.placement.mesh is None and axis is None
            extra = {} if meshless else {"param_specs": layout.update_specs}
            extra |= {} if active is None else {"active": active}
            updates, state = apply(self.tx, grads, at, **extra)
            state = state._replace(params=constrain(state.params, layout.param_specs))
        with jax.named_scope("metrics"):
            return state, measure(loss, grads, updates, active)
