"""Eager updates, CO2 and SAVIC: the same on every substrate, and what their programs send."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fleets import relative_difference, train_fleet

from jaxopt_suite import parallel
from jaxopt_suite.optimizers import co2, eager_diloco, savic
from jaxopt_suite.parallel import wire

AXIS, WORKERS, EVERY = "worker", 8, 3
VARIANTS = {
    "eager": lambda: eager_diloco(optax.adam(0.1), sync_every=EVERY, axis_name=AXIS),
    "co2": lambda: co2(optax.adam(0.1), sync_every=EVERY, axis_name=AXIS, clip=0.3),
    "savic, global": lambda: savic(0.1, sync_every=EVERY, axis_name=AXIS),
    "savic, local": lambda: savic(0.1, sync_every=EVERY, axis_name=AXIS, scaling="local"),
}
SHAPES = {"matrix": (6, 5), "vector": (7,)}
ENTRIES = 37


def quadratic(params, noise):
    return jax.tree.map(lambda p, n: 0.5 * p + n, params, noise)


@pytest.mark.parametrize("name", ["eager", "co2", "savic, global"])
def test_a_simulated_fleet_with_absent_workers_does_what_a_mesh_does(name):
    rng = np.random.default_rng(0)
    noise = {k: rng.normal(size=(WORKERS, 8, *s)).astype(np.float32) for k, s in SHAPES.items()}
    start = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
    active = np.ones((WORKERS, 8))
    active[0, 2:7], active[5, 5] = 0, 0.5
    simulated, real = (
        train_fleet(VARIANTS[name](), quadratic, noise, start, mesh=mesh, active=active)
        for mesh in (None, parallel.make_mesh({AXIS: WORKERS}))
    )
    # Sums over workers in another order, and eight steps of Adam on what comes of them.
    assert relative_difference(real, simulated) < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_between_synchronisations_nothing_is_sent(name):
    mesh = parallel.make_mesh({AXIS: WORKERS})
    loss = lambda params, x: sum(jnp.sum(p * jnp.mean(x)) for p in params.values())
    step = parallel.make_train_step(loss, VARIANTS[name](), mesh, worker_axis=AXIS)
    like = {k: jax.ShapeDtypeStruct(s, np.float32) for k, s in SHAPES.items()}
    compiled = step.lower(like, jax.ShapeDtypeStruct((WORKERS,), np.float32)).compile()
    crossing = wire.collectives(compiled, mesh)
    per_entry = 8 * (WORKERS - 1) / WORKERS
    assert all(c.conditional for c in crossing)
    means = 2 if name == "savic, global" else 1
    # The mean, or two, and beside each the weight and the number of those left out.
    sent = sum(c.total for c in crossing)
    assert sent == means * (ENTRIES + 2) * per_entry
