"""Optimizer state in host memory: where it rests, what a step does with it, where it is refused."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_suite.parallel.meshes import make_mesh
from jaxopt_suite.parallel.offload import host_sharding, host_shardings, to_device, to_host
from jaxopt_suite.parallel.state_specs import state_specs

PARAMS = {
    "w": jax.ShapeDtypeStruct((8, 12), jnp.float32),
    "b": jax.ShapeDtypeStruct((), jnp.float32),
}
SPECS = {"w": P(None, "model"), "b": P()}


def test_a_host_sharding_is_the_same_layout_in_other_memory():
    sharding = NamedSharding(make_mesh({"data": 4, "model": 2}), P("data"))
    host = host_sharding(sharding)
    assert (sharding.memory_kind, host.memory_kind) == ("device", "pinned_host")
    assert (host.spec, host.mesh) == (sharding.spec, sharding.mesh)


@pytest.mark.parametrize(
    ("kinds", "offered"), [([], "no memory kinds at all"), (["device"], "only 'device'")]
)
def test_devices_without_pinned_host_memory_are_refused_with_what_they_have(kinds, offered):
    memories = [types.SimpleNamespace(kind=kind) for kind in kinds]
    device = types.SimpleNamespace(
        id=0, platform="gpu", device_kind="H200", addressable_memories=lambda: memories
    )
    sharding = types.SimpleNamespace(addressable_devices=set(), device_set=[device])
    with pytest.raises(ValueError, match=rf"'pinned_host', and 'H200' \(gpu\) has {offered}"):
        host_sharding(sharding)


def test_scalars_and_random_keys_stay_on_the_devices():
    mesh = make_mesh({"data": 8})
    tree = {"m": jnp.zeros((8, 2)), "t": jnp.int32(0), "k": jax.random.split(jax.random.key(0), 8)}
    on_device = jax.tree.map(lambda _: NamedSharding(mesh, P()), tree)
    kinds = jax.tree.map(lambda s: s.memory_kind, host_shardings(tree, on_device))
    assert kinds == {"m": "pinned_host", "t": "device", "k": "device"}


@pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit])
def test_steps_with_donated_host_state_are_those_with_device_state(axis_types):
    mesh, tx = make_mesh({"data": 4, "model": 2}, axis_types=axis_types), optax.adamw(1e-2)
    specs = state_specs(tx, PARAMS, SPECS, mesh, shard_state_over=("data",))
    sharding = lambda tree: jax.tree.map(lambda spec: NamedSharding(mesh, spec), tree)
    of_params, on_device = sharding(SPECS), sharding(specs)
    rest = host_shardings(jax.eval_shape(tx.init, PARAMS), on_device)

    def step(params, state):
        grads = jax.tree.map(jnp.cos, params)
        updates, state = tx.update(grads, to_device(state, on_device), params)
        return optax.apply_updates(params, updates), to_host(state, rest)

    def plain(params, state):
        updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    values = jax.tree.map(lambda p: jnp.linspace(-1, 1, max(p.size, 1)).reshape(p.shape), PARAMS)
    params = jax.device_put(values, of_params)
    state = jax.jit(tx.init, out_shardings=rest)(params)
    expected, expected_state = values, tx.init(values)
    offloaded = jax.jit(step, out_shardings=(of_params, rest), donate_argnums=1)
    for _ in range(3):
        old = state
        params, state = offloaded(params, state)
        expected, expected_state = plain(expected, expected_state)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
    assert jax.tree.map(lambda x: x.sharding.memory_kind, state) == jax.tree.map(
        lambda s: s.memory_kind, rest
    )
    for a, b in zip(
        jax.tree.leaves((params, state)), jax.tree.leaves((expected, expected_state)), strict=True
    ):
        # The same elementwise operations, fused differently: a few roundings of float32.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
