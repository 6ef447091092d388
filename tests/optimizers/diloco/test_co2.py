"""CO2: rounds worked out by hand, what it is without its devices, and when they are needed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fleets import train_fleet

from jaxopt_suite import parallel
from jaxopt_suite.optimizers import co2, relative_movement, slow_momentum

AXIS = "worker"


def given(params, x):
    del params
    return x


def test_five_rounds_of_two_workers_worked_out_in_float64():
    """With a penalty, a clip that acts on some entries, and an inner rate that decays."""
    curvature = np.array([[1.0, 3.0], [2.0, 0.5]])
    centre = np.array([[0.5, 1.0], [-1.0, 2.0]])
    start, rate, alpha, beta, clip = np.array([1.0, -2.0]), 0.1, 0.9, 0.5, 12.0
    gamma = lambda t: 0.1 * 0.8**t

    x, before, waiting, m, expected, kinds = start, start, np.zeros(2), np.zeros(2), [], set()
    for t in range(5):
        ends = []
        for worker in range(2):
            y = x
            for _ in range(2):
                y = y - rate * curvature[worker] * (y - centre[worker])
            ends.append(y)
        length = np.linalg.norm(waiting)
        gap = 1 + np.linalg.norm(x - before) / length if length else 1.0
        free = beta * m + waiting / (gamma(t) * gap)
        m = np.clip(free, -clip, clip)
        kinds |= {(gap > 1, clipped) for clipped in m != free}
        before, x = x, x - alpha * gamma(t) * m
        waiting = before - np.mean(ends, axis=0)
        expected.append(x)
    assert kinds == {(False, False), (True, False), (True, True)}

    with jax.enable_x64(True):
        tx = co2(
            optax.sgd(rate),
            sync_every=2,
            axis_name=AXIS,
            learning_rate=alpha,
            momentum=beta,
            inner_rate=lambda count: 0.1 * 0.8 ** count.astype(float),
            clip=clip,
        )
        inputs = (np.repeat(curvature[:, None], 10, 1), np.repeat(centre[:, None], 10, 1))
        gradient = lambda x, given: given[0] * (x - given[1])
        found, state = train_fleet(tx, gradient, inputs, start)
        # The length of the last step is kept in float32, and the penalty has its seven digits.
        np.testing.assert_allclose(found[0, 1::2], expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(state.outer[2].momentum, m, rtol=1e-6)
        assert int(state.outer[2].count) == 5


def test_without_momentum_and_devices_it_is_local_sgd_one_round_late():
    gradients = np.random.default_rng(0).normal(size=(3, 8, 5)).astype(np.float32)
    start = np.zeros(5, np.float32)
    tx = co2(optax.sgd(0.1), sync_every=2, axis_name=AXIS, momentum=0.0, penalty=None)
    found, _ = train_fleet(tx, given, gradients, start)
    moved = np.cumsum(-0.1 * gradients.reshape(3, 4, 2, 5).sum(2).mean(0), axis=0)
    expected = np.concatenate([np.zeros((1, 5)), moved[:-1]])
    # Sums of eight numbers below one in another order.
    np.testing.assert_allclose(found[1, 1::2], expected, rtol=0, atol=1e-6)


def test_slow_momentum_alone_is_heavy_ball_sgd_whatever_a_constant_inner_rate_is():
    updates = np.random.default_rng(1).normal(size=(6, 7)).astype(np.float32)
    outcomes = []
    for tx in (
        optax.sgd(0.7, 0.9),
        slow_momentum(0.7, 0.9),
        slow_momentum(0.7, 0.9, inner_rate=0.01),
    ):
        state, found = tx.init(updates[0]), []
        for u in updates:
            step, state = tx.update(u, state)
            found.append(step)
        outcomes.append(np.stack(found))
    # Multiplied by a hundred and divided again.
    np.testing.assert_allclose(outcomes[1], outcomes[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(outcomes[2], outcomes[0], rtol=1e-6, atol=1e-6)


def test_the_gap_is_one_more_than_the_ratio_of_two_lengths_and_one_while_nothing_arrives():
    assert float(relative_movement(jnp.float32(3.0), jnp.float32(2.0))) == 2.5
    assert float(relative_movement(jnp.float32(0.0), jnp.float32(2.0))) == 1.0
    assert float(relative_movement(jnp.float32(3.0), jnp.float32(0.0))) == 1.0


@jax.jit
def loss(momentum, penalised, clip):
    """Of eight workers after 60 rounds of 10 steps on a noisy quadratic in 50 dimensions."""
    noise = np.random.default_rng(0).normal(size=(8, 600, 50)).astype(np.float32)
    curvature = jnp.logspace(-2, 0, 50)
    tx = co2(
        optax.sgd(optax.cosine_decay_schedule(0.3, 600)),
        sync_every=10,
        axis_name=AXIS,
        momentum=momentum,
        penalty=lambda *lengths: jnp.where(penalised, relative_movement(*lengths), 1.0),
        clip=clip,
    )
    _, state = train_fleet(tx, lambda x, n: curvature * x + n, noise, jnp.ones(50))
    return 0.5 * jnp.sum(curvature * state.outer_params**2)


def test_penalty_and_clip_are_needed_when_the_outer_momentum_is_large_and_not_when_it_is_none():
    """The size of a good answer here is that of no momentum and no device."""
    none = 1e30
    plain = loss(0.0, False, none)
    assert loss(0.0, True, none) < 1.2 * plain
    assert loss(0.5, False, none) > 100 * plain
    assert loss(0.5, True, none) < 2 * plain
    assert loss(0.5, False, 0.1) < 2 * plain
    assert loss(0.8, True, none) > 100 * plain
    assert loss(0.8, True, 0.1) < loss(0.8, False, 0.1) < 5 * plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate must be in \[0, inf\), got -1"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0\.1"),
        ({"inner_rate": 0.0}, r"inner_rate must be in \(0, inf\), got 0\.0"),
        ({"clip": 0.0}, r"clip must be in \(0, inf\), got 0\.0"),
        ({"sync_every": 0}, "sync_every must be an int of at least 1, got 0"),
        ({"inner_state": "forget"}, "inner_state must be one of.*'forget'"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        co2(optax.sgd(1.0), **{"axis_name": AXIS, "sync_every": 2} | arguments)


def test_refuses_a_penalty_that_is_no_function():
    with pytest.raises(TypeError, match=r"penalty must be a function .* or None, got 2\.0"):
        co2(optax.sgd(1.0), axis_name=AXIS, sync_every=2, penalty=2.0)


@pytest.mark.parametrize("mesh", [None, {"worker": 2}])
def test_refuses_a_mean_that_does_not_communicate(mesh):
    """Which shows a round late."""
    tx = co2(optax.sgd(0.1), sync_every=1, axis_name=AXIS, mean=optax.identity())
    mesh = mesh and parallel.make_mesh(mesh)
    fleet = {"workers": 2} if mesh is None else {}
    loss = lambda params, x: jnp.mean(params * x)
    step = parallel.make_train_step(loss, tx, mesh, worker_axis=AXIS, **fleet)
    with pytest.raises(ValueError, match="the outer parameters would drift apart"):
        step.init(jnp.ones(3))


def test_refuses_it_under_a_plain_vmap_too():
    """Where there are no types, in the very first step."""
    tx = co2(optax.sgd(0.1), sync_every=1, axis_name=AXIS, mean=optax.identity())
    worker = lambda g: tx.update(g, tx.init(jnp.ones(3)), jnp.ones(3))[0]
    with pytest.raises(ValueError, match="the outer parameters would drift apart"):
        jax.vmap(worker, axis_name=AXIS)(jnp.ones((2, 3)))
