"""From a configuration to a model, a mesh and a train step."""

import contextlib
import functools
import math
import os
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import model
from jaxopt_suite.experiments.compress import compressed
from jaxopt_suite.experiments.config import LayoutConfig, refuse
from jaxopt_suite.optimizers.diloco import mean_over_workers
from jaxopt_suite.optimizers.registry import Recipe
from jaxopt_suite.parallel.meshes import make_mesh, parse_mesh
from jaxopt_suite.parallel.train_step import TrainStep, make_train_step
from jaxopt_suite.scaling_laws import noise_scale

WORKER_AXIS = "worker"


def find_preset(name: str) -> model.ModelConfig:
    """The model sizes of that name.

    Raises:
      UserError: if there are none, with the list of those there are.
    """
    if name not in model.PRESETS:
        raise UserError(f"--preset must be one of {', '.join(model.PRESETS)}, got {name!r}")
    return model.PRESETS[name]


def model_options(config: LayoutConfig) -> dict[str, Any]:
    """How ``config`` wants the model computed: what ``model.Transformer`` takes besides sizes."""
    return {
        "dtype": config.dtype,
        "scan_layers": config.scan_layers,
        "remat": config.remat,
    }


def abstract_model(sizes: model.ModelConfig, config: LayoutConfig) -> tuple[Any, Any]:
    """The graph definition, and the shapes of the parameters, without making any."""
    options = model_options(config)
    module = nnx.eval_shape(lambda: model.Transformer(sizes, rngs=nnx.Rngs(0), **options))
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def mesh_sizes(config: LayoutConfig) -> dict[str, int] | None:
    """The mesh that ``--mesh`` and ``--diloco-workers`` ask for; None: one device.

    Raises:
      UserError: if the text is not that of a mesh, or has another number of workers.
    """
    try:
        sizes = {} if config.mesh is None else parse_mesh(config.mesh)
    except ValueError as error:
        raise UserError(f"--mesh {config.mesh}: {error}") from error
    workers = config.diloco_workers
    if workers is None:
        return sizes or None
    if sizes.get(WORKER_AXIS, workers) != workers:
        refuse("diloco_workers", workers, f"the {WORKER_AXIS}={sizes[WORKER_AXIS]} of --mesh")
    return sizes if WORKER_AXIS in sizes else {WORKER_AXIS: workers, **sizes}


def build_mesh(config: LayoutConfig) -> Mesh | None:
    """The mesh of ``--mesh`` on the devices there are; of all of them if processes share the run.

    Raises:
      UserError: if there are too few.
    """
    sizes = mesh_sizes(config)
    if sizes is None and jax.process_count() > 1:
        sizes = {"data": jax.device_count()}
    if sizes is None:
        return None
    try:
        return make_mesh(sizes)
    except ValueError as error:
        raise UserError(f"--mesh: {error}") from error


def provide_cpu_devices(config: LayoutConfig) -> None:
    """Lets this machine's CPU be as many devices as the mesh has, if JAX is to run on it.

    Does nothing for accelerators, where ``JAX_NUM_CPU_DEVICES`` or ``XLA_FLAGS`` say how many, and
    once JAX has started.
    """
    sizes = mesh_sizes(config)
    flags = os.environ.get("XLA_FLAGS", "")
    number: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    said = number >= 0 or "--xla_force_host_platform_device_count" in flags
    if sizes is None or said:
        return
    with contextlib.suppress(RuntimeError):  # JAX has started: there are the devices there are
        jax.config.update("jax_num_cpu_devices", math.prod(sizes.values()))


def of_layout(recipe: Recipe, config: LayoutConfig) -> dict[str, Any]:
    """What the layout says to ``recipe.make``, before ``--set`` is asked.

    The axis name, and the number of devices that stacks of blocks are to be spread over.

    Raises:
      UserError: as ``axis_of``.
    """
    sizes = mesh_sizes(config) or {}
    devices = math.prod(size for axis, size in sizes.items() if axis != WORKER_AXIS)
    stacks = "stack_multiple" in recipe.hyperparameters()
    return axis_of(recipe, config) | ({"stack_multiple": devices} if stacks else {})


def axis_of(recipe: Recipe, config: LayoutConfig) -> dict[str, str]:
    """The axis name that ``recipe.make`` takes if the optimizer communicates.

    Raises:
      UserError: if it does, and the mesh has no workers, or ``--compress`` would have it compress
        what is no gradient.
    """
    if not recipe.communicates:
        return {}
    if config.compress is not None and config.diloco_workers is None:
        legal = f"given without {recipe.name}, which sends what it has to in its own way"
        refuse("compress", config.compress, legal)
    if WORKER_AXIS not in (mesh_sizes(config) or {}):
        raise UserError(
            f"{recipe.name} communicates between workers: --mesh must have some, such as "
            f"{WORKER_AXIS}=4, got {config.mesh!r}"
        )
    return {"axis_name": WORKER_AXIS}


def assemble_step(
    config: LayoutConfig,
    optimizer: optax.GradientTransformation,
    *,
    sizes: model.ModelConfig,
    graphdef: Any,
    mesh: Mesh | None,
    clip: float | None,
    communicates: bool = False,
    watched: int | None = None,
) -> TrainStep:
    """The train step of a model: clipping, then the optimizer.

    Args:
      config: dtype, micro-batches, where the state is kept.
      optimizer: the state of the step's transformation is a pair, the second that of this.
      sizes: of the model.
      graphdef: of the model, from ``abstract_model``.
      mesh: where to run; None: one device.
      clip: global norm; None: not clipped.
      communicates: whether the optimizer takes the mean over workers itself. Otherwise, on a mesh
        with a worker axis, the mean of their gradients is taken before the clipping; a compressed
        one, as that of an optimizer that communicates, after each worker has clipped its own.
      watched: sequences per step, to measure the gradient noise scale; None: not measured.

    Raises:
      UserError: if the mesh does not suit the model, or the options one another.
    """
    if mesh is None:
        for name in ("shard_state_over", "offload_state"):
            if getattr(config, name):
                refuse(name, getattr(config, name), "given with --mesh")
    worker_axis = WORKER_AXIS if mesh is not None and WORKER_AXIS in mesh.axis_names else None
    workers = 1 if mesh is None else mesh.shape.get(WORKER_AXIS, 1)
    if watched is not None and (communicates or workers < 2):
        legal = f"given with --mesh {WORKER_AXIS}=4 or the like, and an optimizer that leaves the "
        refuse("noise_scale", True, legal + "mean over workers to the step")
    first = optax.identity() if clip is None else optax.clip_by_global_norm(clip)
    if config.compress is not None and config.diloco_workers is None:
        if worker_axis is None:
            refuse("compress", config.compress, f"given with --mesh {WORKER_AXIS}=4 or the like")
        # Before, not after: what is clipped after the mean is owed no more, but the memory of what
        # was left out before would still hold the gradient at its full size.
        first = optax.chain(first, compressed(config, worker_axis))
    elif worker_axis is not None and not communicates:
        mean = mean_over_workers(worker_axis)
        if watched is not None:
            mean = noise_scale(mean, axis_name=worker_axis, batch_size=watched // workers)
        first = optax.chain(mean, first)
    try:
        return make_train_step(
            functools.partial(model.loss_fn, graphdef),
            optax.chain(first, optimizer),
            mesh,
            param_specs=None if mesh is None else model.param_specs(sizes, mesh),
            worker_axis=worker_axis,
            shard_state_over=config.state_axes(),
            accumulate=config.accumulate,
            offload_state=config.offload_state,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
