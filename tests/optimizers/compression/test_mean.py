"""Facts about the link: exact limits, bad numbers, dtypes, wrappers, PowerSGD, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fleets import WORKERS, normal, relative_difference, run_fleet
from jax.sharding import PartitionSpec as P

from jaxopt_suite import parallel
from jaxopt_suite.optimizers.compression import compressors, feedback
from jaxopt_suite.optimizers.compression.mean import compressed_mean, default_dense

SHAPES = {"matrix": (12, 20), "vector": (7,)}

small = lambda path, leaf: leaf.size < 100


def link(compressor, **settings):
    return compressed_mean(compressor, **({"axis_name": "worker", "dense": small} | settings))


def mean_of(inputs):
    return jax.tree.map(lambda x: x.astype(np.float64).mean(0), inputs)


def test_the_identity_is_the_plain_mean_to_the_bit():
    inputs = normal(SHAPES, steps=3)
    plain = optax.stateless(lambda u, _: jax.lax.pmean(u, "worker"))
    for mesh in (None, parallel.make_mesh({"worker": WORKERS})):
        ours, _ = run_fleet(link(compressors.identity()), inputs, mesh=mesh)
        other, _ = run_fleet(plain, inputs, mesh=mesh)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)


def test_top_k_of_everything_is_the_mean():
    inputs = normal(SHAPES, steps=2)
    updates, state = run_fleet(link(compressors.top_k(fraction=1.0)), inputs)
    assert relative_difference(updates, mean_of(inputs)) < 1e-6  # float32 against float64
    np.testing.assert_array_equal(state.local[0]["matrix"], 0)


def test_unbiased_compressors_need_no_memory_and_biased_ones_get_error_feedback():
    params = {"matrix": jnp.ones((12, 20))}
    assert link(compressors.ternary()).init(params).local == ()
    assert link(compressors.int8(stochastic=True)).init(params).local == ()
    assert len(link(compressors.sign()).init(params).local) == 1


def test_leaves_that_are_not_compressed_keep_nothing_and_are_exact():
    inputs = normal(SHAPES | {"scalar": (), "empty": (0, 3)}, steps=2)
    updates, state = run_fleet(link(compressors.sign(), feedback=feedback.ef21()), inputs)
    assert [x.shape for x in jax.tree.leaves((state.local, state.shared))] == [
        (WORKERS, 12, 20),
        (12, 20),
    ]
    for name in ("vector", "scalar", "empty"):
        expected = mean_of(inputs)[name]
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5, atol=1e-6)  # eight sums


@pytest.mark.parametrize(
    ("compressor", "shape", "dense"),
    [
        (compressors.sign(), (1023,), True),
        (compressors.sign(), (1024,), False),
        (compressors.int8(), (64, 64), False),
        (compressors.identity(), (64, 64), True),
        (compressors.top_k(fraction=0.5), (64, 64), True),
        (compressors.low_rank(2), (4096,), True),
        (compressors.low_rank(2), (64, 64), False),
        (compressors.low_rank(16), (64, 64), True),
    ],
)
def test_by_default_small_leaves_and_payloads_above_half_are_not_compressed(
    compressor, shape, dense
):
    assert default_dense(compressor)((), jax.ShapeDtypeStruct(shape, jnp.float32)) == dense


@pytest.mark.parametrize(
    ("compressor", "settings", "bad"),
    [
        (compressors.sign(), {}, np.nan),
        (compressors.top_k(9), {"feedback": feedback.econtrol(0.1)}, np.inf),
        (compressors.low_rank(2), {}, np.nan),
    ],
)
def test_a_bad_number_spoils_its_step_for_all_and_no_memory(compressor, settings, bad):
    inputs = normal(SHAPES, steps=4)
    spoilt = jax.tree.map(np.copy, inputs)
    spoilt["matrix"][3, 2, 5, 5] = bad  # worker 3, step 2
    tx = link(compressor, **settings)
    good = np.array([0, 1, 3])
    updates, state = run_fleet(tx, spoilt)
    expected, memory = run_fleet(tx, jax.tree.map(lambda x: x[:, good], inputs))
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert np.isnan(a[2]).all()  # also in the leaf that had nothing bad
        np.testing.assert_array_equal(a[good], b)
    for a, b in zip(jax.tree.leaves(state[1:]), jax.tree.leaves(memory[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_sum_that_overflows_inside_a_compressor_does_not_reach_the_memory():
    inputs = {"matrix": np.full((2, 2, 12, 20), 1e38, np.float32)}
    inputs["matrix"][:, 1] = 1.0
    updates, state = run_fleet(link(compressors.sign()), inputs)
    assert np.isnan(updates["matrix"][0]).all()  # the mean magnitude is beyond float32
    np.testing.assert_allclose(updates["matrix"][1], 1.0, rtol=1e-6)
    assert np.isfinite(state.local[0]["matrix"]).all()


def test_bfloat16_updates_keep_their_dtype_and_are_summed_in_float32():
    inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), normal(SHAPES, steps=3))
    updates, state = run_fleet(link(compressors.int8(16)), inputs)
    wide = jax.tree.map(lambda x: x.astype(np.float32), inputs)
    expected, _ = run_fleet(link(compressors.int8(16)), wide)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}
    assert state.local[0]["matrix"].dtype == jnp.float32
    assert relative_difference(updates, expected) < 2**-8  # one rounding of the result


def test_zeros_stay_zeros():
    inputs = jax.tree.map(np.zeros_like, normal(SHAPES, steps=2))
    for compressor in (compressors.sign(), compressors.int8(16), compressors.low_rank(2)):
        updates, state = run_fleet(link(compressor), inputs)
        for leaf in jax.tree.leaves((updates, state.local)):
            np.testing.assert_array_equal(leaf, 0)


def test_randomness_differs_between_workers_steps_and_seeds_and_nothing_else():
    same = {"matrix": np.ones((WORKERS, 2, 12, 20), np.float32)}
    same["matrix"][..., 0, 0] = 4.0  # the scale: other entries are sent with probability 1/4
    tx = lambda seed: link(compressors.ternary(), exchange="gather", seed=seed)
    ours = run_fleet(tx(0), same)[0]["matrix"]
    # Were workers to draw alike, entries would be 0 or 4.
    assert len(np.unique(ours[0])) > 3
    assert not np.array_equal(ours[0], ours[1])
    np.testing.assert_array_equal(ours, run_fleet(tx(0), same)[0]["matrix"])
    assert not np.array_equal(ours, run_fleet(tx(1), same)[0]["matrix"])


# PowerSGD.


def test_enough_rank_gives_the_mean_at_once_and_leaves_no_residual_in_it():
    rng = np.random.default_rng(0)
    left = rng.normal(size=(WORKERS, 1, 12, 2))
    inputs = {"matrix": (left @ rng.normal(size=(2, 20))).astype(np.float32)}
    updates, state = run_fleet(link(compressors.low_rank(2)), inputs)
    assert relative_difference(updates, mean_of(inputs)) < 1e-5  # products of 20 in float32
    residual = np.asarray(state.local[0]["matrix"]).mean(0)
    assert np.abs(residual).max() < 1e-5


def test_a_kept_factor_finds_the_leading_directions_of_a_fixed_matrix():
    rng = np.random.default_rng(0)
    u, s, vt = np.linalg.svd(rng.normal(size=(12, 20)), full_matrices=False)
    s = 0.5 ** np.arange(len(s))
    fixed = ((u * s) @ vt).astype(np.float32)
    inputs = {"matrix": np.broadcast_to(fixed, (2, 15, 12, 20)).copy()}
    updates, _ = run_fleet(link(compressors.low_rank(2), feedback=feedback.none()), inputs)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    assert np.linalg.norm(updates["matrix"][0] - best) > 0.1
    # The second and third singular values are 2 apart: 14 power steps shrink the rest by 4^-14.
    assert np.linalg.norm(updates["matrix"][-1] - best) < 1e-5


def test_a_step_of_zeros_does_not_end_a_factor():
    inputs = normal({"matrix": (12, 20)}, steps=3)
    inputs["matrix"][:, 1] = 0
    updates, state = run_fleet(link(compressors.low_rank(2), feedback=feedback.none()), inputs)
    np.testing.assert_array_equal(updates["matrix"][1], 0)
    assert np.linalg.norm(updates["matrix"][2]) > 1
    assert np.linalg.norm(state.factors[0]["matrix"]) > 1


@pytest.mark.slow
def test_what_a_worker_remembers_does_not_grow_with_its_difference_from_others():
    inputs = normal({"matrix": (12, 20)}, steps=200, workers=4, spread=1.0)
    _, state = run_fleet(link(compressors.low_rank(2)), inputs)
    early = jax.tree.map(lambda x: x[:, :40], inputs)
    _, before = run_fleet(link(compressors.low_rank(2)), early)
    size = lambda state: np.linalg.norm(state.local[0]["matrix"])
    assert size(state) < 2 * size(before)  # the other formula: five times, a spread of 1 per step


# Wrappers, specs, messages.


def wrapped(name):
    tx = link(compressors.sign())
    return {
        "masked": optax.masked(tx, {"matrix": True, "vector": False}),
        "partition": optax.partition(
            {"a": tx, "b": optax.stateless(lambda u, _: jax.lax.pmean(u, "worker"))},
            {"matrix": "a", "vector": "b"},
        ),
        "inject_hyperparams": optax.inject_hyperparams(
            compressed_mean, static_args=("compressor", "axis_name", "seed", "dense", "exchange")
        )(compressors.sign(), axis_name="worker", dense=small),
        "apply_if_finite": optax.chain(tx, optax.apply_if_finite(optax.identity(), 3)),
    }[name]


@pytest.mark.parametrize("name", ["masked", "partition", "inject_hyperparams", "apply_if_finite"])
def test_wrappers_of_optax_change_nothing(name):
    inputs = normal(SHAPES, steps=2)
    expected, _ = run_fleet(link(compressors.sign()), inputs)
    updates, _ = run_fleet(wrapped(name), inputs)
    np.testing.assert_array_equal(updates["matrix"][-1], expected["matrix"][-1])


def test_accumulated_updates_are_compressed_once():
    inputs = normal(SHAPES, steps=2)
    expected, _ = run_fleet(link(compressors.sign()), inputs)
    twice = jax.tree.map(lambda x: np.repeat(x, 2, axis=1), inputs)
    tx = optax.MultiSteps(link(compressors.sign()), 2).gradient_transformation()
    updates, _ = run_fleet(tx, twice)
    np.testing.assert_array_equal(updates["matrix"][0], 0)
    np.testing.assert_allclose(updates["matrix"][1::2], expected["matrix"], rtol=1e-6)  # its mean


def test_abstract_parameters_and_maps_over_parameter_shaped_state_work():
    params = {"matrix": jnp.ones((12, 20)), "vector": jnp.ones(7)}
    tx = link(compressors.low_rank(2), feedback=feedback.econtrol(0.1))
    abstract = jax.eval_shape(tx.init, params)
    state = tx.init(params)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    moved = optax.tree.map_params(tx, lambda x: x + 1, state)
    np.testing.assert_array_equal(moved.local[0]["matrix"], 1)
    assert moved.count == 0


def train(mesh, tx, specs=None, steps=12, least_norm=0.0):
    rng = np.random.default_rng(0)
    shapes = {"up": (16, 32), "down": (32, 16), "bias": (32,)}
    params = {k: (0.2 * rng.normal(size=s)).astype(np.float32) for k, s in shapes.items()}
    x = rng.normal(size=(32, 16)).astype(np.float32)
    y = np.tanh(x @ rng.normal(size=(16, 16))).astype(np.float32)

    def loss(p, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"] - y) ** 2)

    step = parallel.make_train_step(
        loss, tx, parallel.make_mesh(mesh), worker_axis="worker", param_specs=specs
    )
    state, losses = step.init(params), []
    for _ in range(steps):
        state, metrics = step(state, (x, y))
        assert metrics.finite
        assert metrics.grad_norm > least_norm
        losses.append(float(metrics.loss))
    return np.array(losses), state


def test_a_train_step_with_a_data_axis_learns():
    tx = optax.chain(link(compressors.sign()), optax.adam(0.02))
    losses, state = train({"worker": 4, "data": 2}, tx)
    assert losses[-1] < 0.5 * losses[0]
    assert state.params["up"].shape == (16, 32)  # one copy: workers are typed as equal
    assert state.opt_state[0].local[0]["up"].shape == (4, 16, 32)


ROWS = {"up": P("model", None), "down": P("model", None), "bias": P()}
COLUMNS = {"up": P(None, "model"), "down": P("model", None), "bias": P()}


MATRIX_RULES = {"adam": optax.adam(0.02), "muon": optax.contrib.muon(0.02)}


def split_in(parts, compressor, specs, rule="adam", **settings):
    """Twelve losses of a chain with a clip that is active, beside a model axis; and the state."""
    clip = optax.clip_by_global_norm(0.02)
    tx = optax.chain(link(compressor, **settings), clip, MATRIX_RULES[rule])
    return train({"worker": 4, "model": parts}, tx, specs, least_norm=0.04)


@pytest.mark.parametrize(
    ("compressor", "settings", "specs", "rule"),
    [
        # What acts entry by entry, or on blocks that no shard cuts.
        (compressors.int8(16), {"exchange": "gather"}, ROWS, "adam"),
        (compressors.int8(16), {"exchange": "gather"}, ROWS, "muon"),
        pytest.param(compressors.identity(), {}, COLUMNS, "muon", marks=pytest.mark.slow),
        # It sums its factors over the shards.
        pytest.param(compressors.low_rank(2), {}, COLUMNS, "adam", marks=pytest.mark.slow),
    ],
)
def test_a_model_axis_does_not_change_the_losses(compressor, settings, specs, rule):
    one, _ = split_in(1, compressor, specs, rule, **settings)
    two, state = split_in(2, compressor, specs, rule, **settings)
    np.testing.assert_allclose(two, one, rtol=1e-4)  # sums over shards, twelve steps
    if compressor.variance is None:
        residual = state.opt_state[0].local[0]["up"]
        assert residual.sharding.spec == P("worker", *specs["up"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compressor", "settings", "largest"),
    [
        (compressors.sign(), {"exchange": "gather"}, 0.02),
        (compressors.top_k(fraction=0.1), {"exchange": "gather"}, 0.04),
        (compressors.ternary(), {"exchange": "gather"}, 0.2),  # other random draws, too
        (compressors.int8(16), {"exchange": "two_phase"}, 0.002),
    ],
)
def test_shards_are_tensors_of_their_own_and_losses_differ_by_little(compressor, settings, largest):
    one, _ = split_in(1, compressor, COLUMNS, **settings)
    two, _ = split_in(2, compressor, COLUMNS, **settings)
    difference = np.max(np.abs(two / one - 1))
    assert 1e-6 < difference < largest


def test_an_axis_that_is_not_bound_is_refused_with_the_way_to_run_it():
    tx, params = link(compressors.sign()), {"w": jnp.ones((12, 20))}
    with pytest.raises(
        ValueError,
        match=r"axis_name='worker', which is not bound here: .*run_workers.*make_train_step",
    ):
        tx.update(params, tx.init(params))


def test_specs_that_miss_a_leaf_are_refused():
    tx = optax.chain(link(compressors.sign()), optax.sgd(0.1))
    mesh = parallel.make_mesh({"worker": 4, "model": 2})
    with pytest.raises(ValueError, match=r"no PartitionSpec for \['matrix'\]; it has: \['other'\]"):
        run_fleet(tx, normal(SHAPES, steps=1, workers=4), mesh=mesh, param_specs={"other": P()})


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"exchange='mean' .* sign takes one of"):
        link(compressors.sign(), exchange="mean")
    with pytest.raises(ValueError, match="seed must be an int of at least 0, got -1"):
        link(compressors.sign(), seed=-1)
    with pytest.raises(TypeError, match=r"compressed_mean works on real .* int32 at \['i'\]"):
        link(compressors.sign()).init({"i": jnp.ones(2, jnp.int32)})
