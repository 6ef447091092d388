"""Workers that leave, return, weigh less, or bring numbers that are not finite."""

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
    feedback,
    mean_over_workers,
    nesterov,
)
from jaxopt_suite.optimizers.diloco.outer import contribution

AXIS = "worker"


def outer_sgd(rate):
    return optax.chain(mean_over_workers(AXIS), optax.sgd(rate))


def given(params, x):
    del params
    return x


def fleet(active, gradients, *, inner=None, outer=None, every=2, start=0.0, **settings):
    inner, outer = inner or optax.sgd(1.0), outer or outer_sgd(1.0)
    tx = diloco(inner, outer, sync_every=every, axis_name=AXIS, **settings)
    params = np.full(gradients.shape[2:], start, np.float32)
    return train_fleet(tx, given, gradients, params, active=active)


def ones(workers, steps):
    """Worker w goes down by w + 1 in every step."""
    rates = np.arange(1.0, workers + 1)[:, None, None]
    return np.broadcast_to(rates, (workers, steps, 1)).astype(np.float32)


def test_the_mean_is_over_those_present_and_by_their_weights():
    """Three workers go to -2, -4 and -6; the second is absent at the synchronisation."""
    found, state = fleet([[1, 1], [1, 0], [1, 1]], ones(3, 2))
    np.testing.assert_array_equal(found[:, -1, 0], [-4, -4, -4])  # the mean of -2 and -6
    _, state = fleet([[1, 3], [1, 0], [1, 1]], ones(3, 2))
    assert float(state.outer_params[0]) == -3  # (3 * -2 + -6) / 4
    assert int(state.left_out) == int(state.skipped) == 0


def test_weights_that_are_all_equal_are_no_weights():
    """To the bit, so that elastic runs without absences are plain ones."""
    gradients = np.random.default_rng(0).normal(size=(8, 6, 5)).astype(np.float32)
    for value in (1.0, 4.0):
        weighted, _ = fleet(np.full((8, 6), value), gradients, outer=nesterov(AXIS))
        plain, _ = fleet(None, gradients, outer=nesterov(AXIS))
        np.testing.assert_array_equal(weighted, plain)


def test_an_absent_worker_waits_at_the_outer_parameters_and_keeps_its_inner_state():
    """The second of two is absent in steps 2 to 5 and back in 6 and 7; rounds are of four."""
    active = np.ones((2, 7))
    active[1, 1:5] = 0
    momentum = optax.sgd(1.0, momentum=1.0)
    found, state = fleet(active, np.ones((2, 7, 1), np.float32), inner=momentum, every=4)
    # The other: -1, -3, -6, -10; the round's mean is its own way, and then its trace is 4.
    np.testing.assert_array_equal(found[0, :, 0], [-1, -3, -6, -10, -15, -21, -28])
    # It goes back to 0 and, once the round is over, to -10; its trace of 1 has become 2, then 3.
    np.testing.assert_array_equal(found[1, :, 0], [-1, 0, 0, -10, -10, -12, -15])
    np.testing.assert_array_equal(state.inner[0].trace[:, 0], [7, 3])


def test_an_absent_worker_may_return_with_a_new_inner_state_whose_schedule_goes_on():
    active = np.ones((2, 5))
    active[1, 1:4] = 0
    inner = optax.sgd(lambda count: jnp.where(count == 1, 10.0, 1.0), momentum=1.0)
    gradients = np.ones((2, 5, 1), np.float32)
    found, state = fleet(active, gradients, inner=inner, every=4, rejoin="reset")
    np.testing.assert_array_equal(state.inner[0].trace[:, 0], [5, 1])
    # Its own second step is taken at the second rate: absent, it counted none.
    np.testing.assert_array_equal(state.inner[1].count, [5, 2])
    assert float(found[1, -1, 0] - found[1, -2, 0]) == -10


def test_the_gradient_of_a_return_is_taken_at_the_outer_parameters():
    """Halving steps; the second worker is absent in steps 2 to 4, through the end of a round."""
    active = np.ones((2, 5))
    active[1, 1:4] = 0
    tx = diloco(optax.sgd(0.5), outer_sgd(1.0), sync_every=3, axis_name=AXIS)
    found, _ = train_fleet(
        tx,
        lambda p, x: p + x,
        np.zeros((2, 5, 1), np.float32),
        np.full(1, 8.0, np.float32),
        active=active,
    )
    np.testing.assert_array_equal(found[:, :, 0], [[4, 2, 1, 0.5, 0.25], [4, 8, 1, 1, 0.5]])


def test_with_nobody_present_the_outer_step_is_skipped_and_counted():
    active = np.ones((2, 6))
    active[:, 3] = 0
    found, state = fleet(active, ones(2, 6), outer=nesterov(AXIS))
    assert int(state.skipped) == 1
    assert np.isfinite(found).all()
    plain, kept = fleet(None, ones(2, 4), outer=nesterov(AXIS))
    # All are put back to where the round began: rounds one and three are rounds one and two.
    np.testing.assert_allclose(found[:, 4:], plain[:, 2:], rtol=1e-6)
    np.testing.assert_allclose(state.outer[1][0].trace, kept.outer[1][0].trace, rtol=1e-6)


def test_a_contribution_that_is_not_finite_is_left_out_counted_and_its_worker_begins_anew():
    gradients = ones(4, 4).copy()
    gradients[2, 1], gradients[1, 1] = np.nan, np.inf
    found, state = fleet(None, gradients, inner=optax.sgd(1.0, momentum=0.5))
    assert int(state.left_out) == 2
    assert np.isfinite(found[:, 2:]).all()
    assert np.isfinite(state.inner[0].trace).all()
    # Workers 1 and 4 go to -2.5 and -10.
    np.testing.assert_array_equal(state.outer_params.shape, (1,))
    np.testing.assert_array_equal(found[np.array([0, 3]), 1, 0], [-6.25, -6.25])


def test_a_worker_of_nan_is_left_out_for_good_unless_its_own_optimizer_is_guarded():
    """No update mends a NaN; the others go on without it."""
    gradients = ones(3, 6).copy()
    gradients[1, 2] = np.nan
    lost, state = fleet(None, gradients)
    assert np.isnan(lost[1, 3:]).all()
    assert int(state.left_out) == 2
    np.testing.assert_array_equal(
        lost[[0, 2], -1, 0], [-12, -12]
    )  # rounds of the mean rates 2, 2, 2
    guarded, state = fleet(None, gradients, inner=optax.apply_if_finite(optax.sgd(1.0), 5))
    assert int(state.left_out) == 0
    assert np.isfinite(guarded).all()


def test_updates_of_the_chain_that_are_not_finite_are_not_taken():
    outer = optax.chain(mean_over_workers(AXIS), optax.trace(0.5), optax.scale(-3e38))
    found, state = fleet(None, 8 * ones(2, 4), outer=outer)
    assert int(state.skipped) == 2
    np.testing.assert_array_equal(found[:, -1], 0)
    np.testing.assert_array_equal(state.outer[1].trace, 0)


def send(tx, inputs, active):
    """One worker's way through a mean, weighed as an outer step weighs it."""

    def worker(x, active):
        def step(state, given):
            own = contribution(given[0], given[1], AXIS)
            mean, state = tx.update(own.x, state, weight=own.weight)
            return state, mean

        state, means = jax.lax.scan(step, tx.init(x[0]), (x, active))
        return means, state

    run = parallel.run_workers(worker, axis_name=AXIS)
    return jax.jit(run)(inputs, np.asarray(active, np.float32))


@pytest.mark.parametrize(
    ("rule", "exchange"),
    [
        (feedback.none(), "gather"),
        (feedback.ef(), "gather"),
        (feedback.ef(), "two_phase"),
        (feedback.econtrol(0.5), "two_phase"),
    ],
)
def test_an_absent_worker_sends_nothing_and_keeps_what_it_remembers(rule, exchange):
    inputs = np.random.default_rng(1).normal(size=(3, 2, 2048)).astype(np.float32)
    inputs[2, 1] = 1e6  # would be seen in any mean
    mean = compressed_mean(compressors.int8(), feedback=rule, exchange=exchange, axis_name=AXIS)
    means, state = send(mean, inputs, [[1, 1], [1, 1], [1, 0]])
    _, before = send(mean, inputs[:, :1], [[1], [1], [1]])
    for kept, old in zip(state.local, before.local, strict=True):
        np.testing.assert_array_equal(kept[2], old[2])
        assert (kept[:2] != old[:2]).any()
    assert np.abs(means[1]).max() < 10


def test_one_absent_of_three_is_a_fleet_of_two_also_when_compressed():
    """Without memory, and with error feedback, whose residuals are of what was sent."""
    inputs = np.random.default_rng(2).normal(size=(3, 4, 2048)).astype(np.float32)
    for rule in (feedback.none(), feedback.ef()):
        mean = compressed_mean(compressors.int8(), feedback=rule, exchange="gather", axis_name=AXIS)
        three, _ = send(mean, inputs, [[1] * 4, [1] * 4, [0] * 4])
        two, _ = send(mean, inputs[:2], [[1] * 4, [1] * 4])
        # Codes are of numbers 3/2 as large: a rounding now and then falls the other way.
        np.testing.assert_allclose(three, two, rtol=0, atol=0.03)


def test_estimates_of_those_absent_stay_in_the_mean():
    """EF21 that sends everything: the second step is with the first input of the absent one."""
    inputs = np.random.default_rng(3).normal(size=(2, 2, 1024)).astype(np.float32)
    mean = compressed_mean(
        compressors.identity(),
        feedback=feedback.ef21(),
        exchange="mean",
        axis_name=AXIS,
        dense=lambda path, leaf: False,
    )
    means, _ = send(mean, inputs, [[1, 1], [1, 0]])
    expected = (inputs[0, 1] + inputs[1, 0]) / 2
    np.testing.assert_allclose(means[1], expected, rtol=0, atol=1e-6)  # sums of differences


def test_a_train_step_hands_each_worker_its_own_weight_and_measures_those_present():
    loss = lambda p, x: jnp.mean(p * x)
    tx = diloco(optax.sgd(1.0), outer_sgd(1.0), sync_every=2, axis_name=AXIS)
    batch = np.arange(1.0, 9.0, dtype=np.float32)
    results = []
    for mesh, workers in ((None, 4), (parallel.make_mesh({"worker": 4}), None)):
        step = parallel.make_train_step(loss, tx, mesh, worker_axis=AXIS, workers=workers)
        state = step.init(jnp.ones(()))
        for active in ([1, 1, 1, 1], [1, 0, 1, 0]):
            state, metrics = step(state, batch, active=active)
        # Rates of descent are 1.5, 3.5, 5.5 and 7.5; the first and the third are there at the end.
        np.testing.assert_allclose(state.params, 1 - 2 * 3.5, rtol=1e-6)
        np.testing.assert_allclose(metrics.loss, ((1 - 1.5) * 1.5 + (1 - 5.5) * 5.5) / 2, rtol=1e-6)
        np.testing.assert_allclose(metrics.grad_norm, np.sqrt((1.5**2 + 5.5**2) / 2), rtol=1e-6)
        state, metrics = step(state, batch, active=np.zeros(4))
        assert np.isnan(metrics.loss)
        assert np.isfinite(state.params).all()
        results.append(state.params)
    np.testing.assert_array_equal(*results)


def test_a_train_step_refuses_weights_that_are_not_one_a_worker():
    tx = diloco(optax.sgd(1.0), sync_every=2, axis_name=AXIS)
    step = parallel.make_train_step(lambda p, x: jnp.mean(p * x), tx, worker_axis=AXIS, workers=4)
    state, batch = step.init(jnp.ones(())), np.ones(8, np.float32)
    with pytest.raises(ValueError, match=r"one number for each of 4 workers.*got shape \(3,\)"):
        step(state, batch, active=np.ones(3))
    alone = parallel.make_train_step(lambda p, x: jnp.mean(p * x), optax.sgd(1.0))
    with pytest.raises(ValueError, match="worker_axis=None"):
        alone(alone.init(jnp.ones(())), batch, active=np.ones(1))
