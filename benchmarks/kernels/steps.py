"""Whole train steps with and without kernels: what a kernel saves where it is used."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxopt_suite import parallel
from jaxopt_suite.optimizers import adamw_8bit
from jaxopt_suite.optimizers.compression import compressed_mean, compressors
from jaxopt_suite.parallel import topologies

NAME = "train_step"
WORKERS_ON, WORKERS, SHAPE, BATCH = "v5e:2x4", 8, (1024, 4096), 64
POD, MATRIX = "v5e:4x4", (8192, 32768)


def programs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What each step is in words, its topology, and its programs by implementation."""
    for exchange in ("gather", "two_phase"):
        what = f"{WORKERS} workers, {SHAPE[0]} by {SHAPE[1]}, int8 with EF, {exchange}"
        yield what, WORKERS_ON, {impl: _int8_step(exchange, impl) for impl in ("xla", "pallas")}
    matrix = f"two of {MATRIX[0]} by {MATRIX[1]} on 4 by 4"
    plain, by_kernel = _sharded_step(optax.adamw(0.1)), _sharded_step(_adamw_8bit("pallas"))
    yield (
        f"{matrix}, adamw_8bit",
        POD,
        {"xla": _sharded_step(_adamw_8bit("xla")), "pallas": by_kernel},
    )
    yield f"{matrix}, adamw in float32 → adamw_8bit", POD, {"xla": plain, "pallas": by_kernel}


def _adamw_8bit(impl: Any) -> optax.GradientTransformation:
    return adamw_8bit(0.1, impl=impl)


def _sharded_step(tx: optax.GradientTransformation) -> Any:
    """A step of two matrices, one after the other, each split along both of its dimensions."""
    devices = topologies.describe(POD).devices
    mesh = parallel.make_mesh({"data": 4, "model": 4}, devices=devices)
    specs = {"up": PartitionSpec("data", "model"), "down": PartitionSpec("model", "data")}
    step = parallel.make_train_step(
        lambda params, batch: jnp.mean(jnp.square(batch @ params["up"] @ params["down"])),
        tx,
        mesh,
        param_specs=specs,
    )
    params = {
        "up": jax.ShapeDtypeStruct(MATRIX, jnp.float32),
        "down": jax.ShapeDtypeStruct(MATRIX[::-1], jnp.float32),
    }
    return step.lower(params, jax.ShapeDtypeStruct((BATCH, MATRIX[0]), jnp.float32)).compile()


def _int8_step(exchange: str, impl: Any) -> Any:
    devices = topologies.describe(WORKERS_ON).devices
    mesh = parallel.make_mesh({"worker": WORKERS}, devices=devices)
    mean = compressed_mean(compressors.int8(impl=impl), axis_name="worker", exchange=exchange)
    step = parallel.make_train_step(
        lambda params, batch: jnp.mean(jnp.square(batch @ params["w"])),
        optax.chain(mean, optax.sgd(0.1)),
        mesh,
        worker_axis="worker",
    )
    params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
    return step.lower(params, jax.ShapeDtypeStruct((BATCH, SHAPE[0]), jnp.float32)).compile()
