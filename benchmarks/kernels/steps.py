"""Whole train steps with and without kernels: what a kernel saves where it is used."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxopt_suite import parallel
from jaxopt_suite.optimizers import adamw_8bit
from jaxopt_suite.optimizers.compression import compressed_mean, compressors
from jaxopt_suite.optimizers.demo import demo
from jaxopt_suite.parallel import topologies

NAME, AXIS = "train_step", "worker"
SHAPE, BATCH = (1024, 4096), 64
POD, MATRIX = "v5e:4x4", (8192, 32768)


def programs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What each step is in words, its topology, and its programs by implementation."""
    for exchange in ("gather", "two_phase"):
        make = functools.partial(_sgd, compressors.int8, exchange)
        yield _compared(f"int8 with EF, {exchange}", make, "v5e:2x4", 8)
    make = functools.partial(_sgd, functools.partial(compressors.sign, block=256), "gather")
    yield _compared("signs in blocks with EF, gather", make, "v5e:4x4", 16)
    yield _compared(
        "DeMo; of the loop over messages one round counted",
        lambda impl: demo(0.1, axis_name=AXIS, impl=impl),
        "v5e:4x4",
        16,
    )
    matrix = f"two of {MATRIX[0]} by {MATRIX[1]} on 4 by 4"
    plain = _sharded(optax.adamw(0.1))
    by_xla, by_kernel = (_sharded(adamw_8bit(0.1, impl=impl)) for impl in ("xla", "pallas"))
    yield f"{matrix}, adamw_8bit", POD, {"xla": by_xla, "pallas": by_kernel}
    yield f"{matrix}, adamw in float32 → adamw_8bit", POD, {"xla": plain, "pallas": by_kernel}


def _sgd(codec: Callable[..., Any], exchange: Any, impl: Any) -> Any:
    mean = compressed_mean(codec(impl=impl), axis_name=AXIS, exchange=exchange)
    return optax.chain(mean, optax.sgd(0.1))


def _compared(
    what: str, make: Callable[[Any], Any], topology: str, workers: int
) -> tuple[str, str, dict[str, Any]]:
    what = f"{workers} workers, {SHAPE[0]} by {SHAPE[1]}, {what}"
    return what, topology, {x: _program(make(x), topology, workers) for x in ("xla", "pallas")}


def _program(tx: Any, topology: str, workers: int) -> Any:
    mesh = parallel.make_mesh({AXIS: workers}, devices=topologies.describe(topology).devices)
    step = parallel.make_train_step(
        lambda params, batch: jnp.mean(jnp.square(batch @ params["w"])),
        tx,
        mesh,
        worker_axis=AXIS,
    )
    params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
    return step.lower(params, jax.ShapeDtypeStruct((BATCH, SHAPE[0]), jnp.float32)).compile()


def _sharded(tx: optax.GradientTransformation) -> Any:
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
