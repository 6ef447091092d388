"""One train step for any loss, any optax transformation and any mesh."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_suite.core.checks import check_int
from jaxopt_suite.parallel.arguments import (
    batch_shards,
    check_axes,
    check_meshless,
    full_batch_spec,
)
from jaxopt_suite.parallel.layout import Layout, Placement, TrainState
from jaxopt_suite.parallel.metrics import Metrics
from jaxopt_suite.parallel.placing import place
from jaxopt_suite.parallel.step_functions import StepFunctions


class _Steps(NamedTuple):
    """The compiled functions of one layout."""

    plain: Any  # (state, batch)
    weighted: Any  # (state, batch, active)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """A train step that compiles at its first call; :func:`make_train_step` makes it.

    Attributes:
      loss_fn: ``(params, batch) -> loss``, the mean over the batch.
      tx: the transformation.
      placement: mesh, workers and shardings.
      batch_spec: how a batch is split over the mesh.
      accumulate: micro-batches per step.
    """

    loss_fn: Callable[[Any, Any], jax.Array]
    tx: optax.GradientTransformationExtraArgs
    placement: Placement
    batch_spec: PartitionSpec
    accumulate: int
    _compiled: dict[Any, tuple[Layout, _Steps]] = dataclasses.field(
        default_factory=dict, repr=False
    )

    def init(self, params: Any) -> TrainState:
        """The state before the first step, each part made where it will live.

        Args:
          params: the parameters, a pytree of arrays, the same on every process; they are copied. Or
            a function without arguments that makes them: it is compiled with sharded results, so
            the whole model is on no device at any time.

        Returns:
          The state. With a worker axis, what may differ between workers has a leading axis of size
          workers.
        """
        make = params if callable(params) else None
        layout = self.layout(params if make is None else jax.eval_shape(make))

        def initial(*given: Any) -> TrainState:
            # An array that was merely passed through would be the caller's own, and the first step
            # would donate it.
            own = jax.tree.map(jnp.copy, given[0]) if make is None else make()
            return self._functions.initial(layout, own)

        if make is None and self.mesh is not None:
            params = place(params, _shardings(self.mesh, layout.param_specs))
        given = (params,) if make is None else ()
        return jax.jit(initial, out_shardings=layout.state_shardings)(*given)

    def __call__(
        self, state: TrainState, batch: Any, *, active: Any = None
    ) -> tuple[TrainState, Metrics]:
        """Takes one step. ``state`` is donated: its arrays are gone afterwards.

        Args:
          state: from ``init`` or a step of this object, or restored onto its ``abstract_state``.
          batch: the batch of all workers together, a pytree of arrays with the batch as their first
            axis: NumPy arrays (the same on every process) or what ``shard_batch`` gave.
          active: ``[workers]``, handed to ``tx.update`` as ``active=``, each worker its own: the
            weights of an outer loop, 0 for one that is absent. Workers of weight 0 are in no
            metric. None: the transformation is not given any, and the step is another program.

        Returns:
          The new state and the metrics.

        Raises:
          ValueError: if the state has another structure than ``init`` gave, the batch does not
            divide among devices and micro-batches, or ``active`` is not one number a worker.
        """
        steps, batch = self._of_state(state), self.shard_batch(batch)
        if active is None:
            return steps.plain(state, batch)
        if not isinstance(active, jax.Array):
            active = np.asarray(active, np.float32)
        self._check_active(active.shape)
        own = self.placement.one_per_worker
        return steps.weighted(state, batch, active if own is None else place(active, own))

    def lower(
        self, params_like: Any, batch_like: Any, *, active: bool = False
    ) -> jax.stages.Lowered:
        """The step lowered for these shapes. Allocates nothing; the devices need not exist.

        Args:
          params_like: one worker's parameters, or their shapes and dtypes.
          batch_like: a batch, or its shapes and dtypes.
          active: whether it is the step that is given ``active``.
        """
        self.check_batch(batch_like)
        layout, steps = self._prepare(params_like)
        sharding = self.batch_sharding
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch_like
        )
        if not active:
            return steps.plain.lower(layout.abstract_state, batch)
        self._check_active((self.placement.workers,))
        weights = jax.ShapeDtypeStruct(
            (self.placement.workers,), jnp.float32, sharding=self.placement.one_per_worker
        )
        return steps.weighted.lower(layout.abstract_state, batch, weights)

    def abstract_state(self, params_like: Any) -> TrainState:
        """Shapes, dtypes and shardings of the state: what a checkpoint is restored onto."""
        return self._prepare(params_like)[0].abstract_state

    def layout(self, params_like: Any) -> Layout:
        """Where everything lies, for one worker's parameters of these shapes and dtypes."""
        return self._prepare(params_like)[0]

    def shard_batch(self, batch: Any) -> Any:
        """Puts each device's part of a batch on it.

        Args:
          batch: the whole batch, the same on every process: each copies what its devices need.
            Arrays that lie so already are passed through.

        Raises:
          ValueError: if the first axis does not divide among devices and micro-batches.
        """
        self.check_batch(batch)
        return batch if self.mesh is None else place(batch, self.batch_sharding)

    def check_batch(self, batch: Any) -> None:
        """Raises ``ValueError`` unless devices and micro-batches divide the batch among them.

        Args:
          batch: a batch, or its shapes and dtypes.
        """
        parts = self.placement.workers * self.accumulate
        if self.mesh is not None:
            parts = self.accumulate * batch_shards(self.mesh, self.batch_spec)
        for path, x in jax.tree_util.tree_leaves_with_path(batch):
            if not x.shape or x.shape[0] % parts:
                where = jax.tree_util.keystr(path) or "the batch"
                raise ValueError(
                    f"the first axis of {where} must be a multiple of {parts} (devices that split "
                    f"the batch times {self.accumulate} micro-batches), got shape {x.shape}"
                )

    @property
    def mesh(self) -> Mesh | None:
        """The mesh it runs on; None: one device."""
        return self.placement.mesh

    @property
    def batch_sharding(self) -> NamedSharding | None:
        """How every leaf of a batch is laid out; None without a mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, self.batch_spec)

    @property
    def _functions(self) -> StepFunctions:
        return StepFunctions(self.loss_fn, self.tx, self.placement, self.accumulate)

    def _check_active(self, shape: tuple[int, ...]) -> None:
        if self.placement.worker_axis is None or shape != (self.placement.workers,):
            axis, workers = self.placement.worker_axis, self.placement.workers
            raise ValueError(
                f"active must be one number for each of {workers} workers of worker_axis={axis!r}, "
                f"got shape {shape}"
            )

    def _prepare(self, params_like: Any) -> tuple[Layout, _Steps]:
        """The layout and the compiled steps for parameters of these shapes and dtypes."""
        key = _signature(params_like)
        if key not in self._compiled:
            layout = self.placement.layout(self.tx, params_like)
            inputs = layout.state_shardings, self.batch_sharding
            weighted = (*inputs, self.placement.one_per_worker)
            steps = _Steps(self._jitted(layout, inputs), self._jitted(layout, weighted))
            structure = jax.tree.structure(layout.abstract_state)
            self._compiled[key] = self._compiled[structure] = layout, steps
        return self._compiled[key]

    def _jitted(self, layout: Layout, in_shardings: tuple[Any, ...]) -> Any:
        return jax.jit(
            functools.partial(self._functions.step, layout),
            in_shardings=in_shardings,
            out_shardings=(layout.state_shardings, self.placement.metrics),
            donate_argnums=0,
            compiler_options=self._compiler_options(),
        )

    def _compiler_options(self) -> dict[str, str] | None:
        """Keeps XLA for TPUs from making all-reduces, which send twice as much, of small gathers.

        It does so along axes that fill a two-dimensional torus, such as 64 workers on 8x8 chips.
        """
        on_tpu = self.mesh is not None and self.mesh.devices.flat[0].platform == "tpu"
        if not on_tpu or self.placement.worker_axis is None:
            return None
        return {"xla_tpu_prefer_async_allgather_to_allreduce": "true"}

    def _of_state(self, state: TrainState) -> _Steps:
        found = self._compiled.get(jax.tree.structure(state))
        if found is None:
            raise ValueError(
                "a state comes from init, from a step, or from a checkpoint restored onto "
                f"abstract_state of the same TrainStep; got {jax.tree.structure(state)}"
            )
        return found[1]


def make_train_step(
    loss_fn: Callable[[Any, Any], jax.Array],
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    param_specs: Any = None,
    batch_spec: PartitionSpec | None = None,
    worker_axis: str | None = None,
    workers: int | None = None,
    shard_state_over: Sequence[str] = (),
    accumulate: int = 1,
    remat: bool | Callable[..., Any] = False,
    offload_state: bool = False,
) -> TrainStep:
    """A train step: gradient, transformation, new parameters.

    Without ``worker_axis`` the batch is split over the mesh and everything else is as on one
    device: XLA's partitioner puts in the communication, and ``tx`` sees the mean gradient. With
    it, each worker takes the gradient of its own part of the batch and ``tx`` is what communicates
    (``jax.lax`` collectives over ``worker_axis``); the other axes stay automatic, so ``tx`` sees
    whole tensors. With a mesh, or workers, ``tx`` is given ``param_specs=``, the PartitionSpec of
    every update over the axes that are automatic (None without a mesh), for links that want to work
    on what a device really holds. ``tx.init`` runs outside of the workers' axis: what differs
    between workers is made by updates.

    Args:
      loss_fn: ``(params, batch) -> loss``, a scalar: the mean over the batch.
      tx: any optax transformation.
      mesh: where to run. Axes may be automatic or explicit; the loss is traced with automatic ones
        (``jax.sharding.explicit_axes`` enters the other world from inside). None: one device.
      param_specs: PartitionSpec of every parameter; one spec or None for a whole subtree will do.
        None: parameters are whole on every device.
      batch_spec: PartitionSpec of every leaf of the batch. None: the first axis is split over those
        of the mesh's axes that are called worker, data or fsdp.
      worker_axis: the axis over which ``tx`` communicates.
      workers: how many; needed without a mesh, where one device simulates them all.
      shard_state_over: axes to spread the optimizer state over besides (ZeRO stage 1): each device
        updates its part of the parameters, and all get the result.
      accumulate: micro-batches that a step's batch is cut into, one after the other.
      remat: recompute in the backward pass: True keeps nothing of the loss, a policy of
        ``jax.checkpoint_policies`` what it names.
      offload_state: keep the optimizer state in the host's memory between steps.

    Returns:
      The step.

    Raises:
      ValueError: if an axis is not one of the mesh, does not divide what it is to split, or is
        used for two purposes; or if the backend has no host memory to offload to.
    """
    check_int("accumulate", accumulate)
    over = tuple(shard_state_over)
    if mesh is None:
        check_meshless(
            worker_axis,
            workers,
            param_specs=param_specs,
            batch_spec=batch_spec,
            shard_state_over=over,
            offload_state=offload_state,
        )
        batch_spec = PartitionSpec()
    else:
        check_axes(mesh, worker_axis, workers, over)
        workers = mesh.shape[worker_axis] if worker_axis else 1
        batch_spec = full_batch_spec(mesh, batch_spec, worker_axis)
    if remat:
        policy = remat if callable(remat) else None
        loss_fn = jax.checkpoint(loss_fn, policy=policy)
    return TrainStep(
        loss_fn=loss_fn,
        tx=optax.with_extra_args_support(tx),
        placement=Placement(mesh, param_specs, worker_axis, workers or 1, over, offload_state),
        batch_spec=batch_spec,
        accumulate=accumulate,
    )


def _shardings(mesh: Mesh, specs: Any) -> Any:
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def _signature(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, jnp.dtype(x.dtype)) for x in leaves)
