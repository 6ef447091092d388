"""Where the state of training lies: its shapes, its shardings, and what differs between workers."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_suite.parallel.offload import host_shardings, to_device, to_host
from jaxopt_suite.parallel.specs import broadcast_specs, check_specs, zero_specs
from jaxopt_suite.parallel.state_specs import state_specs
from jaxopt_suite.parallel.workers import map_axes, result_axes


class TrainState(NamedTuple):
    """What a step takes and gives, and what a checkpoint holds.

    With a worker axis, a leaf that may differ between workers has a leading axis of size workers.
    """

    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """The layout of one model's train state on one mesh.

    Attributes:
      axes: for every leaf of the state 0 where workers have their own, None where all share it.
      abstract_state: shapes and dtypes of the state, and its shardings if there is a mesh.
      param_specs: of one worker's parameters; None without a mesh.
      update_specs: of one worker's gradients and updates: the parameters', with ZeRO axes.
      device_state: like the shardings of the optimizer state, but in device memory; None if
        that is where the state is kept.
    """

    axes: TrainState
    abstract_state: TrainState
    param_specs: Any
    update_specs: Any
    device_state: Any

    @property
    def state_shardings(self) -> TrainState | None:
        """Shardings of the state; None without a mesh."""
        if self.param_specs is None:
            return None
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def fetched(self, state: TrainState) -> TrainState:
        """Inside ``jit``: the state with what rests with the hosts on the devices."""
        if self.device_state is None:
            return state
        return state._replace(opt_state=to_device(state.opt_state, self.device_state))

    def put_back(self, state: TrainState) -> TrainState:
        """Inside ``jit``: the state with all of it where it rests, see ``offload.to_host``."""
        if self.device_state is None:
            return state
        at_rest = jax.tree.map(lambda x: x.sharding, self.abstract_state.opt_state)
        return state._replace(opt_state=to_host(state.opt_state, at_rest))


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """What decides a layout, besides the model: see ``make_train_step`` for the meaning of each."""

    mesh: Mesh | None
    param_specs: Any
    worker_axis: str | None
    workers: int
    shard_state_over: tuple[str, ...]
    offload_state: bool

    @property
    def one_per_worker(self) -> NamedSharding | None:
        """How one number for each worker lies; None without a mesh or without workers."""
        if self.mesh is None or self.worker_axis is None:
            return None
        return NamedSharding(self.mesh, PartitionSpec(self.worker_axis))

    @property
    def metrics(self) -> NamedSharding | None:
        """How what a step reports lies: each worker's where it is, else on every device."""
        if self.mesh is None or self.worker_axis is not None:
            return self.one_per_worker
        return NamedSharding(self.mesh, PartitionSpec())

    def layout(self, tx: optax.GradientTransformationExtraArgs, params_like: Any) -> Layout:
        """The layout for one worker's parameters of these shapes and dtypes.

        Raises:
          ValueError: if a spec is not legal for its parameter.
        """
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params_like)
        local = TrainState(params, jax.eval_shape(tx.init, params))
        if self.mesh is None:
            axes = self._axes(tx, local, None)
            return Layout(axes, self._stacked(local, axes), None, None, None)
        specs = broadcast_specs(params, self.param_specs)
        check_specs(params, specs, self.mesh, worker_axis=self.worker_axis)
        updates = zero_specs(params, specs, self.mesh, self.shard_state_over)
        axes = self._axes(tx, local, updates)
        of_state = state_specs(
            tx,
            params,
            specs,
            self.mesh,
            shard_state_over=self.shard_state_over,
            worker_axis=self.worker_axis,
        )
        on_device = self._shardings(self.mesh, TrainState(specs, of_state), axes)
        stacked, kept = self._stacked(local, axes), on_device
        if self.offload_state:
            at_rest = host_shardings(stacked.opt_state, on_device.opt_state)
            kept = on_device._replace(opt_state=at_rest)
        return Layout(
            axes=axes,
            abstract_state=jax.tree.map(_with_sharding, stacked, kept),
            param_specs=specs,
            update_specs=updates,
            device_state=on_device.opt_state if self.offload_state else None,
        )

    def _axes(self, tx: Any, local: TrainState, specs: Any) -> TrainState:
        if self.worker_axis is None:
            return jax.tree.map(lambda _: None, local)
        return state_axes(
            tx,
            local,
            axis_name=self.worker_axis,
            mesh=self.mesh,
            workers=self.workers,
            param_specs=specs,
        )

    def _stacked(self, local: TrainState, axes: TrainState) -> TrainState:
        return map_axes(lambda axis, x: _stack(x, axis, self.workers), axes, local)

    def _shardings(self, mesh: Mesh, specs: TrainState, axes: TrainState) -> TrainState:
        def sharding(axis: int | None, spec: PartitionSpec) -> NamedSharding:
            own = () if axis is None else (self.worker_axis,)
            return NamedSharding(mesh, PartitionSpec(*own, *spec))

        return map_axes(sharding, axes, specs)


def state_axes(
    tx: optax.GradientTransformationExtraArgs,
    local: TrainState,
    *,
    axis_name: str,
    mesh: Mesh | None,
    workers: int,
    param_specs: Any,
) -> TrainState:
    """What of the state differs between workers once they have taken steps of their own.

    The types of JAX tell it for one update; what an update makes different is different in the
    next, so the question is put again until the answer stays as it is.

    Args:
      tx: the transformation.
      local: shapes and dtypes of one worker's state.
      axis_name: the workers' axis.
      mesh: None for a simulated fleet.
      workers: how many there are.
      param_specs: handed to ``tx``.

    Returns:
      0 where workers have their own, None where they share it, for every leaf of the state.
    """
    differs = functools.partial(result_axes, axis_name=axis_name, mesh=mesh, size=workers)

    def update(state: TrainState, grads: Any) -> TrainState:
        return apply(tx, grads, state, param_specs=param_specs)[1]

    shared = jax.tree.map(lambda _: None, local.params)
    axes = TrainState(shared, differs(tx.init, (local.params,), in_axes=None))
    grads = jax.tree.map(lambda x: _stack(x, 0, workers), local.params)
    while True:
        state = map_axes(lambda axis, x: _stack(x, axis, workers), axes, local)
        found = differs(update, (state, grads), in_axes=(axes, 0))
        joined = jax.tree.map(lambda a, b: b if a is None else a, axes, found, is_leaf=_is_none)
        if jax.tree.leaves(joined) == jax.tree.leaves(axes):
            return axes
        axes = joined


def apply(
    tx: optax.GradientTransformationExtraArgs, grads: Any, state: TrainState, **extra: Any
) -> tuple[Any, TrainState]:
    """The updates that ``tx`` makes of ``grads``, and the state after them."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
    return updates, TrainState(optax.apply_updates(state.params, updates), opt_state)


def _is_none(x: Any) -> bool:
    return x is None


def _stack(x: jax.ShapeDtypeStruct, axis: int | None, workers: int) -> jax.ShapeDtypeStruct:
    return x if axis is None else jax.ShapeDtypeStruct((workers, *x.shape), x.dtype)


def _with_sharding(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
