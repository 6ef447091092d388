"""SAVIC: rounds worked out by hand, its limit, whose scaling is biased, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fleets import train_fleet

from jaxopt_suite import parallel
from jaxopt_suite.optimizers import diloco, mean_over_workers, savic

AXIS = "worker"
CURVATURE = np.array([[1.0, 3.0], [2.0, 0.5]])
CENTRE = np.array([[0.5, 1.0], [-1.0, 2.0]])
START = np.array([1.0, -2.0])
RATE, B2, FLOOR, EVERY, ROUNDS = 0.05, 0.8, 2.5, 2, 3


def quadratic(x, given):
    return given[0] * (x - given[1])


def by_hand(rule, scaling):
    """Parameters of worker 0 at the end of each round, and how often the floor was in force."""
    x, d, expected, floored = np.tile(START, (2, 1)), np.zeros((2, 2)), [], 0
    for k in range(ROUNDS):
        h = CURVATURE.copy() if rule == "oasis" else CURVATURE * (x - CENTRE)
        if scaling == "global":
            h = np.tile(h.mean(0), (2, 1))
        beta = {"adam": B2 * (1 - B2**k) / (1 - B2 ** (k + 1))}.get(rule, B2 if k else 0.0)
        d = beta * d + (1 - beta) * (h if rule == "oasis" else h**2)
        size = np.abs(d) if rule == "oasis" else np.sqrt(d)
        floored += int((size < FLOOR).sum())
        for _ in range(EVERY):
            x = x - RATE * CURVATURE * (x - CENTRE) / np.maximum(size, FLOOR)
        x = np.tile(x.mean(0), (2, 1))
        expected.append(x[0])
    return np.stack(expected), d, floored


class WithCurvature:
    """``savic`` with the estimate of the Hessian's diagonal that a training loop would give it."""

    def __init__(self, tx, curvature):
        self.init, self.tx, self.curvature = tx.init, tx, curvature

    def update(self, updates, state, params):
        own = lambda: jnp.asarray(self.curvature, params.dtype)[jax.lax.axis_index(AXIS)]
        return self.tx.update(updates, state, params, curvature=own)


@pytest.mark.parametrize(
    ("rule", "scaling"),
    [("adam", "global"), ("adam", "local"), ("rmsprop", "global"), ("oasis", "global")],
)
def test_rounds_of_two_workers_worked_out_in_float64(rule, scaling):
    expected, d, floored = by_hand(rule, scaling)
    assert rule != "adam" or floored > 0
    with jax.enable_x64(True):
        tx = savic(
            RATE, B2, FLOOR, sync_every=EVERY, axis_name=AXIS, rule=rule, scaling=scaling
        )  # fmt: skip
        tx = WithCurvature(tx, CURVATURE) if rule == "oasis" else tx
        steps = EVERY * ROUNDS
        inputs = (np.repeat(CURVATURE[:, None], steps, 1), np.repeat(CENTRE[:, None], steps, 1))
        found, state = train_fleet(tx, quadratic, inputs, START)
        # Fifteen digits of numbers of size one.
        np.testing.assert_allclose(found[0, EVERY - 1 :: EVERY], expected, rtol=0, atol=1e-14)
        scale = d if scaling == "local" else d[0]
        np.testing.assert_allclose(state.variant.scale, scale, rtol=1e-13)
        assert np.all(np.asarray(state.variant.rounds) == ROUNDS)


def test_with_a_floor_that_no_gradient_reaches_it_is_local_sgd():
    gradients = np.random.default_rng(0).uniform(-1, 1, size=(3, 6, 5)).astype(np.float32)
    start = np.zeros(5, np.float32)
    given = lambda params, x: x
    tx = savic(0.1, floor=1.0, sync_every=3, axis_name=AXIS)
    outer = optax.chain(mean_over_workers(AXIS), optax.sgd(1.0))
    local_sgd = diloco(optax.sgd(0.1), outer, sync_every=3, axis_name=AXIS)
    np.testing.assert_array_equal(
        train_fleet(tx, given, gradients, start)[0],
        train_fleet(local_sgd, given, gradients, start)[0],
    )


_RNG = np.random.default_rng(1)
CURVATURES = np.logspace(-3, 0, 20) * np.exp(0.5 * _RNG.normal(size=(8, 20)))
CENTRES = _RNG.normal(size=(8, 20))


@functools.partial(jax.jit, static_argnames="scaling")
def train_on_quadratics(rate, floor, scaling):
    """Outer parameters of eight workers after 100 rounds of 10 steps."""
    given = tuple(np.repeat(a[:, None], 1000, 1).astype(np.float32) for a in (CURVATURES, CENTRES))
    tx = savic(rate, 0.99, floor, sync_every=10, axis_name=AXIS, rule="oasis", scaling=scaling)
    tx = WithCurvature(tx, CURVATURES)
    return train_fleet(tx, quadratic, given, np.zeros(20, np.float32))[1].outer_params


def excess_loss(rate, floor, scaling="global"):
    loss = lambda x: 0.5 * (CURVATURES * (x - CENTRES) ** 2).sum(1).mean()
    best = (CURVATURES * CENTRES).mean(0) / CURVATURES.mean(0)
    return loss(np.asarray(train_on_quadratics(rate, floor, scaling))) - loss(best)


def test_one_scale_for_all_helps_and_one_for_each_finds_another_point():
    """Beside unscaled steps at their best rate, which a scale of a million everywhere makes."""
    unscaled = min(excess_loss(1e6 * rate, 1e6) for rate in (0.03, 0.1))
    assert excess_loss(0.01, 1e-3) < 0.2 * unscaled
    assert excess_loss(0.01, 1e-3, scaling="local") > 5 * unscaled


def test_the_scale_is_equal_on_all_workers_or_each_ones_own():
    def axes(scaling):
        tx = savic(0.1, sync_every=2, axis_name=AXIS, scaling=scaling)
        step = parallel.make_train_step(
            lambda p, x: jnp.mean(p * x), tx, worker_axis=AXIS, workers=4
        )
        return step.layout(jax.ShapeDtypeStruct((), jnp.float32)).axes.opt_state.variant.scale

    assert axes("global") is None
    assert axes("local") == 0


@pytest.mark.parametrize(
    ("scaling", "scale", "end"), [("global", [4.0], -2.0), ("local", [[0.0], [4.0]], -201.0)]
)
def test_who_is_absent_when_a_round_begins_has_no_part_in_its_scale(scaling, scale, end):
    gradients = np.broadcast_to(np.array([[[4.0]], [[2.0]]], np.float32), (2, 2, 1))
    active = np.array([[0.0, 1.0], [1.0, 1.0]])
    tx = savic(1.0, floor=0.01, sync_every=2, axis_name=AXIS, scaling=scaling)
    _, state = train_fleet(tx, lambda p, x: x, gradients, np.zeros(1, np.float32), active=active)
    np.testing.assert_array_equal(state.variant.scale, scale)
    # Worker 1 takes two steps of 2 / 2; worker 0 one of 4 / 2 or, on its own, of 4 / floor.
    np.testing.assert_allclose(state.outer_params, [end], rtol=1e-6)


def test_a_round_that_nobody_begins_leaves_the_scale_as_it_is():
    active = np.array([[0.0, 1.0], [0.0, 1.0]])
    tx = savic(1.0, floor=0.5, sync_every=2, axis_name=AXIS)
    start, gradients = np.zeros(1, np.float32), np.ones((2, 2, 1), np.float32)
    _, state = train_fleet(tx, lambda p, x: x, gradients, start, active=active)
    assert int(state.variant.rounds) == 0
    assert float(state.outer_params[0]) == -2.0


def test_an_estimate_that_is_not_finite_is_not_taken_in():
    gradients = np.ones((2, 4, 1), np.float32)
    gradients[0, 0] = np.nan
    for scaling, expected in (("global", [1.0]), ("local", [[1.0], [1.0]])):
        tx = savic(0.1, sync_every=2, axis_name=AXIS, scaling=scaling)
        _, state = train_fleet(tx, lambda p, x: x, gradients, np.zeros(1, np.float32))
        np.testing.assert_array_equal(state.variant.scale, expected)
        assert np.isfinite(state.outer_params).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -1.0}, r"learning_rate must be in \[0, inf\), got -1"),
        ({"b2": 1.0}, r"b2 must be in \[0, 1\), got 1\.0"),
        ({"floor": 0.0}, r"floor must be in \(0, inf\), got 0\.0"),
        ({"sync_every": 0}, "sync_every must be an int of at least 1, got 0"),
        ({"rule": "adagrad"}, "rule must be one of 'adam', 'rmsprop', 'oasis', got 'adagrad'"),
        ({"scaling": "none"}, "scaling must be one of 'global', 'local', got 'none'"),
        ({"rejoin": "copy"}, "rejoin must be one of.*'copy'"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        savic(**{"learning_rate": 0.1, "axis_name": AXIS, "sync_every": 2} | arguments)


def test_update_asks_for_its_axis_and_for_the_curvature_that_a_rule_needs():
    tx = savic(0.1, sync_every=2, axis_name=AXIS, rule="oasis")
    state = tx.init(jnp.ones(3))
    with pytest.raises(ValueError, match="savic communicates over axis_name='worker'"):
        tx.update(jnp.ones(3), state, jnp.ones(3))
    with pytest.raises(ValueError, match="rule 'oasis' needs curvature"):
        train_fleet(tx, lambda p, x: x, np.ones((2, 2, 3), np.float32), np.ones(3, np.float32))
