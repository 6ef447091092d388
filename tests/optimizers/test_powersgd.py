"""PowerSGD: two steps by hand, its limits, its warm-up, every substrate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fleets import WORKERS, copies, normal, relative_difference, run_fleet

from jaxopt_suite import parallel
from jaxopt_suite.optimizers import powersgd

RATE, MOMENTUM, RANK = 0.1, 0.9, 2
SHAPES = {"matrix": (12, 20), "tensor": (3, 4, 10), "vector": (7,)}
VECTORS = lambda path, leaf: leaf.ndim < 2


def make(rank=RANK, dense=VECTORS, **settings):
    return powersgd(RATE, MOMENTUM, axis_name="worker", rank=rank, dense=dense, **settings)


def zeros(inputs):
    return jax.tree.map(lambda x: jnp.zeros(x.shape[2:]), inputs)


def run(tx, inputs, params=None, **kwargs):
    return run_fleet(tx, inputs, params=zeros(inputs) if params is None else params, **kwargs)


def means(inputs, q, steps):
    """The low-rank means of one leaf ``[workers, steps, ...]``, in float64."""
    shape, q = inputs.shape[2:], q.astype(np.float64)
    x = inputs.astype(np.float64).reshape(*inputs.shape[:2], -1, shape[-1])
    errors, found = np.zeros((len(x), *x.shape[2:])), []
    for t in range(steps):
        message = x[:, t] + errors
        p, _ = np.linalg.qr(message.mean(0) @ q)
        own = np.swapaxes(message, 1, 2) @ p
        q = own.mean(0)
        found.append((p @ q.T).reshape(shape))
        errors = message - p @ np.swapaxes(own, 1, 2)
    return np.stack(found)


def stepped(mean, form):
    v, steps = 0.0, []
    for g in mean:
        v = MOMENTUM * v + g
        step = {"paper": g + v, "heavy_ball": v, "nesterov": g + MOMENTUM * v}[form]
        steps.append(-RATE * step)
    return np.stack(steps)


@pytest.mark.parametrize("form", ["paper", "heavy_ball", "nesterov"])
def test_steps_are_those_written_down_in_numpy(form):
    inputs = normal(SHAPES, steps=6, workers=4)
    tx = make(form=form)
    (first,) = tx.init(zeros(inputs))[0].factors
    updates, _ = run(tx, inputs)
    for name in ("matrix", "tensor"):
        expected = stepped(means(inputs[name], np.asarray(first[name]).T, 6), form)
        # Float32; each step's basis enlarges what the steps before it were off by.
        assert relative_difference(updates[name], expected) < 1e-4
    expected = stepped(inputs["vector"].astype(np.float64).mean(0), form)
    np.testing.assert_allclose(updates["vector"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("form", "nesterov"), [("heavy_ball", False), ("nesterov", True)])
def test_where_factors_save_nothing_it_is_momentum_sgd_on_the_mean(form, nesterov):
    inputs = normal(SHAPES, steps=10)
    updates, state = run(make(rank=12, form=form), inputs)
    sgd = optax.sgd(RATE, MOMENTUM, nesterov)
    expected = sgd.init(zeros(inputs))
    for t in range(10):
        mean = {name: jnp.asarray(x[:, t].mean(0)) for name, x in inputs.items()}
        step, expected = sgd.update(mean, expected)
        for name in SHAPES:
            # The mean may be summed in another order.
            np.testing.assert_allclose(updates[name][t], step[name], rtol=1e-5, atol=1e-6)
    assert not jax.tree.leaves(state[0].local)


def test_a_rank_not_below_that_of_the_mean_gives_the_mean():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(12, RANK)), rng.normal(size=(RANK, 20))
    own = np.einsum("wtij,jk->wtik", left @ rng.normal(size=(4, 5, RANK, RANK)), right)
    updates, state = run(make(), {"w": own.astype(np.float32)})
    expected = stepped(own.mean(0), "paper")
    assert relative_difference(updates["w"], expected) < 1e-5  # float32
    assert np.abs(state[0].local[0]["w"]).max() < 1e-4  # nothing is owed


def test_the_dense_warmup_is_sgd_and_leaves_the_link_as_it_was():
    inputs = normal(SHAPES, steps=6)
    updates, state = run(make(warmup_steps=3), inputs)
    mean = {name: x.astype(np.float64).mean(0) for name, x in inputs.items()}
    for name in SHAPES:
        expected = stepped(mean[name][:3], "paper")
        np.testing.assert_allclose(updates[name][:3], expected, rtol=1e-5, atol=1e-6)
    tx = make()
    (first,) = tx.init(zeros(inputs))[0].factors
    low_rank = means(inputs["matrix"][:, 3:], np.asarray(first["matrix"]).T, 3)
    expected = stepped(np.concatenate([mean["matrix"][:3], low_rank]), "paper")
    assert relative_difference(updates["matrix"], expected) < 1e-4
    assert int(state[0].count) == 6
    assert int(state[0].inner.count) == 3


def test_weight_decay_is_added_to_the_step_or_to_the_mean():
    inputs = normal({"vector": (7,)}, steps=4)
    params = {"vector": jnp.arange(7.0)}
    plain = np.asarray(run(make(), inputs, params)[0]["vector"])
    decay = 0.5 * np.arange(7.0)
    decoupled = run(make(weight_decay=0.5), inputs, params)[0]["vector"]
    np.testing.assert_allclose(decoupled, plain - RATE * decay, rtol=1e-5, atol=1e-6)
    coupled = run(make(weight_decay=0.5, coupled_decay=True), inputs, params)[0]["vector"]
    extra = stepped(np.broadcast_to(decay, (4, 7)), "paper")
    np.testing.assert_allclose(coupled, plain + extra, rtol=1e-5, atol=1e-6)


def test_what_a_worker_owes_does_not_grow_with_the_noise_between_workers():
    inputs = normal({"w": (12, 20)}, steps=200, workers=4, spread=0.0)
    sizes = []
    for steps in (50, 200):
        _, state = run(make(), {"w": inputs["w"][:, :steps]})
        sizes.append(np.linalg.norm(np.asarray(state[0].local[0]["w"])))
    assert sizes[1] < 1.5 * sizes[0]  # the root of 4 with the official rule


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_a_mesh_and_a_simulated_fleet_take_the_same_steps_and_replicas_are_equal_bits(warmup_steps):
    inputs = normal(SHAPES, steps=30)
    tx = make(warmup_steps=warmup_steps)
    simulated = run(tx, inputs)
    real = run(tx, inputs, mesh=parallel.make_mesh({"worker": WORKERS}))
    # All-reduces and products may sum in another order, which each step's basis enlarges.
    assert relative_difference(real[0], simulated[0]) < 1e-3
    first = [jax.tree.map(lambda x: x[: warmup_steps + 3], r[0]) for r in (real, simulated)]
    assert relative_difference(*first) < 1e-5
    for leaf in jax.tree.leaves(real[0]):
        held = copies(leaf)
        assert len(held) == WORKERS
        for other in held[1:]:
            np.testing.assert_array_equal(held[0].view(np.int32), other.view(np.int32))


def test_beside_a_model_axis_the_losses_are_the_same():
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(16, 32)).astype(np.float32),
        "y": rng.normal(size=(16, 16)).astype(np.float32),
    }
    params = {
        "w": (0.2 * rng.normal(size=(32, 64))).astype(np.float32),
        "v": (0.2 * rng.normal(size=(64, 16))).astype(np.float32),
    }
    specs = {"w": jax.P(None, "model"), "v": jax.P("model", None)}
    loss = lambda p, b: jnp.mean((jnp.tanh(b["x"] @ p["w"]) @ p["v"] - b["y"]) ** 2)
    losses = {}
    for text in ("worker=4,model=1", "worker=4,model=2"):
        mesh = parallel.make_mesh(parallel.parse_mesh(text))
        tx = optax.chain(optax.clip_by_global_norm(0.5), make(warmup_steps=3))
        step = parallel.make_train_step(loss, tx, mesh, param_specs=specs, worker_axis="worker")
        state, found = step.init(params), []
        for _ in range(12):
            state, metrics = step(state, batch)
            found.append(float(metrics.loss))
        losses[text] = found
    one, two = losses.values()
    np.testing.assert_allclose(two, one, rtol=1e-4)  # sums in another order, enlarged
    assert one[-1] < 0.7 * one[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be an int of at least 1"),
        ({"form": "nag"}, "form must be one of 'paper', 'heavy_ball', 'nesterov'"),
        ({"warmup_steps": -1}, "warmup_steps must be an int of at least 0"),
        ({"weight_decay": -1.0}, "weight_decay must be in"),
    ],
)
def test_bad_arguments_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_an_axis_that_is_not_bound_is_an_error_that_says_how_to_run_it(warmup_steps):
    tx, params = make(warmup_steps=warmup_steps), {"w": jnp.ones((16, 16))}
    with pytest.raises(ValueError, match=r"communicates over axis_name='worker'"):
        tx.update(params, tx.init(params), params)
