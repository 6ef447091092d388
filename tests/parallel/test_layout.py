"""What of the state differs between workers, and where the state lies."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_suite.core.varying import vary
from jaxopt_suite.parallel.layout import Placement, TrainState
from jaxopt_suite.parallel.meshes import make_mesh
from jaxopt_suite.parallel.train_step import make_train_step

WORKERS = 4
PARAMS = {
    "w": jax.ShapeDtypeStruct((8, 6), jnp.float32),
    "b": jax.ShapeDtypeStruct((6,), jnp.float32),
}
SPECS = {"w": P(None, "model"), "b": P("model")}
MESHES = {
    "fleet": None,
    "worker=4": {"worker": WORKERS},
    "worker=4,model=2": {"worker": WORKERS, "model": 2},
}


class Residual(NamedTuple):
    residual: Any  # f32, shapes of params
    count: jax.Array  # i32 ()


def error_feedback(axis_name="worker"):
    """Sends signs, and keeps what they left out: equal at first, each worker's own afterwards."""

    def init(params):
        return Residual(jax.tree.map(jnp.zeros_like, params), jnp.int32(0))

    def update(updates, state, params=None):
        wanted = jax.tree.map(jnp.add, updates, state.residual)
        sent = jax.tree.map(lambda x: jnp.sign(x) * jnp.mean(jnp.abs(x)), wanted)
        residual = jax.tree.map(jnp.subtract, wanted, sent)
        return jax.lax.pmean(sent, axis_name), Residual(residual, state.count + 1)

    return optax.GradientTransformation(init, update)


class Delayed(NamedTuple):
    first: Any  # f32, shapes of params
    second: Any  # f32, shapes of params


def delay():
    """Hands on the update of two steps ago: what is local reaches `second` in the second update."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Delayed(zeros, zeros)

    def update(updates, state, params=None):
        return state.second, Delayed(updates, state.first)

    return optax.GradientTransformation(init, update)


def local_sgd(every=3):
    """Each worker steps by itself; now and then all go to the mean of their parameters."""

    def init(params):
        return Residual(optax.tree.zeros_like(params), jnp.int32(0))

    def update(updates, state, params):
        momentum = jax.tree.map(lambda m, g: 0.5 * m + g, state.residual, updates)
        own = jax.tree.map(lambda m: -0.1 * m, momentum)

        def meet(own):
            there = jax.lax.pmean(optax.apply_updates(params, own), "worker")
            # At first the parameters are equal: branches must agree in their types.
            return vary(jax.tree.map(lambda t, p: t - p, there, params), "worker")

        step = jax.lax.cond(state.count % every == every - 1, meet, lambda own: own, own)
        return step, Residual(momentum, state.count + 1)

    return optax.GradientTransformation(init, update)


def mean():
    return optax.stateless(lambda updates, params: jax.lax.pmean(updates, "worker"))


def layout(tx, sizes, *, over=(), offload=False, axis_types=AxisType.Auto):
    mesh = None if sizes is None else make_mesh(sizes, axis_types=axis_types)
    specs = SPECS if sizes and "model" in sizes else None
    placement = Placement(mesh, specs, "worker", WORKERS, over, offload)
    return placement.layout(optax.with_extra_args_support(tx), PARAMS)


def of_params(axis):
    return {"w": axis, "b": axis}


@pytest.mark.parametrize("name", list(MESHES))
def test_after_a_mean_everything_is_shared(name):
    axes = layout(optax.chain(mean(), optax.adam(0.1)), MESHES[name]).axes
    assert jax.tree.leaves(axes) == []
    assert axes.params == of_params(None)


@pytest.mark.parametrize("name", list(MESHES))
def test_a_residual_is_each_workers_own_and_what_follows_the_mean_is_shared(name):
    found = layout(optax.chain(error_feedback(), optax.sgd(0.1, momentum=0.9)), MESHES[name])
    feedback, (momentum, *_) = found.axes.opt_state
    assert feedback == Residual(of_params(0), None)
    assert (found.axes.params, momentum.trace) == (of_params(None), of_params(None))
    state = found.abstract_state.opt_state[0]
    assert state.residual["w"].shape == (WORKERS, 8, 6)
    assert state.count.shape == ()


@pytest.mark.parametrize("name", list(MESHES))
def test_what_becomes_local_in_later_updates_is_found_too(name):
    """A delay of two before the mean, one of two after it: the question must be put three times."""
    tx = optax.chain(delay(), delay(), mean(), delay(), optax.scale(-0.1))
    before, also_before, _, after, _ = layout(tx, MESHES[name]).axes.opt_state
    own, shared = of_params(0), of_params(None)
    assert (before, also_before, after) == (
        Delayed(own, own),
        Delayed(own, own),
        Delayed(shared, shared),
    )


@pytest.mark.parametrize("name", list(MESHES))
def test_parameters_that_diverge_have_the_worker_axis_and_counts_do_not(name):
    found = layout(local_sgd(), MESHES[name])
    assert found.axes == TrainState(of_params(0), Residual(of_params(0), None))
    assert found.abstract_state.params["w"].shape == (WORKERS, 8, 6)
    if MESHES[name]:
        spec = found.abstract_state.params["w"].sharding.spec
        assert spec == (P("worker", None, "model") if "model" in MESHES[name] else P("worker"))


def test_without_workers_nothing_has_an_axis():
    tx = optax.with_extra_args_support(optax.adam(0.1))
    found = Placement(None, None, None, 1, (), False).layout(tx, PARAMS)
    assert jax.tree.leaves(found.axes) == []
    assert found.state_shardings is None
    assert jax.tree.map(jnp.shape, found.abstract_state.params) == {"w": (8, 6), "b": (6,)}


def test_random_keys_of_each_worker_are_kept_apart():
    def init(params):
        return {"own": jax.random.key(0), "common": jax.random.key(1)}

    def update(updates, state, params=None):
        own = jax.random.fold_in(state["own"], jax.lax.axis_index("worker"))
        common, draw = jax.random.split(state["common"])
        noise = jax.random.normal(draw)
        return jax.tree.map(lambda g: jax.lax.pmean(g, "worker") + noise, updates), {
            "own": own,
            "common": common,
        }

    for sizes in MESHES.values():
        found = layout(optax.GradientTransformation(init, update), sizes)
        assert found.axes.opt_state == {"own": 0, "common": None}
        assert found.abstract_state.opt_state["own"].shape == (WORKERS,)


def test_state_follows_its_parameters_with_the_worker_axis_in_front_and_zero_axes_behind():
    tx = optax.chain(error_feedback(), optax.adam(0.1))
    found = layout(tx, {"worker": 4, "data": 2}, over=("data",), offload=True)
    spec = lambda x: x.sharding.spec
    feedback, (adam, _) = found.abstract_state.opt_state
    assert jax.tree.map(spec, feedback) == Residual(
        {"w": P("worker", "data"), "b": P("worker", "data")}, P()
    )
    assert jax.tree.map(spec, adam.mu) == {"w": P("data"), "b": P("data")}
    assert found.update_specs == {"w": P("data"), "b": P("data")}
    assert found.param_specs == {"w": P(), "b": P()}
    assert jax.tree.map(spec, found.abstract_state.params) == {"w": P(), "b": P()}
    kinds = jax.tree.map(lambda x: x.sharding.memory_kind, found.abstract_state)
    assert set(jax.tree.leaves(kinds.params)) == {"device"}
    assert (kinds.opt_state[0].residual["w"], kinds.opt_state[0].count) == ("pinned_host", "device")
    assert {s.memory_kind for s in jax.tree.leaves(found.device_state)} == {"device"}


@pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit])
def test_shardings_are_those_of_the_mesh_as_it_was_given(axis_types):
    found = layout(
        optax.chain(mean(), optax.adam(0.1)), MESHES["worker=4,model=2"], axis_types=axis_types
    )
    mesh = make_mesh(MESHES["worker=4,model=2"], axis_types=axis_types)
    assert found.state_shardings.params["w"] == NamedSharding(mesh, P(None, "model"))


# What the layout promises, the numbers keep.

TARGETS = np.random.default_rng(1).normal(size=(16, 6)).astype(np.float32)
INPUTS = np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32)


def loss(params, batch):
    prediction = jnp.tanh(batch["x"] @ params["w"]) + params["b"][None]
    return jnp.mean((prediction - batch["y"]) ** 2)


def run(tx, sizes, steps=6):
    mesh = None if sizes is None else make_mesh(sizes)
    step = make_train_step(
        loss,
        tx,
        mesh,
        param_specs=SPECS if sizes and "model" in sizes else None,
        worker_axis="worker",
        workers=WORKERS,
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), PARAMS)
    state, seen = step.init(params), []
    for _ in range(steps):
        state, metrics = step(state, {"x": INPUTS, "y": TARGETS})
        seen.append(metrics)
    return jax.tree.map(np.array, (state, seen))


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(error_feedback(), optax.adam(0.1)),
        optax.chain(delay(), mean(), delay(), optax.sgd(0.1)),
        local_sgd(),
    ],
    ids=["error feedback", "delays", "local SGD"],
)
def test_states_of_a_fleet_and_of_a_mesh_are_equal(tx):
    expected = run(tx, MESHES["fleet"])
    for name in ("worker=4", "worker=4,model=2"):
        for a, b in zip(
            jax.tree.leaves(run(tx, MESHES[name])), jax.tree.leaves(expected), strict=True
        ):
            # Float32 sums in another order, over six steps; a mean of magnitudes over the model
            # axis is such a sum too.
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)


def test_local_sgd_is_that_of_a_loop_over_workers():
    state, metrics = run(local_sgd(), MESHES["worker=4"], steps=4)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), PARAMS)
    own = [params] * WORKERS
    momentum = [jax.tree.map(np.zeros_like, params)] * WORKERS
    value_and_grad = jax.jit(jax.value_and_grad(loss))
    for t in range(4):
        parts = [
            {"x": x, "y": y} for x, y in zip(np.split(INPUTS, 4), np.split(TARGETS, 4), strict=True)
        ]
        losses, grads = zip(
            *(value_and_grad(p, b) for p, b in zip(own, parts, strict=True)), strict=True
        )
        np.testing.assert_allclose(metrics[t].loss, np.mean(losses), rtol=1e-5)
        momentum = [
            jax.tree.map(lambda m, g: 0.5 * m + g, m, g)
            for m, g in zip(momentum, grads, strict=True)
        ]
        own = [
            jax.tree.map(lambda p, m: p - 0.1 * m, p, m) for p, m in zip(own, momentum, strict=True)
        ]
        if t == 2:
            own = [jax.tree.map(lambda *ps: sum(ps) / WORKERS, *own)] * WORKERS
    for i in range(WORKERS):
        for name in PARAMS:
            # Four steps of float32.
            np.testing.assert_allclose(state.params[name][i], own[i][name], rtol=1e-4, atol=1e-5)
    assert np.ptp(state.params["w"], axis=0).max() > 1e-3  # they differ
