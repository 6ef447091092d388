"""Facts about error feedback: the equations, what is conserved, where which rule converges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fleets import normal, run_fleet

from jaxopt_suite import parallel
from jaxopt_suite.optimizers.compression import compressors, feedback
from jaxopt_suite.optimizers.compression.mean import compressed_mean

ROUNDING = {
    "rtol": 1e-5,
    "atol": 1e-5,
}  # a dozen sums of numbers up to ten, float32 against float64

never = lambda path, leaf: False


def link(compressor, rule, exchange="gather"):
    return compressed_mean(
        compressor, axis_name="worker", feedback=rule, exchange=exchange, dense=never
    )


def top(k, x):
    kept = np.zeros_like(x)
    largest = np.argsort(-np.abs(x))[:k]
    kept[largest] = x[largest]
    return kept


def by_hand(rule, inputs, *, k, eta=0.1, b=0.3):
    """The equations of the papers, worker by worker, in float64."""
    workers, steps, size = inputs.shape
    e, h, v = (np.zeros((workers, size)) for _ in range(3))
    estimate, updates = np.zeros(size), []
    for t in range(steps):
        sent = np.zeros((workers, size))
        for w in range(workers):
            x = inputs[w, t].astype(np.float64)
            if rule == "ef":
                sent[w] = top(k, x + e[w])
                e[w] += x - sent[w]
            elif rule == "econtrol":
                sent[w] = top(k, eta * e[w] + x - h[w])
                e[w] += x - h[w] - sent[w]
                h[w] += sent[w]
            else:
                v[w] = x if rule == "ef21" else (1 - b) * v[w] + b * x
                sent[w] = top(k, v[w] - h[w])
                h[w] += sent[w]
        estimate = estimate * (rule != "ef") + sent.mean(0)
        updates.append(estimate)
    return np.array(updates), {"e": e, "h": h, "v": v, "estimate": estimate}


@pytest.mark.parametrize(
    ("name", "rule", "local"),
    [
        ("ef", feedback.ef(), "e"),
        ("ef21", feedback.ef21(), "h"),
        ("econtrol", feedback.econtrol(0.1), "eh"),
        ("momentum", feedback.momentum(0.3), "vh"),
    ],
)
def test_updates_and_memories_are_those_of_the_papers_equations(name, rule, local):
    inputs = normal({"x": (30,)}, steps=12)
    updates, state = run_fleet(link(compressors.top_k(4), rule), inputs)
    expected, memory = by_hand(name, inputs["x"], k=4)
    np.testing.assert_allclose(updates["x"], expected, **ROUNDING)
    assert len(state.local) == len(local)
    for tree, letter in zip(state.local, local, strict=True):
        np.testing.assert_allclose(tree["x"], memory[letter], **ROUNDING)
    for tree in state.shared:
        np.testing.assert_allclose(tree["x"], memory["estimate"], **ROUNDING)


@pytest.mark.parametrize(
    ("compressor", "exchange"),
    [
        (compressors.top_k(4), "gather"),
        (compressors.sign(), "two_phase"),
        (compressors.int4(8), "two_phase"),
        (compressors.random_k(6), "mean"),
    ],
)
def test_error_feedback_loses_nothing_in_any_exchange(compressor, exchange):
    inputs = normal({"x": (5, 18)}, steps=10)
    updates, state = run_fleet(link(compressor, feedback.ef(), exchange), inputs)
    given = inputs["x"].astype(np.float64).mean(0).sum(0)
    kept = np.asarray(state.local[0]["x"], np.float64).mean(0)
    arrived = np.asarray(updates["x"], np.float64).sum(0)
    assert np.linalg.norm(arrived - given) > 0.1  # there is something to remember
    np.testing.assert_allclose(arrived + kept, given, rtol=1e-5, atol=1e-5)  # sums of 10 in float32


@pytest.mark.parametrize(
    ("rule", "exchange"),
    [
        (feedback.ef21(), "gather"),
        (feedback.ef21(), "two_phase"),
        (feedback.econtrol(0.1), "two_phase"),
        (feedback.momentum(0.5), "two_phase"),
    ],
)
def test_the_shared_estimate_stays_the_mean_of_the_workers_own(rule, exchange):
    inputs = normal({"x": (5, 18)}, steps=10)
    _, state = run_fleet(link(compressors.sign(), rule, exchange), inputs)
    own = np.asarray(state.local[-1]["x"], np.float64).mean(0)
    np.testing.assert_allclose(state.shared[0]["x"], own, rtol=1e-5, atol=1e-5)  # sums of 10 steps


def descend(tx, gradient, x, *, rate, steps, workers):
    """The squared norms of the mean gradient along gradient descent with a fixed rate."""

    def worker(index, x):
        def step(carry, key):
            x, state = carry
            g = gradient(index, x, key)
            update, state = tx.update(g, state)
            return (x - rate * update, state), jnp.sum(
                jax.lax.pmean(gradient(index, x), "worker") ** 2
            )

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (x, tx.init(x)), keys)[1]

    run = parallel.run_workers(worker, axis_name="worker", in_axes=(0, None))
    return np.asarray(jax.jit(run)(jnp.arange(workers), x))


@pytest.mark.parametrize(
    ("rule", "converges"),
    [
        (feedback.none(), False),
        (feedback.ef(), True),
        (feedback.ef21(), True),
        (feedback.econtrol(0.1), True),
    ],
)
def test_top_1_diverges_on_three_quadratics_unless_something_is_fed_back(rule, converges):
    # Beznosikov et al.: f_w(x) = <a_w, x>^2 + |x|^2 / 4 from (1, 1, 1); without memory the iterate
    # is multiplied by 1 + 11/6 of the rate at every step.
    a = jnp.array([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])
    gradient = lambda w, x, key=None: 2 * a[w] * jnp.dot(a[w], x) + x / 2
    norms = descend(
        link(compressors.top_k(1), rule), gradient, jnp.ones(3), rate=0.01, steps=1500, workers=3
    )
    if converges:
        assert norms[-1] < 1e-3 * norms[0]
    else:
        assert norms[-1] > 1e15 * norms[0]


@functools.cache
def floor(name, *, noise=0.0):
    """Where a rule ends up on quadratics whose minimisers are far apart, with top 10%."""
    rules = {
        "ef": feedback.ef(),
        "ef21": feedback.ef21(),
        "econtrol": feedback.econtrol(0.1),
        "momentum": feedback.momentum(0.1),
    }
    workers, size = 10, 40
    w = np.arange(1, workers + 1)
    a = jnp.asarray(w / np.sqrt(workers), jnp.float32)
    spread = np.random.default_rng(0).normal(size=(workers, size)) * (100 / w)[:, None]
    b = jnp.asarray(spread, jnp.float32)

    def gradient(w, x, key=None):
        g = a[w] * (a[w] * x - b[w])
        if key is None:
            return g
        own = jax.random.fold_in(key, w)
        return g + noise / np.sqrt(size) * jax.random.normal(own, (size,))

    norms = descend(
        link(compressors.top_k(fraction=0.1), rules[name]),
        gradient,
        jnp.zeros(size),
        rate=1 / 256,
        steps=2500,
        workers=workers,
    )
    return norms[-200:].mean() / norms[0]


def test_different_workers_stall_error_feedback_but_not_ef21_and_econtrol():
    assert floor("ef") > 1e-7
    # As far down as float32 gets: the gradients of single workers do not vanish.
    assert floor("ef21") < 1e-3 * floor("ef")
    assert floor("econtrol") < 1e-3 * floor("ef")


@pytest.mark.slow
def test_gradient_noise_hurts_ef21_more_than_econtrol_and_momentum():
    noise = 10.0
    assert floor("ef21", noise=noise) > 2 * floor("econtrol", noise=noise)
    assert floor("ef21", noise=noise) > 2 * floor("momentum", noise=noise)


def test_econtrol_that_feeds_nothing_back_is_ef21():
    inputs = normal({"x": (30,)}, steps=8)
    ours, _ = run_fleet(link(compressors.top_k(4), feedback.econtrol(0.0)), inputs)
    other, _ = run_fleet(link(compressors.top_k(4), feedback.ef21()), inputs)
    np.testing.assert_array_equal(ours["x"], other["x"])


def test_momentum_averages_leaves_that_are_not_compressed_too():
    inputs = normal({"x": (30,)}, steps=6)
    tx = compressed_mean(
        compressors.sign(),
        axis_name="worker",
        feedback=feedback.momentum(0.25),
        dense=lambda path, leaf: True,
    )
    updates, _ = run_fleet(tx, inputs)
    mean = np.zeros(30)
    for t in range(6):
        mean = 0.75 * mean + 0.25 * inputs["x"][:, t].mean(0)
    np.testing.assert_allclose(updates["x"][-1], mean, **ROUNDING)


def test_bad_arguments_are_refused_by_name_value_and_range():
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 1.5"):
        feedback.econtrol(1.5)
    with pytest.raises(ValueError, match=r"b must be in \(0, 1\], got 0.0"):
        feedback.momentum(0.0)


def test_a_rule_writes_itself_as_it_is_called():
    assert feedback.momentum(0.1, feedback.econtrol(0.5)).name == "momentum(0.1, econtrol(0.5))"
