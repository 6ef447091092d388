"""Whole train steps with and without kernels: what a kernel saves where it is used."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import parallel
from jaxopt_suite.optimizers.compression import compressed_mean, compressors
from jaxopt_suite.parallel import topologies

NAME = "train_step"
TOPOLOGY, WORKERS, SHAPE, BATCH = "v5e:2x4", 8, (1024, 4096), 64


def programs() -> Iterator[tuple[str, dict[str, Any]]]:
    """What each step is in words, and its programs by implementation."""
    for exchange in ("gather", "two_phase"):
        what = f"{WORKERS} workers, {SHAPE[0]} by {SHAPE[1]}, int8 with EF, {exchange}"
        yield what, {impl: _int8_step(exchange, impl) for impl in ("xla", "pallas")}


def _int8_step(exchange: str, impl: Any) -> Any:
    devices = topologies.describe(TOPOLOGY).devices
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
