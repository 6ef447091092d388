"""Whole train steps with and without kernels: what a kernel saves where it is used."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxopt_suite import parallel
from jaxopt_suite.optimizers import adamw_8bit, roots
from jaxopt_suite.optimizers.compression import compressed_mean, compressors
from jaxopt_suite.optimizers.demo import demo
from jaxopt_suite.optimizers.shampoo import shampoo
from jaxopt_suite.parallel import topologies

NAME, AXIS = "train_step", "worker"
SHAPE, BATCH = (1024, 4096), 64
POD, WORKERS, MATRIX = "v5e:4x4", 16, (8192, 32768)


def programs() -> Iterator[tuple[str, dict[str, Any]]]:
    """What each step is in words, and its programs by implementation."""
    for exchange in ("gather", "two_phase"):
        make = functools.partial(_sgd, compressors.int8, exchange)
        yield _compared(f"int8 with EF, {exchange}", make)
    make = functools.partial(_sgd, functools.partial(compressors.sign, block=256), "gather")
    yield _compared("signs in blocks with EF, gather", make)
    yield _compared(
        "DeMo; of the loop over messages one round counted",
        lambda impl: demo(0.1, axis_name=AXIS, impl=impl),
    )
    matrix = f"two of {MATRIX[0]} by {MATRIX[1]} on 4 by 4"
    plain = _sharded(optax.adamw(0.1))
    by_xla, by_kernel = (_sharded(adamw_8bit(0.1, impl=impl)) for impl in ("xla", "pallas"))
    yield f"{matrix}, adamw_8bit", {"xla": by_xla, "pallas": by_kernel}
    yield f"{matrix}, adamw in float32 → adamw_8bit", {"xla": plain, "pallas": by_kernel}
    what = f"{matrix}, Shampoo, coupled Newton of a fixed length, one turn counted"
    yield what, {impl: _sharded(_shampoo(impl)) for impl in ("xla", "pallas")}


def _sgd(codec: Callable[..., Any], exchange: Any, impl: Any) -> Any:
    mean = compressed_mean(codec(impl=impl), axis_name=AXIS, exchange=exchange)
    return optax.chain(mean, optax.sgd(0.1))


def _shampoo(impl: Any) -> optax.GradientTransformation:
    solver = roots.CoupledNewton(max_iterations=20, tolerance=None, product_impl=impl)
    return shampoo(0.1, solver=solver, gram_impl=impl, stack_multiple=WORKERS)


def _compared(what: str, make: Callable[[Any], Any]) -> tuple[str, dict[str, Any]]:
    what = f"{WORKERS} workers, {SHAPE[0]} by {SHAPE[1]}, {what}"
    return what, {impl: _program(make(impl)) for impl in ("xla", "pallas")}


def _program(tx: Any) -> Any:
    mesh = parallel.make_mesh({AXIS: WORKERS}, devices=topologies.describe(POD).devices)
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
