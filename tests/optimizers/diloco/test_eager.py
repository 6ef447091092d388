"""Delayed and eager updates: rounds worked out by hand, limits, types, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fleets import train_fleet

from jaxopt_suite import core, parallel
from jaxopt_suite.optimizers import (
    compressed_mean,
    compressors,
    diloco,
    eager_diloco,
    mean_outer_params,
    mean_over_workers,
    one_round_late,
    outer_params,
)

AXIS = "worker"
CURVATURE = np.array([[1.0, 3.0], [2.0, 0.5], [0.25, 1.5]])
CENTRE = np.array([[0.5, 1.0], [-1.0, 2.0], [3.0, -2.0]])
START = np.array([1.0, -2.0])
RATE, OUTER_RATE, MOMENTUM = 0.1, 0.4, 0.8


def quadratic(x, given):
    curvature, centre = given
    return curvature * (x - centre)


def pseudo_gradient(worker, theta):
    """Two inner steps of gradient descent on the worker's quadratic."""
    x = theta
    for _ in range(2):
        x = x - RATE * CURVATURE[worker] * (x - CENTRE[worker])
    return theta - x


def train(tx, *, rounds, active=None):
    steps = 2 * rounds
    inputs = (np.repeat(CURVATURE[:, None], steps, 1), np.repeat(CENTRE[:, None], steps, 1))
    return train_fleet(tx, quadratic, inputs, START, active=active)


def given(params, x):
    del params
    return x


def test_eager_updates_of_three_workers_worked_out_in_float64():
    theta, v = np.tile(START, (3, 1)), np.zeros((3, 2))
    stale, expected = np.zeros((3, 2)), []
    for _ in range(4):
        fresh = np.stack([pseudo_gradient(w, theta[w]) for w in range(3)])
        others = stale.sum(0) - stale
        fed = (fresh + others) / 3
        v = MOMENTUM * v + fed
        theta = theta - OUTER_RATE * (fed + MOMENTUM * v)
        stale = fresh
        expected.append(theta)

    with jax.enable_x64(True):
        tx = eager_diloco(optax.sgd(RATE), sync_every=2, axis_name=AXIS)
        found, state = train(tx, rounds=4)
        # Fifteen digits of numbers of size one.
        for worker in range(3):
            after = np.stack(expected)[:, worker]
            np.testing.assert_allclose(found[worker, 1::2], after, rtol=0, atol=1e-14)
        np.testing.assert_allclose(state.outer_params, theta, rtol=0, atol=1e-14)
        np.testing.assert_allclose(state.variant.sent, stale, rtol=0, atol=1e-14)


def test_delayed_updates_of_three_workers_worked_out_in_float64():
    theta, v, stale, expected = START.copy(), np.zeros(2), np.zeros(2), []
    for _ in range(4):
        fresh = np.mean([pseudo_gradient(w, theta) for w in range(3)], axis=0)
        v = MOMENTUM * v + stale
        theta = theta - OUTER_RATE * (stale + MOMENTUM * v)
        stale = fresh
        expected.append(theta)

    with jax.enable_x64(True):
        outer = optax.chain(
            mean_over_workers(AXIS), one_round_late(), optax.sgd(OUTER_RATE, MOMENTUM, True)
        )
        tx = diloco(optax.sgd(RATE), outer, sync_every=2, axis_name=AXIS)
        found, _ = train(tx, rounds=4)
        np.testing.assert_array_equal(expected[0], START)
        np.testing.assert_allclose(found[1, 1::2], expected, rtol=0, atol=1e-14)


def test_without_a_delay_it_is_diloco():
    outer = optax.sgd(OUTER_RATE, MOMENTUM, nesterov=True)
    eager = eager_diloco(optax.sgd(0.1), outer, sync_every=2, axis_name=AXIS, delay=0)
    chain = optax.chain(mean_over_workers(AXIS), outer)
    plain = diloco(optax.sgd(0.1), chain, sync_every=2, axis_name=AXIS)
    np.testing.assert_array_equal(train(eager, rounds=3)[0], train(plain, rounds=3)[0])


def test_one_worker_has_nothing_to_wait_for():
    gradients = np.random.default_rng(0).normal(size=(1, 6, 5)).astype(np.float32)
    outer = optax.sgd(OUTER_RATE, MOMENTUM, nesterov=True)
    tx = eager_diloco(optax.sgd(0.1), outer, sync_every=2, axis_name=AXIS)
    found, _ = train_fleet(tx, given, gradients, np.zeros(5, np.float32))
    theta, state = np.zeros(5, np.float32), outer.init(gradients[0, 0])
    for pair in gradients[0].reshape(3, 2, 5):
        updates, state = outer.update(0.1 * pair.sum(0), state)
        theta = theta + updates
    # Δ[t-1] + (Δ[t] - Δ[t-1]) is Δ[t] but for a rounding.
    np.testing.assert_allclose(found[0, -1], theta, rtol=0, atol=1e-6)


def test_what_a_worker_is_ahead_by_is_its_newest_part_alone():
    """With gradients that are given, both variants have the same pseudo-gradients."""
    gradients = np.random.default_rng(1).normal(size=(4, 10, 6)).astype(np.float32)
    start, rate = np.zeros(6, np.float32), 0.5
    eager = eager_diloco(optax.sgd(0.1), optax.sgd(rate), sync_every=2, axis_name=AXIS)
    late = optax.chain(mean_over_workers(AXIS), one_round_late(), optax.sgd(rate))
    delayed = diloco(optax.sgd(0.1), late, sync_every=2, axis_name=AXIS)
    (_, ahead), (_, behind) = (train_fleet(tx, given, gradients, start) for tx in (eager, delayed))
    newest = 0.1 * gradients[:, -2:].sum(1)
    difference = np.asarray(ahead.outer_params) - np.asarray(behind.outer_params)
    # Five rounds of numbers of size one.
    np.testing.assert_allclose(difference, -rate * newest / 4, rtol=0, atol=1e-6)


def test_a_run_is_evaluated_at_the_mean_over_workers():
    gradients = np.random.default_rng(2).normal(size=(4, 4, 3)).astype(np.float32)
    tx = eager_diloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS)

    def worker(params, own):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (core.vary(params, AXIS), tx.init(params)), own)
        half = params.astype(jnp.bfloat16)
        return outer_params(state, params), mean_outer_params(state, half, AXIS)

    run = parallel.run_workers(worker, axis_name=AXIS, in_axes=(None, 0))
    each, mean = jax.jit(run)(np.ones(3, np.float32), gradients)
    assert each.shape == (4, 3)
    assert np.ptp(each, axis=0).min() > 0
    assert mean.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mean, np.asarray(each).mean(0).astype(jnp.bfloat16))


def layout(tx):
    step = parallel.make_train_step(lambda p, x: jnp.mean(p * x), tx, worker_axis=AXIS, workers=4)
    return step.layout(jax.ShapeDtypeStruct((), jnp.float32)).axes.opt_state


def test_outer_parameters_and_momentum_are_a_workers_own_and_what_lies_behind_the_mean_is_not():
    axes = layout(eager_diloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS))
    assert axes.outer_params == 0
    assert jax.tree.leaves(axes.outer[1]) == [0]
    assert axes.variant.sent == axes.variant.weight == 0
    assert axes.since is None

    late = optax.chain(mean_over_workers(AXIS), one_round_late(), optax.sgd(0.4, 0.8))
    axes = layout(diloco(optax.sgd(0.1), late, sync_every=2, axis_name=AXIS))
    assert axes.outer_params is axes.outer[1].waiting is axes.outer[2][0].trace is None


def test_a_round_without_workers_loses_nothing_that_is_under_way():
    """As if that round had not been, with gradients that do not depend on parameters."""
    gradients = np.random.default_rng(3).normal(size=(3, 8, 4)).astype(np.float32)
    start, active = np.zeros(4, np.float32), np.ones((3, 8))
    active[:, 4:6] = 0
    tx = eager_diloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS)
    _, found = train_fleet(tx, given, gradients, start, active=active)
    _, expected = train_fleet(tx, given, np.delete(gradients, [4, 5], axis=1), start)
    assert int(found.skipped) == 1
    # A step to the outer parameters and on is rounded once more than one from there.
    np.testing.assert_allclose(found.outer_params, expected.outer_params, rtol=0, atol=1e-7)


def test_an_absent_worker_takes_its_old_part_out_and_its_outer_parameters_along():
    gradients = np.ones((2, 6, 1), np.float32)
    active = np.ones((2, 6))
    active[0, 2:] = 0
    tx = eager_diloco(optax.sgd(0.5), optax.sgd(1.0), sync_every=2, axis_name=AXIS)
    found, state = train_fleet(tx, given, gradients, np.zeros(1, np.float32), active=active)
    # Each round's pseudo-gradient is 1; of a worker alone, with weight 2 in a mean of two. Worker 0
    # has -(1 + 2 + 2) / 2 from both but for the last round's of worker 1, which that one has.
    np.testing.assert_allclose(state.outer_params[:, 0], [-2.0, -3.0], rtol=1e-6)
    np.testing.assert_allclose(found[:, -1, 0], [-2.0, -3.0], rtol=1e-6)


def test_a_mean_is_given_the_weights_of_the_round_that_it_is_of():
    """So that a lossy one knows who sent nothing then."""

    def update(updates, state, params=None, *, weight, **extra):
        mean, _ = mean_over_workers(AXIS).update(updates, optax.EmptyState())
        return mean, weight + 0 * state

    noting = optax.GradientTransformationExtraArgs(lambda p: core.vary(jnp.zeros(()), AXIS), update)
    active = np.array([[1, 1, 0, 0], [1, 1, 1, 1]])
    tx = eager_diloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS, mean=noting)
    ones = np.ones((2, 4, 1), np.float32)
    _, state = train_fleet(tx, given, ones, np.zeros(1, np.float32), active=active)
    np.testing.assert_array_equal(state.outer[0], [1, 1])
    np.testing.assert_array_equal(state.variant.weight, [0, 2])


def test_any_mean_goes_with_any_outer_optimizer():
    gradients = np.random.default_rng(4).normal(size=(4, 6, 64)).astype(np.float32)
    mean = compressed_mean(compressors.int8(), axis_name=AXIS, dense=lambda path, leaf: False)
    outcomes = [
        train_fleet(
            eager_diloco(optax.sgd(0.1), optax.sgd(0.5), sync_every=2, axis_name=AXIS, mean=link),
            *(given, gradients, np.zeros(64, np.float32)),
        )[0]
        for link in (None, mean)
    ]
    # Two means of numbers below one, in steps of a 127th of the largest.
    np.testing.assert_allclose(*outcomes, rtol=0, atol=2 * 0.5 / 127)
    assert np.abs(outcomes[0] - outcomes[1]).max() > 0


@pytest.mark.parametrize("delay", [-1, 2, 0.5, None])
def test_refuses_other_delays(delay):
    with pytest.raises(ValueError, match=f"delay must be 0 or 1 rounds, got {delay}"):
        eager_diloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS, delay=delay)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sync_every": 0}, "sync_every must be an int of at least 1, got 0"),
        ({"sync_every": 2, "inner_state": "forget"}, "inner_state must be one of.*'forget'"),
        ({"sync_every": 2, "rejoin": "copy"}, "rejoin must be one of.*'copy'"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        eager_diloco(optax.sgd(1.0), axis_name=AXIS, **arguments)


def test_refuses_a_mean_that_does_not_communicate():
    tx = eager_diloco(optax.sgd(0.1), sync_every=2, axis_name=AXIS, mean=optax.identity())
    with pytest.raises(ValueError, match="mean must make its updates equal on all workers"):
        train(tx, rounds=1)
