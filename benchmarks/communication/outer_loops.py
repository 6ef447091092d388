"""What outer loops send between workers, and keep, in train steps compiled for a TPU pod."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxopt_suite import parallel
from jaxopt_suite.experiments import assembly, model
from jaxopt_suite.experiments.config import LayoutConfig
from jaxopt_suite.optimizers import registry
from jaxopt_suite.parallel import memory, topologies, wire
from jaxopt_suite.parallel.train_step import TrainStep

TOPOLOGY, MESH = "v5e:8x8", "worker=16,model=4"
SYNC_EVERY = 100
SIZES = model.sized(1024, 4, 64)  # 16 heads, so that the model axis has something to split
SEQ_LEN = 256


class Method(NamedTuple):
    """A recipe with settings, and how many times fewer bytes than the first it is to send."""

    name: str
    recipe: str
    settings: Mapping[str, Any]
    target: float


METHODS = (
    Method("AdamW, data parallel", "adamw", {}, 1),
    Method("DiLoCo", "diloco", {"sync_every": SYNC_EVERY}, 100),
    Method("DiLoCo, int8", "diloco", {"sync_every": SYNC_EVERY, "mean": "int8"}, 390),
    Method("streaming, int4", "streaming_diloco", {"sync_every": SYNC_EVERY, "mean": "int4"}, 750),
)


def measure() -> Iterator[dict[str, Any]]:
    """One row, with an entry for each method.

    Raises:
      ModuleNotFoundError: if the TPU compiler is not installed; the message says how to get it.
    """
    devices = topologies.describe(TOPOLOGY).devices
    mesh = parallel.make_mesh(parallel.parse_mesh(MESH), devices=devices)
    entries: list[dict[str, Any]] = []
    for method in METHODS:
        found = entry(method, SIZES, mesh)
        found["times_fewer"] = (entries or [found])[0]["per_step"] / found["per_step"]
        entries.append(found)
        print(found, flush=True)
    yield {
        "topology": TOPOLOGY,
        "mesh": MESH,
        "parameters": model.n_params(SIZES),
        "sync_every": SYNC_EVERY,
        "entries": entries,
    }


def entry(method: Method, sizes: model.ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Bytes that one device sends along the workers' axis, and that it holds.

    Returns:
      per_step: sent, averaged over a round; largest_step: sent in the step that sends the most.
      always: collectives of every step: kind and dtype, payload, how often.
      parameter_bytes: on one device; arguments: all that the step is given, the batch included;
      peak: that is held at any moment, where the compiler says it.
    """
    recipe = registry()[method.recipe]
    step, params = _step(method, sizes, mesh)
    batch = jax.ShapeDtypeStruct((mesh.shape["worker"], SEQ_LEN + 1), jnp.int32)
    compiled = step.lower(params, batch).compile()
    found = [c for c in wire.collectives(compiled, mesh) if "worker" in (c.axes or ())]
    inexact = [c for c in found if not c.exact]
    if inexact:
        raise RuntimeError(f"collectives that run an unknown number of times: {inexact}")
    steps = recipe.steps_per_round(**recipe.hyperparameters() | method.settings)
    sent = wire.traffic(found, steps=steps)
    always = [[f"{c.kind} {c.dtype}", c.payload, c.times] for c in found if not c.conditional]
    figures = memory.compiler_figures(compiled, mesh.devices.flat[0].platform)
    return {
        "method": method.name,
        "recipe": method.recipe,
        "settings": dict(method.settings),
        "target": method.target,
        "per_step": sent.mean,
        "largest_step": sent.largest,
        "always": always,
        "parameter_bytes": sum(
            x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
            for x in jax.tree.leaves(step.abstract_state(params).params)
        ),
        "arguments": compiled.memory_analysis().argument_size_in_bytes,
        "peak": figures.get("peak"),
    }


def _step(method: Method, sizes: model.ModelConfig, mesh: Mesh) -> tuple[TrainStep, Any]:
    """The train step, and the shapes of the parameters."""
    recipe = registry()[method.recipe]
    axis = {"axis_name": assembly.WORKER_AXIS} if recipe.communicates else {}
    config = LayoutConfig(remat=True)  # float32: else XLA sends part of the gradients in bfloat16
    graphdef, params = assembly.abstract_model(sizes, config)
    step = assembly.assemble_step(
        config,
        recipe.make(1e-3, **axis, **method.settings),
        sizes=sizes,
        graphdef=graphdef,
        mesh=mesh,
        clip=1.0,
        communicates=recipe.communicates,
    )
    return step, params


def kept(rows: list[dict[str, Any]]) -> bool:
    """Whether bytes are as few as promised, and nothing crosses in an inner step.

    And whether a device is given no more than parameters, the inner state of two moments, one outer
    copy and one momentum, within 5 % for what is small.
    """
    return all(
        e["times_fewer"] >= 0.99 * e["target"]  # "about"
        and (
            e["target"] == 1
            or (not e["always"] and e["arguments"] <= 1.05 * 5 * e["parameter_bytes"])
        )
        for row in rows
        for e in row["entries"]
    )
