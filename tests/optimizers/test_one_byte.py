"""Facts about one_byte: the byte, the estimate by hand, coming and going, what is on the wire."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_suite import core
from jaxopt_suite.core.varying import vary
from jaxopt_suite.optimizers.one_byte import decode, encode, one_byte, scale_by_one_byte
from jaxopt_suite.parallel import make_mesh, run_workers, wire

AXIS = "worker"
ABSENT, ZERO = 255, 127
SMALLEST, LARGEST = np.exp(-63 / 8), np.exp(63 / 8)
# Half a step of the logarithm, and float32's logarithm and exponential.
ERROR = np.expm1(1 / 16) + 1e-5


# The byte.


def test_magnitudes_in_range_keep_their_sign_and_are_right_to_half_a_step():
    magnitude = np.geomspace(SMALLEST * 1.001, LARGEST * 0.999, 5000).astype(np.float32)
    for numbers in (magnitude, -magnitude):
        found = np.asarray(decode(encode(jnp.asarray(numbers))))
        assert np.max(np.abs(found / numbers - 1)) < ERROR
        assert np.max(np.abs(found / numbers - 1)) > 0.06  # the bound is reached


def test_every_number_that_a_byte_stands_for_has_that_byte():
    codes = jnp.arange(255, dtype=jnp.uint8)
    numbers = decode(codes)
    assert len(np.unique(np.asarray(numbers))) == 255
    np.testing.assert_array_equal(encode(numbers), codes)
    np.testing.assert_array_equal(np.diff(np.asarray(numbers)) > 0, True)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0.0, 0.0),
        (-0.0, 0.0),
        (1e-30, 0.0),
        (0.49 * SMALLEST, 0.0),
        (-0.51 * SMALLEST, -SMALLEST),
        (1e30, LARGEST),
        (-1e30, -LARGEST),
        (1.0, 1.0),
    ],
)
def test_numbers_out_of_range_become_the_nearest_in_it(number, expected):
    np.testing.assert_allclose(decode(encode(jnp.float32(number))), expected, rtol=1e-6)


def test_what_is_not_finite_or_not_active_is_absent_and_counts_nothing():
    numbers = jnp.array([np.nan, np.inf, -np.inf, 0.0, 2.0], jnp.float32)
    np.testing.assert_array_equal(encode(numbers) == ABSENT, [True, True, True, False, False])
    np.testing.assert_array_equal(encode(numbers, active=False), ABSENT)
    assert encode(numbers).dtype == jnp.uint8
    assert int(encode(numbers)[3]) == ZERO
    assert float(decode(jnp.uint8(ABSENT))) == 0.0


# The estimate.


def loss_of(target):
    """A quadratic: its differences of losses are exact slopes."""
    return lambda x: jnp.sum((x["w"] - target) ** 2) + 3.0 * x["b"]


PARAMS = {"w": jnp.array([[0.5, -1.0, 2.0], [0.0, 1.0, -0.5]]), "b": jnp.array(0.3)}
TARGETS = jnp.arange(24.0).reshape(4, 2, 3) / 8 - 1.0


def fleet_step(tx, active=(True,) * 4, *, mesh=None, steps=1, params=PARAMS, loss=loss_of):
    """Updates [steps, ...], equal on all workers, from parameters that stay."""

    def worker(target, active):
        def step(state, _):
            value_fn = loss(target)
            updates, state = tx.update(params, state, params, value_fn=value_fn, active=active)
            return state, updates

        return jax.lax.scan(step, tx.init(params), length=steps)

    fleet = run_workers(worker, axis_name=AXIS, mesh=mesh)
    state, updates = jax.jit(fleet)(TARGETS, jnp.asarray(active))
    assert all(x.shape == () for x in jax.tree.leaves(state))  # counters, equal on all workers
    return jax.tree.map(np.asarray, updates)


def direction(seed, count, worker, sample):
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(PARAMS)]
    keys = dict(
        zip(sorted(PARAMS), core.leaf_keys(seed, paths, count, worker, sample), strict=True)
    )
    draw = lambda name: np.asarray(jax.random.normal(keys[name], PARAMS[name].shape), np.float64)
    return {name: draw(name) for name in PARAMS}


def by_hand(*, samples, seed, count=0, present=(0, 1, 2, 3)):
    total = {name: np.zeros(np.shape(x)) for name, x in PARAMS.items()}
    for worker in present:
        w = np.asarray(PARAMS["w"] - TARGETS[worker], np.float64)
        for sample in range(samples):
            z = direction(seed, count, worker, sample)
            rho = float(decode(encode(jnp.float32(np.sum(2 * w * z["w"]) + 3.0 * z["b"]))))
            for name in total:
                total[name] += rho * z[name] / (len(present) * samples)
    return total


# A difference of float32 losses near 20, over 2e-2, is right to 1e-4; a byte hides most of that.
PERTURBATION = 1e-2


@pytest.mark.parametrize("samples", [1, 3])
def test_equals_the_sum_over_all_workers_samples_by_hand(samples):
    tx = scale_by_one_byte(axis_name=AXIS, samples=samples, seed=5, perturbation=PERTURBATION)
    found = fleet_step(tx, steps=3)
    for count in range(3):
        expected = by_hand(samples=samples, seed=5, count=count)
        for name in PARAMS:
            # float32 sums of ten terms
            np.testing.assert_allclose(found[name][count], expected[name], rtol=1e-5, atol=1e-5)


def test_its_mean_over_many_directions_is_the_gradient_of_the_mean_loss():
    tx = scale_by_one_byte(axis_name=AXIS, samples=250, perturbation=PERTURBATION)
    found = fleet_step(tx, steps=4)  # 4000 directions
    mean_loss = lambda x: jnp.mean(jax.vmap(lambda t: loss_of(t)(x))(TARGETS))
    gradient = jax.grad(mean_loss)(PARAMS)
    norm = float(optax.tree.norm(gradient))
    for name in PARAMS:
        # An entry's variance over directions is about twice the squared norm: four errors of it.
        error = 4 * norm * np.sqrt(2 / 4000)
        np.testing.assert_allclose(found[name].mean(0), gradient[name], atol=error)


def test_bytes_train_as_well_as_full_numbers():
    """Logistic regression by four machines that come and go in turn, fifty steps each time."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=8)
    inputs = rng.normal(size=(4, 64, 8)).astype(np.float32)
    labels = (inputs @ truth + 0.5 * rng.normal(size=(4, 64)) > 0).astype(np.float32)
    steps, samples = 400, 4
    away = (np.arange(steps) // 50) % 4  # one machine after the other
    active = jnp.asarray(np.arange(4)[:, None] != away[None])

    def loss(x, data):
        logits = data[0] @ x
        return jnp.mean(jnp.logaddexp(0.0, logits) - data[1] * logits)

    def full_numbers(x, data, active, count):
        """The same without the byte."""
        keys = lambda i: core.leaf_keys(0, [()], count, jax.lax.axis_index(AXIS), i)[0]
        z = jnp.stack([jax.random.normal(keys(i), x.shape) for i in range(samples)])
        rho = jax.vmap(lambda z: (loss(x + 1e-2 * z, data) - loss(x - 1e-2 * z, data)) / 2e-2)(z)
        total = jax.lax.psum(active * jnp.sum(rho[:, None] * z, 0), AXIS)
        return -0.1 * total / (samples * jax.lax.psum(active.astype(jnp.float32), AXIS))

    tx = one_byte(0.1, axis_name=AXIS, samples=samples, perturbation=1e-2)

    def train(in_bytes):
        def worker(data, active):
            def step(carry, here):
                x, state = carry
                now, count = here
                if in_bytes:
                    value_fn = lambda x: loss(x, data)
                    updates, state = tx.update(x, state, x, value_fn=value_fn, active=now)
                else:
                    updates = full_numbers(x, data, now, count)
                return (optax.apply_updates(x, updates), state), None

            x = jnp.zeros(8)
            return jax.lax.scan(step, (x, tx.init(x)), (active, jnp.arange(steps)))[0][0]

        fleet = run_workers(worker, axis_name=AXIS)
        x = jax.jit(fleet)((jnp.asarray(inputs), jnp.asarray(labels)), active)
        return float(np.mean([loss(x, (i, y)) for i, y in zip(inputs, labels, strict=True)]))

    with_bytes, exact = train(True), train(False)
    assert exact < 0.35  # log 2 = 0.69 at the start
    assert abs(with_bytes / exact - 1) < 0.01


# Coming and going.


def test_a_worker_that_is_not_active_is_left_out_of_every_mean():
    tx = scale_by_one_byte(axis_name=AXIS, samples=2, perturbation=PERTURBATION)
    found = fleet_step(tx, (True, False, True, True))
    expected = by_hand(samples=2, seed=0, present=(0, 2, 3))
    for name in PARAMS:
        np.testing.assert_allclose(found[name][0], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_worker_whose_loss_is_not_finite_is_left_out_too(value):
    tx = scale_by_one_byte(axis_name=AXIS, samples=2, perturbation=PERTURBATION)
    spoilt = lambda target: (
        lambda x: jnp.where(target[0, 0] == TARGETS[2, 0, 0], value, 0.0) + (loss_of(target)(x))
    )
    found = fleet_step(tx, loss=spoilt)
    expected = by_hand(samples=2, seed=0, present=(0, 1, 3))
    for name in PARAMS:
        np.testing.assert_allclose(found[name][0], expected[name], rtol=1e-5, atol=1e-5)


def test_with_nobody_there_nothing_moves():
    tx = scale_by_one_byte(axis_name=AXIS)
    found = fleet_step(tx, (False,) * 4)
    assert not any(x.any() for x in found.values())


def test_a_flat_loss_gives_a_zero_update_and_not_the_smallest_number():
    flat = lambda target: lambda x: 0.0 * jnp.sum(x["w"] * target)
    found = fleet_step(scale_by_one_byte(axis_name=AXIS, samples=2), loss=flat)
    assert not any(x.any() for x in found.values())


# Substrates and programs.


def test_a_fleet_and_four_devices_agree_and_devices_hold_the_same_bits():
    mesh = make_mesh({AXIS: 4}, devices=jax.devices()[:4])
    tx = one_byte(0.02, axis_name=AXIS, samples=2, perturbation=PERTURBATION)

    def worker(target):
        def step(carry, count):
            x, state = carry
            active = (count + jax.lax.axis_index(AXIS)) % 3 != 0
            here = {"value_fn": loss_of(target), "active": active}
            updates, state = tx.update(x, state, x, **here)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), jnp.arange(30))[0][0]

    fleet = run_workers(worker, axis_name=AXIS)(TARGETS)
    found = run_workers(worker, axis_name=AXIS, mesh=mesh)(TARGETS)
    for name in PARAMS:
        copies = [np.asarray(shard.data) for shard in found[name].addressable_shards]
        assert all(np.array_equal(copies[0], copy) for copy in copies)
        # Losses round otherwise in a batch; only one at the edge of two bytes can show.
        np.testing.assert_allclose(fleet[name], copies[0], rtol=1e-5, atol=1e-6)
    assert np.max(np.abs(copies[0] - PARAMS[name])) > 0.1  # it moved


def test_a_step_sends_a_byte_a_sample_in_one_all_gather_and_nothing_else():
    mesh = make_mesh({AXIS: 8})
    tx = one_byte(0.02, axis_name=AXIS, samples=5)
    params = jnp.ones((16, 16))

    def worker(target):
        value_fn = lambda x: jnp.sum((x - target) ** 2)
        return tx.update(params, tx.init(params), params, value_fn=value_fn)[0]

    targets = jnp.zeros((8, 16, 16))
    compiled = jax.jit(run_workers(worker, axis_name=AXIS, mesh=mesh)).lower(targets).compile()
    (found,) = wire.collectives(compiled, mesh)
    assert (found.kind, found.dtype, found.payload, found.times) == ("all-gather", "u8", 8 * 5, 1)
    assert wire.bytes_sent(compiled) == 7 * 5


def test_bfloat16_parameters_are_perturbed_in_float32():
    params = {"w": PARAMS["w"].astype(jnp.bfloat16), "b": PARAMS["b"].astype(jnp.bfloat16)}
    tx = scale_by_one_byte(axis_name=AXIS, perturbation=1e-3)
    seen = []

    def loss(target):
        def value_fn(x):
            seen.extend(leaf.dtype for leaf in jax.tree.leaves(x))
            return loss_of(target)(x)

        return value_fn

    narrow = fleet_step(tx, params=params, loss=loss)
    assert set(seen) == {jnp.dtype(jnp.float32)}
    wide = fleet_step(tx, params=jax.tree.map(lambda x: x.astype(jnp.float32), params))
    for name in PARAMS:
        assert narrow[name].dtype == jnp.bfloat16
        # One rounding to eight bits.
        np.testing.assert_allclose(
            narrow[name].astype(np.float32), wide[name], rtol=2**-8, atol=1e-6
        )


def test_local_losses_on_a_mesh_may_be_of_parameters_typed_as_varying():
    tx = scale_by_one_byte(axis_name=AXIS, perturbation=PERTURBATION)
    typed = lambda target: lambda x: loss_of(target)(vary(x, AXIS))
    mesh = make_mesh({AXIS: 4}, devices=jax.devices()[:4])
    plain, other = fleet_step(tx, mesh=mesh), fleet_step(tx, mesh=mesh, loss=typed)
    jax.tree.map(np.testing.assert_array_equal, plain, other)


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must be an int of at least 1, got 0"),
        ({"perturbation": 0.0}, r"perturbation must be in \(0, inf\), got 0"),
        ({"seed": -1}, "seed must be an int of at least 0, got -1"),
        ({"learning_rate": -1.0}, r"learning_rate must be in \[0, inf\), got -1"),
        ({"weight_decay": -1.0}, r"weight_decay must be in \[0, inf\), got -1"),
    ],
)
def test_bad_arguments_are_refused_by_name_value_and_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        one_byte(**{"learning_rate": 0.1, "axis_name": AXIS} | arguments)


def test_what_update_needs_is_asked_for():
    tx, x = one_byte(0.1, axis_name=AXIS), jnp.ones(3)
    state, loss = tx.init(x), jnp.sum
    bound = lambda fn: jax.vmap(fn, axis_name=AXIS)(jnp.zeros(2))
    with pytest.raises(ValueError, match="one_byte communicates over axis_name='worker'"):
        tx.update(x, state, x, value_fn=loss)
    with pytest.raises(TypeError, match="value_fn"):
        bound(lambda _: tx.update(x, state, x)[0])
    with pytest.raises(ValueError, match="give params to update"):
        bound(lambda _: tx.update(x, state, value_fn=loss)[0])
    with pytest.raises(ValueError, match=r"value_fn must return a scalar, got shape \(3,\)"):
        bound(lambda _: tx.update(x, state, x, value_fn=lambda x: x)[0])
    with pytest.raises(TypeError, match="real floating-point parameters, got int32"):
        tx.init(jnp.ones(2, jnp.int32))


def test_weight_decay_is_decoupled():
    tx = one_byte(0.1, 0.5, axis_name=AXIS)
    found = fleet_step(tx, (False,) * 4)
    np.testing.assert_allclose(found["w"][0], -0.1 * 0.5 * PARAMS["w"], rtol=1e-6)  # one product
