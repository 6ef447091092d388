"""Whole train steps with and without kernels: what a kernel saves where it is used."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import parallel
from jaxopt_suite.optimizers.compression import compressed_mean, compressors
from jaxopt_suite.optimizers.demo import demo
from jaxopt_suite.parallel import topologies

NAME, AXIS = "train_step", "worker"
SHAPE, BATCH = (1024, 4096), 64


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
