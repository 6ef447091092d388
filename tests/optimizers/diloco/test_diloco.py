"""DiLoCo: a round worked out by hand, the methods it becomes in limits, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fleets import train_fleet

from jaxopt_suite import parallel
from jaxopt_suite.optimizers import (
    compressed_mean,
    compressors,
    diloco,
    mean_over_workers,
    nesterov,
    outer_params,
)

AXIS = "worker"


def outer_sgd(rate):
    return optax.chain(mean_over_workers(AXIS), optax.sgd(rate))


def identity_gradient(params, x):
    """Gradients that are given, wherever the parameters are."""
    del params
    return x


def dyadic(shape, *, seed=0, scale=64):
    """Numbers whose sums and products of a few are exact in float32."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-scale, scale, size=shape) / scale).astype(np.float32)


def test_three_outer_steps_of_two_workers_with_two_parameters_worked_out_in_float64():
    """Inner SGD on two quadratics, H = 2; Nesterov's outer step as PyTorch has it."""
    start = np.array([1.0, -2.0])
    curvature = np.array([[1.0, 3.0], [2.0, 0.5]])
    centre = np.array([[0.5, 1.0], [-1.0, 2.0]])
    rate, outer_rate, momentum = 0.1, 0.7, 0.9

    theta, v, expected = start.copy(), np.zeros(2), []
    for _ in range(3):
        ends = []
        for worker in range(2):
            x = theta.copy()
            for _ in range(2):
                x = x - rate * curvature[worker] * (x - centre[worker])
            ends.append(x)
        delta = theta - (ends[0] + ends[1]) / 2
        v = momentum * v + delta
        theta = theta - outer_rate * (delta + momentum * v)
        expected.append(theta)

    with jax.enable_x64(True):
        tx = diloco(optax.sgd(rate), nesterov(AXIS), sync_every=2, axis_name=AXIS)
        inputs = (np.repeat(curvature[:, None], 6, 1), np.repeat(centre[:, None], 6, 1))
        gradient = lambda x, given: given[0] * (x - given[1])
        found, state = train_fleet(tx, gradient, inputs, start)
        found = np.asarray(found)
        assert state.outer_params.dtype == jnp.float64
        # Fifteen digits of numbers of size one.
        for worker in range(2):
            np.testing.assert_allclose(found[worker, 1::2], expected, rtol=0, atol=1e-14)
        np.testing.assert_allclose(state.outer_params, expected[-1], rtol=0, atol=1e-14)
    assert int(state.count) == 6
    assert int(state.since) == 0


def test_synchronising_every_step_with_inner_sgd_of_rate_one_is_data_parallel_sgd_exactly():
    gradients = dyadic((4, 5, 3, 2))
    start, rate = dyadic((3, 2), seed=1), 0.5
    tx = diloco(optax.sgd(1.0), outer_sgd(rate), sync_every=1, axis_name=AXIS)
    found, _ = train_fleet(tx, identity_gradient, gradients, start)

    # What both compute is exact in float32, so that no rounding hides a difference.
    expected = start - np.cumsum(rate * gradients.mean(0), axis=0)
    for worker in range(4):
        np.testing.assert_array_equal(found[worker], expected)


def quadratic(params, noise):
    """The gradient of a quadratic in a tree of parameters."""
    return jax.tree.map(lambda p, n: 0.5 * p + n, params, noise)


def noise(*, workers, steps, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"matrix": (6, 5), "vector": (7,)}
    return {
        name: rng.normal(size=(workers, steps, *shape)).astype(dtype)
        for name, shape in shapes.items()
    }


def start(seed=10):
    rng = np.random.default_rng(seed)
    return {
        "matrix": rng.normal(size=(6, 5)).astype(np.float32),
        "vector": rng.normal(size=7).astype(np.float32),
    }


def alone(tx, inputs, params):
    """The trajectory of one worker under a transformation that does not communicate."""
    state, found = tx.init(params), []
    for step in range(len(inputs["vector"][0])):
        x = jax.tree.map(lambda leaf, step=step: leaf[0, step], inputs)
        updates, state = tx.update(quadratic(params, x), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *found)


def test_one_worker_with_an_outer_step_of_the_whole_way_is_the_inner_optimizer_alone():
    inner = optax.adamw(optax.cosine_decay_schedule(0.1, 12))
    inputs = noise(workers=1, steps=12)
    tx = diloco(inner, outer_sgd(1.0), sync_every=4, axis_name=AXIS)
    found, _ = train_fleet(tx, quadratic, inputs, start())
    expected = alone(inner, inputs, start())
    # Θ - (Θ - θ) is θ but for one rounding of the difference, at every synchronisation.
    for leaf in expected:
        np.testing.assert_allclose(found[leaf][0], expected[leaf], rtol=0, atol=3e-6)


def test_one_worker_with_outer_sgd_of_rate_alpha_is_lookahead():
    inner, alpha = optax.adam(0.1), 0.5
    inputs = noise(workers=1, steps=12)
    tx = diloco(inner, outer_sgd(alpha), sync_every=4, axis_name=AXIS)
    found, state = train_fleet(tx, quadratic, inputs, start())

    both = optax.LookaheadParams.init_synced(start())
    reference = optax.lookahead(inner, sync_period=4, slow_step_size=alpha)
    memory = reference.init(both)
    for step in range(12):
        x = jax.tree.map(lambda leaf, step=step: leaf[0, step], inputs)
        updates, memory = reference.update(quadratic(both.fast, x), memory, both)
        both = optax.apply_updates(both, updates)
    # Additions in another order, three rounds of numbers of size one.
    for leaf in both.fast:
        np.testing.assert_allclose(found[leaf][0, -1], both.fast[leaf], rtol=0, atol=3e-6)
        np.testing.assert_allclose(state.outer_params[leaf], both.slow[leaf], rtol=0, atol=3e-6)


def test_renaming_workers_renames_their_states_and_leaves_the_outer_parameters():
    inputs, order = noise(workers=4, steps=5), [2, 0, 3, 1]
    renamed = jax.tree.map(lambda x: x[np.array(order)], inputs)
    tx = diloco(optax.adam(0.1), sync_every=3, axis_name=AXIS)
    found, state = train_fleet(tx, quadratic, inputs, start())
    other, other_state = train_fleet(tx, quadratic, renamed, start())
    pairs = [(found, other), (state.inner[0].mu, other_state.inner[0].mu)]
    # The mean of four is taken in another order.
    for one, two in pairs:
        for leaf in one:
            np.testing.assert_allclose(one[leaf][np.array(order)], two[leaf], rtol=0, atol=1e-6)
    for leaf, x in state.outer_params.items():
        np.testing.assert_allclose(x, other_state.outer_params[leaf], rtol=0, atol=1e-6)


def test_twenty_outer_steps_are_those_of_torch_on_the_same_pseudo_gradients():
    torch = pytest.importorskip("torch", reason="the reference is torch.optim.SGD")
    deltas = np.random.default_rng(4).normal(size=(1, 20, 30)).astype(np.float32)
    tx = diloco(optax.sgd(1.0), sync_every=1, axis_name=AXIS)
    # A worker that is put back to where it was after each step has the gradient for its way.
    found, _ = train_fleet(tx, identity_gradient, deltas, np.zeros(30, np.float32))
    reference = torch.nn.Parameter(torch.zeros(30))
    optimizer = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
    for step in range(20):
        reference.grad = torch.tensor(deltas[0, step])
        optimizer.step()
        expected = reference.detach().numpy()
        scale = np.abs(expected).max()
        # Θ - (Θ - Δ) is Δ but for a rounding of numbers of the size of Θ.
        np.testing.assert_allclose(found[0, step], expected, rtol=0, atol=1e-5 * scale)


def test_workers_part_between_synchronisations_and_meet_at_the_outer_parameters():
    inputs = noise(workers=3, steps=6)
    tx = diloco(optax.adam(0.01), sync_every=3, axis_name=AXIS)
    found, state = train_fleet(tx, quadratic, inputs, start())
    for leaf, x in found.items():
        assert np.ptp(x[:, 1], axis=0).min() > 0
        for worker in range(3):
            theta = np.asarray(state.outer_params[leaf])
            size = np.maximum(np.abs(x[worker, -1]), np.abs(x[worker, -2]))
            assert (np.abs(x[worker, -1] - theta) <= np.spacing(size)).all()


@pytest.mark.parametrize("every", [lambda count: jnp.where(count < 4, 2, 3)])
def test_a_cadence_that_changes_over_time_synchronises_when_it_says(every):
    """Two rounds of two steps, then rounds of three: after steps 2, 4, 7 and 10."""
    inputs = noise(workers=2, steps=11)
    tx = diloco(optax.sgd(0.1), sync_every=every, axis_name=AXIS)
    found, state = train_fleet(tx, quadratic, inputs, start())
    spread = np.ptp(found["vector"], axis=0).max(axis=1)
    met = [step + 1 for step, width in enumerate(spread) if width < 1e-6]
    assert met == [2, 4, 7, 10]
    assert int(state.since) == 1


def test_the_inner_state_and_its_schedule_go_on_through_synchronisations():
    """A rate that is zero but at inner step 6 moves parameters then and not before."""
    rate = lambda count: jnp.where(count == 6, 1.0, 0.0)
    gradients = np.ones((2, 8, 3), np.float32)
    for inner_state in ("keep", "reset"):
        tx = diloco(
            optax.sgd(rate), outer_sgd(1.0), sync_every=2, axis_name=AXIS, inner_state=inner_state
        )
        found, _ = train_fleet(tx, identity_gradient, gradients, np.zeros(3, np.float32))
        np.testing.assert_array_equal(found[0, :, 0], [0, 0, 0, 0, 0, 0, -1, -1])


def test_moments_are_kept_or_begun_anew_as_asked():
    gradients = np.ones((2, 3, 3), np.float32)
    moments = {}
    for inner_state in ("keep", "reset"):
        tx = diloco(
            optax.sgd(0.1, momentum=0.5),
            sync_every=3,
            axis_name=AXIS,
            inner_state=inner_state,
        )
        _, state = train_fleet(tx, identity_gradient, gradients, np.zeros(3, np.float32))
        moments[inner_state] = float(state.inner[0].trace[0, 0])
    assert moments == {"keep": 1.75, "reset": 0.0}


@pytest.mark.parametrize("mesh", [None, {"worker": 2}])
def test_outer_parameters_keep_what_the_dtype_of_the_parameters_cannot(mesh):
    """In bfloat16 the mean of two workers' ends lies between two numbers of that dtype.

    With gradients of zero from then on it stays there, and workers at the even one of the two.
    """
    mesh = mesh and parallel.make_mesh(mesh)
    start, gradients = np.ones(1, jnp.bfloat16), np.zeros((2, 3, 1), np.float32)
    gradients[0, 0] = 2.0**-7  # one unit in the last place above one
    tx = diloco(optax.sgd(-1.0), outer_sgd(1.0), sync_every=1, axis_name=AXIS)
    gradient = lambda p, x: x.astype(p.dtype)
    found, state = train_fleet(tx, gradient, gradients, start, mesh=mesh)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), 1)
    assert state.outer_params.dtype == jnp.float32
    assert float(state.outer_params[0]) == 1 + 2.0**-8


def test_outer_parameters_are_found_inside_of_wrappers_in_the_dtypes_asked_for():
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    tx = optax.chain(optax.clip(1.0), diloco(optax.sgd(1.0), sync_every=2, axis_name=AXIS))
    found = outer_params(tx.init(params), params)
    assert found["w"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="one DilocoState, got 0"):
        outer_params(optax.adam(1.0).init(params), params)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sync_every": 0}, "sync_every must be an int of at least 1, got 0"),
        ({"sync_every": -3}, "sync_every must be an int of at least 1, got -3"),
        ({"sync_every": 2, "inner_state": "forget"}, "inner_state must be one of.*'forget'"),
        ({"sync_every": 2, "rejoin": "copy"}, "rejoin must be one of.*'copy'"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        diloco(optax.sgd(1.0), axis_name=AXIS, **arguments)


def test_refuses_a_cadence_that_is_no_integer():
    with pytest.raises(TypeError, match=r"sync_every must be an int, got 2\.5"):
        diloco(optax.sgd(1.0), axis_name=AXIS, sync_every=2.5)


@pytest.mark.parametrize("run", ["vmap", "simulated", "mesh"])
def test_refuses_an_outer_chain_that_does_not_communicate(run):
    tx = diloco(optax.sgd(0.1), optax.sgd(0.7), sync_every=2, axis_name=AXIS)
    update = lambda g, p: tx.update(g, tx.init(p), p)[0]
    mapped = {
        "vmap": jax.vmap(update, in_axes=(0, None), axis_name=AXIS),
        "simulated": parallel.run_workers(update, axis_name=AXIS, in_axes=(0, None)),
        "mesh": parallel.run_workers(
            update, axis_name=AXIS, in_axes=(0, None), mesh=parallel.make_mesh({"worker": 4})
        ),
    }
    with pytest.raises(ValueError, match=r"those of \['w'\] may differ.*would drift apart"):
        mapped[run]({"w": jnp.ones((4, 3))}, {"w": jnp.ones(3)})


@pytest.mark.parametrize("mesh", [None, {"worker": 4}])
def test_any_mean_begins_an_outer_chain_of_any_optimizer(mesh):
    mesh = mesh and parallel.make_mesh(mesh)
    mean = compressed_mean(compressors.int4(), axis_name=AXIS, dense=lambda path, leaf: False)
    tx = diloco(optax.sgd(0.1), optax.chain(mean, optax.adam(0.1)), sync_every=2, axis_name=AXIS)
    found, _ = train_fleet(tx, quadratic, noise(workers=4, steps=4), start(), mesh=mesh)
    assert np.ptp(found["matrix"][:, -1], axis=0).max() < 1e-6


def test_a_chain_may_keep_what_differs_between_workers_before_its_mean():
    outer = optax.chain(optax.trace(0.5), mean_over_workers(AXIS), optax.scale(-1.0))
    tx = diloco(optax.sgd(0.1), outer, sync_every=2, axis_name=AXIS)
    step = parallel.make_train_step(lambda p, x: jnp.mean(p * x), tx, worker_axis=AXIS, workers=4)
    axes = step.layout(jax.ShapeDtypeStruct((), jnp.float32)).axes.opt_state
    assert axes.outer[0].trace == 0
    assert axes.outer_params is None


def test_refuses_parameters_that_differ_between_workers_at_init():
    tx = diloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS)
    mesh = parallel.make_mesh({"worker": 4})
    init = parallel.run_workers(tx.init, axis_name=AXIS, mesh=mesh)
    with pytest.raises(ValueError, match=r"equal on all workers, and \['w'\] may differ"):
        init({"w": jnp.ones((4, 3))})


def test_update_asks_for_params_and_for_its_axis():
    tx = diloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS)
    state = tx.init(jnp.ones(3))
    with pytest.raises(ValueError, match="diloco needs params"):
        tx.update(jnp.ones(3), state)
    with pytest.raises(ValueError, match="axis_name='worker', which is not bound"):
        tx.update(jnp.ones(3), state, jnp.ones(3))
