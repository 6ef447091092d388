"""The gradient noise scale, on gradients whose mean and covariance are known."""

import functools

import fleets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_suite import parallel, testing
from jaxopt_suite.parallel import wire
from jaxopt_suite.scaling_laws import noise_scale, read_noise_scale
from jaxopt_suite.scaling_laws.noise_scale import NoiseScaleState, two_batches

SHAPES = {"matrix": (6, 4), "vector": (8,), "scalar": ()}
SIZE = 33
SIGNAL, VARIANCE = 0.5, 4.0  # every entry of G, and the variance of every entry of an example's


def gradients(*, steps, workers=8, batch=2, seed=0, signal=SIGNAL):
    """Gradients of ``batch`` examples each: a tree of ``[workers, steps, *shape]``."""
    rng = np.random.default_rng(seed)
    std = np.sqrt(VARIANCE / batch)
    draw = lambda shape: signal + std * rng.normal(size=(workers, steps, *shape))
    return {name: draw(shape).astype(np.float32) for name, shape in SHAPES.items()}


def measured(grads, *, batch=2, decay=0.99, mesh=None, inner=None):
    tx = noise_scale(inner, axis_name="worker", batch_size=batch, decay=decay)
    return fleets.run_fleet(tx, grads, mesh=mesh)


def squares(tree):
    """Of each worker and step: float64 ``[workers, steps]``."""
    return sum(
        (np.asarray(x, np.float64) ** 2).reshape(*x.shape[:2], -1).sum(-1) for x in tree.values()
    )


def test_the_averages_are_those_computed_by_hand():
    grads = gradients(steps=5)
    decay, small, large = 0.8, 2, 16
    mean = {name: x.astype(np.float64).mean(0, keepdims=True) for name, x in grads.items()}
    b_norm, big_norm = squares(grads).mean(0), squares(mean)[0]
    signal = (large * big_norm - small * b_norm) / (large - small)
    noise = (b_norm - big_norm) / (1 / small - 1 / large)
    weights = decay ** np.arange(4, -1, -1.0)
    estimate = read_noise_scale(measured(grads, decay=decay)[1])
    # float32 sums of 33 squares, and five steps of two averages
    np.testing.assert_allclose(estimate.signal, np.average(signal, weights=weights), rtol=1e-5)
    np.testing.assert_allclose(estimate.noise, np.average(noise, weights=weights), rtol=1e-5)
    np.testing.assert_allclose(estimate.scale, estimate.noise / estimate.signal, rtol=1e-12)
    assert (estimate.count, estimate.status) == (5, "ok")


def test_updates_are_the_plain_mean():
    grads = gradients(steps=3)
    updates, _ = measured(grads)
    for name, x in grads.items():
        np.testing.assert_allclose(updates[name], x.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("workers", [2, 8])
def test_both_estimates_are_unbiased(batch, workers):
    """Within four standard errors of the truth, over 4000 independent steps."""
    grads = gradients(steps=4000, workers=workers, batch=batch, seed=batch + workers)
    mean = {name: x.mean(0, keepdims=True, dtype=np.float64) for name, x in grads.items()}
    found = two_batches(
        squares(grads).mean(0), squares(mean)[0], small=batch, large=batch * workers
    )
    for estimates, truth in zip(found, (SIZE * SIGNAL**2, SIZE * VARIANCE), strict=True):
        error = estimates.std() / np.sqrt(estimates.size)
        assert abs(estimates.mean() - truth) < 4 * error
        assert error < 0.05 * truth


def test_a_long_average_finds_the_noise_scale():
    state = measured(gradients(steps=3000, workers=8), decay=0.9999)[1]
    estimate = read_noise_scale(state)
    # One step's estimate of |G|^2 has a relative deviation of about 0.7; 3000 of them, 0.013.
    np.testing.assert_allclose(estimate.scale, VARIANCE / SIGNAL**2, rtol=0.05)


def test_equal_gradients_have_no_noise_and_status_says_so():
    grads = {name: np.ones((4, 2, *shape), np.float32) for name, shape in SHAPES.items()}
    estimate = read_noise_scale(measured(grads)[1])
    assert (estimate.noise, estimate.signal) == (0.0, pytest.approx(SIZE, rel=1e-6))
    assert estimate.status == "negative_noise"
    assert np.isnan(estimate.scale)


def test_a_negative_signal_is_a_status_and_is_not_clamped():
    grads = {"x": np.array([[[1.0]], [[-1.0]]], np.float32)}
    estimate = read_noise_scale(measured(grads, batch=1)[1])
    # |g_b|^2 = 1, |g_B|^2 = 0: signal (0 - 1) / (2 - 1), noise 1 / (1 - 1/2)
    assert (estimate.signal, estimate.noise) == (pytest.approx(-1.0), pytest.approx(2.0))
    assert estimate.status == "negative_signal"
    assert np.isnan(estimate.scale)


def test_one_worker_and_no_step_give_no_estimate():
    _, state = measured(gradients(steps=3, workers=1))
    assert read_noise_scale(state).status == "no_estimate"
    tx = noise_scale(axis_name="worker", batch_size=1)
    assert read_noise_scale(tx.init({"x": jnp.zeros(3)})).status == "no_estimate"


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_is_left_out(bad):
    grads = gradients(steps=4)
    spoiled = {name: x.copy() for name, x in grads.items()}
    spoiled["vector"][3, 2, 0] = bad  # 1e30 squared is none of float32's
    kept = {name: np.delete(x, 2, axis=1) for name, x in grads.items()}
    assert read_noise_scale(measured(spoiled)[1]) == read_noise_scale(measured(kept)[1])


def test_a_mesh_gives_what_a_simulated_fleet_gives():
    grads = gradients(steps=20)
    mesh = parallel.make_mesh({"worker": 8})
    simulated, state = measured(grads)
    updates, on_mesh = measured(grads, mesh=mesh)
    assert fleets.relative_difference(updates, simulated) < 1e-6  # orders of sums
    assert fleets.relative_difference(on_mesh, state) < 1e-5
    assert on_mesh.signal.shape == ()  # typed as equal on all workers
    assert len({float(x) for x in fleets.copies(on_mesh.noise)}) == 1


def linear(params, batch):
    return jnp.mean(jnp.square(batch @ params["up"] @ params["down"]))


SPECS = {"up": P(None, "model"), "down": P("model", None)}
PARAMS = {
    "up": np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32),
    "down": np.random.default_rng(2).normal(size=(16, 4)).astype(np.float32),
}


def step_on(sizes, tx):
    return parallel.make_train_step(
        linear, tx, parallel.make_mesh(sizes), worker_axis="worker", param_specs=SPECS
    )


@functools.cache
def trained(model):
    """The estimate after five steps on a mesh whose matrices are cut in ``model`` parts."""
    tx = optax.chain(noise_scale(axis_name="worker", batch_size=4), optax.sgd(1e-3))
    step = step_on({"worker": 4, "model": model}, tx)
    state, rng = step.init(PARAMS), np.random.default_rng(3)
    for _ in range(5):
        state, _ = step(state, rng.normal(size=(16, 8)).astype(np.float32))
    return read_noise_scale(state.opt_state)


def test_norms_are_of_whole_tensors_beside_a_model_axis():
    whole, cut = trained(1), trained(2)
    assert whole.count == cut.count == 5
    np.testing.assert_allclose(cut.signal, whole.signal, rtol=1e-5)
    np.testing.assert_allclose(cut.noise, whole.noise, rtol=1e-5)


def worker_traffic(tx):
    """Bytes and numbers of collectives along the worker axis of a compiled step."""
    sizes = {"worker": 4, "model": 2}
    compiled = step_on(sizes, tx).lower(PARAMS, jnp.zeros((16, 8))).compile()
    found = wire.collectives(compiled, parallel.make_mesh(sizes))
    along = [c for c in found if c.axes is None or "worker" in c.axes]
    return sum(c.total for c in along), len(along)


def test_one_scalar_a_step_is_all_that_it_sends_to_other_workers():
    plain = optax.stateless(lambda updates, params: jax.lax.pmean(updates, "worker"))
    bytes_plain, count_plain = worker_traffic(optax.chain(plain, optax.sgd(0.1)))
    watched = noise_scale(plain, axis_name="worker", batch_size=4)
    bytes_watched, count_watched = worker_traffic(optax.chain(watched, optax.sgd(0.1)))
    assert bytes_watched - bytes_plain == pytest.approx(2 * 3 / 4 * 4)  # a ring, one float32
    assert count_watched - count_plain <= 1


def test_the_contract_is_kept():
    report = testing.check_transformation(
        functools.partial(noise_scale, axis_name="worker", batch_size=2),
        axis_name="worker",
        bad_arguments=[
            {"batch_size": 0},
            {"batch_size": 1.5},
            {"decay": 1.0},
            {"decay": -0.1},
            {"decay": "slow"},
        ],
    )
    assert not report.failed, str(report)


def test_what_cannot_be_measured_is_refused():
    tx = noise_scale(axis_name="worker", batch_size=1)
    with pytest.raises(ValueError, match="noise_scale communicates over axis_name='worker'"):
        tx.update({"x": jnp.ones(2)}, tx.init({"x": jnp.ones(2)}))
    mesh = parallel.make_mesh({"worker": 8})
    with pytest.raises(ValueError, match="inner must give the mean, equal on all workers"):
        measured(gradients(steps=1), mesh=mesh, inner=optax.identity())
    for small, large in ((0, 1), (2, 2), (3, 2)):
        with pytest.raises(ValueError, match="batches must be 0 < small < large"):
            two_batches(1.0, 1.0, small=small, large=large)


def test_the_state_is_found_in_a_chain_and_must_be_one():
    one = noise_scale(axis_name="worker", batch_size=1)
    params = {"x": jnp.ones(2)}
    chained = optax.chain(one, optax.adam(1e-3)).init(params)
    assert read_noise_scale(chained).status == "no_estimate"
    with pytest.raises(ValueError, match="one NoiseScaleState, got 0"):
        read_noise_scale(optax.adam(1e-3).init(params))
    with pytest.raises(ValueError, match="one NoiseScaleState, got 2"):
        read_noise_scale((chained, chained))
    assert isinstance(one.init(params), NoiseScaleState)
