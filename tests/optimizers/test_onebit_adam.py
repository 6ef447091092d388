"""1-bit Adam: both stages by hand, the switch between them, its bytes, and the same everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fleets import WORKERS, copies, normal, relative_difference, run_fleet

from jaxopt_suite import parallel
from jaxopt_suite.optimizers import onebit_adam, scale_by_onebit_adam
from jaxopt_suite.parallel import wire

B1, B2, EPS = 0.9, 0.99, 1e-8
SHAPES = {"matrix": (12, 20), "odd": (7, 19), "vector": (7,)}
SMALL = lambda path, leaf: leaf.size < 100

# Float32 against float64 over the steps of a test. No sign may differ: none is near zero.
ROUNDING = 1e-4


def make(warmup_steps=5, dense=SMALL, **settings):
    return scale_by_onebit_adam(
        B1, B2, EPS, axis_name="worker", warmup_steps=warmup_steps, dense=dense, **settings
    )


def by_hand(inputs, *, workers, warmup_steps, corrected=True):
    """The updates for one compressed leaf ``[workers, steps, ...]``, in float64."""
    inputs = inputs.astype(np.float64)
    shape, d = inputs.shape[2:], inputs[0, 0].size
    length = -(-d // (8 * workers)) * 8
    pieces = [slice(j * length, min((j + 1) * length, d)) for j in range(workers)]
    signs = lambda x: np.where(x >= 0, 1.0, -1.0)
    m, v = np.zeros(d), np.zeros(d)
    errors, owner_errors, updates = np.zeros((workers, d)), np.zeros(d), []
    for t in range(inputs.shape[1]):
        g = inputs[:, t].reshape(workers, d)
        if t < warmup_steps:
            m = B1 * m + (1 - B1) * g.mean(0)
            v = B2 * v + (1 - B2) * g.mean(0) ** 2
        else:
            y = B1 * m + (1 - B1) * g + errors
            sent = np.sqrt(np.mean(y**2, axis=1, keepdims=True)) * signs(y)
            errors = y - sent
            z = sent.mean(0) + owner_errors
            m = np.concatenate(
                [np.sqrt(np.mean(z[p] ** 2)) * signs(z[p]) for p in pieces if z[p].size]
            )
            owner_errors = z - m
        steps = min(t + 1, warmup_steps)
        c1, c2 = (1 - B1 ** (t + 1), 1 - B2**steps) if corrected else (1.0, 1.0)
        updates.append((m / c1 / (np.sqrt(v / c2) + EPS)).reshape(shape))
    return np.stack(updates)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("name", ["matrix", "odd"])  # the second in pieces that are not full
def test_both_stages_are_those_written_down_in_numpy(name, corrected):
    inputs = normal({name: SHAPES[name]}, steps=12, workers=4)
    updates, _ = run_fleet(make(bias_correction=corrected), inputs)
    expected = by_hand(inputs[name], workers=4, warmup_steps=5, corrected=corrected)
    assert relative_difference(updates[name], expected) < ROUNDING
    flips = np.sign(expected[1:]) != np.sign(expected[:-1])
    assert 0.05 < flips.mean() < 0.95


def test_the_dense_stage_is_adam_on_the_mean_and_dense_leaves_stay_in_it():
    inputs = normal(SHAPES, steps=9)
    updates, _ = run_fleet(make(warmup_steps=5), inputs)
    adam = optax.scale_by_adam(B1, B2, EPS)
    mean = jax.tree.map(lambda x: jnp.asarray(x.mean(0)), inputs)
    state = adam.init(jax.tree.map(lambda x: x[0], mean))
    for t in range(9):
        expected, state = adam.update(jax.tree.map(lambda x, t=t: x[t], mean), state)
        for name in SHAPES:
            if t < 5 or name == "vector":
                # optax takes 1 - b2**t in float32, off by up to 1e-5 of it.
                np.testing.assert_allclose(updates[name][t], expected[name], rtol=2e-5)
            else:
                assert relative_difference(updates[name][t], expected[name]) > 0.05


def test_nothing_of_the_momentum_is_lost():
    """The momentum is linear in gradients, the errors that it lacks are in the two memories."""
    inputs = normal({"w": (12, 20)}, steps=10, workers=4)
    tx = make(warmup_steps=1, bias_correction=False)

    def worker(own):
        def step(state, g):
            _, new = tx.update({"w": g}, state)
            fresh = B1 * state.mu["w"] + (1 - B1) * g
            owed = lambda s: (
                jax.lax.pmean(s.error["w"], "worker") + jax.lax.psum(s.owner_error["w"], "worker")
            )
            gap = jax.lax.pmean(fresh, "worker") + owed(state) - new.mu["w"] - owed(new)
            return new, (gap, owed(new))

        return jax.lax.scan(step, tx.init({"w": own[0]}), own)[1]

    gap, owed = jax.jit(parallel.run_workers(worker, axis_name="worker"))(inputs["w"])
    assert np.abs(owed[1:]).max() > 0.1
    assert np.abs(gap[1:]).max() < 1e-5  # float32 rounding of numbers of order 1


def test_the_compressed_momentum_takes_one_magnitude_a_piece():
    inputs = normal({"w": (16, 16)}, steps=3, workers=4)
    _, state = run_fleet(make(warmup_steps=2), inputs)
    pieces = np.abs(np.asarray(state.mu["w"])).reshape(4, 64)
    np.testing.assert_array_equal(pieces, pieces[:, :1].repeat(64, axis=1))
    assert len(set(pieces[:, 0])) == 4
    assert np.std(np.asarray(state.error["w"]), axis=0).max() > 0  # workers' own


def test_the_second_moment_is_frozen_after_the_warmup():
    inputs = normal({"w": (12, 20)}, steps=9)
    for steps in (5, 9):
        _, state = run_fleet(make(warmup_steps=5), {"w": inputs["w"][:, :steps]})
        if steps == 5:
            frozen = state.nu["w"]
    np.testing.assert_array_equal(state.nu["w"], frozen)
    assert (int(state.count), int(state.dense_count), bool(state.compressed)) == (9, 5, True)


def switched_at(**settings):
    """After how many updates the dense stage ended, where the norm of v falls and settles."""
    scale = np.array([8.0, 8.0] + [1.0] * 38, np.float32)[:, None, None]
    tx = make(dense=lambda path, leaf: False, **settings)
    _, state = run_fleet(tx, {"w": np.broadcast_to(scale, (2, 40, 8, 8))})
    return int(state.dense_count) if state.compressed else None


def test_the_papers_rule_waits_until_the_second_moment_has_settled():
    scale = [8.0, 8.0] + [1.0] * 38
    v, corrected = 0.0, []
    for t, g in enumerate(scale, 1):
        v = B2 * v + (1 - B2) * g * g
        corrected.append(v / (1 - B2**t))
    ratios = {t: corrected[t - 1] / corrected[t - 4] for t in range(4, 41)}  # Δ = 3
    expected = next(t for t in range(4, 41) if t >= 6 and ratios[t] >= 0.8)
    assert expected > 8
    assert switched_at(warmup_steps=6, variance_ratio=0.8, variance_interval=3) == expected
    assert switched_at(warmup_steps=6) == 6
    assert switched_at(warmup_steps=30, variance_ratio=0.8, variance_interval=3) == 30
    assert switched_at(warmup_steps=6, variance_ratio=1.5, variance_interval=3) is None
    assert switched_at(warmup_steps=6, variance_ratio=0.01) is None  # Δ is 100, the run 40


def test_entries_without_a_gradient_do_not_move_and_small_ones_are_held_by_the_floor():
    inputs = normal({"w": (16, 16)}, steps=8, workers=4)
    inputs["w"][..., 0] = 0
    inputs["w"][..., 1] *= 1e-6
    for floor in (0.0, 0.01):
        updates, _ = run_fleet(make(warmup_steps=4, variance_floor=floor), inputs)
        assert not np.any(updates["w"][..., 0])
        thrown = np.abs(updates["w"][4:, :, 1]).max()
        ordinary = np.abs(updates["w"][4:, :, 2:]).max()
        assert (thrown > 1e3 * ordinary) if floor == 0 else (thrown < 50)
        assert np.isfinite(updates["w"]).all()


@pytest.mark.parametrize(
    ("stage", "bad"), [("dense", np.nan), ("compressed", np.nan), ("compressed", -np.inf)]
)
def test_a_bad_number_on_one_worker_makes_every_update_nan_and_leaves_no_trace(stage, bad):
    good = normal(SHAPES, steps=8)
    at = 2 if stage == "dense" else 6
    spoilt = {name: np.insert(x, at, x[:, 0], axis=1) for name, x in good.items()}
    spoilt["matrix"][3, at, 5, 5] = bad
    tx = make(warmup_steps=5)
    expected, found = run_fleet(tx, good), run_fleet(tx, spoilt)
    assert all(np.isnan(x[at]).all() for x in found[0].values())
    without = {name: np.delete(x, at, axis=0) for name, x in found[0].items()}
    for a, b in zip(jax.tree.leaves((without, found[1])), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_gradients_of_one_worker_alone_are_compressed_too():
    inputs = normal({"w": (16, 16)}, steps=4, workers=1)
    updates, state = run_fleet(make(warmup_steps=2), inputs)
    assert np.unique(np.abs(state.mu["w"])).size == 1
    expected = by_hand(inputs["w"], workers=1, warmup_steps=2)
    assert relative_difference(updates["w"], expected) < ROUNDING


@pytest.mark.parametrize("warmup_steps", [5, 30])
def test_a_mesh_and_a_simulated_fleet_take_the_same_steps_and_replicas_are_equal_bits(warmup_steps):
    inputs = normal(SHAPES, steps=30)
    tx = make(warmup_steps=warmup_steps)
    simulated = run_fleet(tx, inputs)
    real = run_fleet(tx, inputs, mesh=parallel.make_mesh({"worker": WORKERS}))
    # The same operations; sums inside an all-reduce or a norm may be split differently.
    assert relative_difference(real, simulated) < 2e-6
    for leaf in jax.tree.leaves(real[0]):
        held = copies(leaf)
        assert len(held) == WORKERS
        for other in held[1:]:
            np.testing.assert_array_equal(held[0].view(np.int32), other.view(np.int32))


# In a train step.

PARAMS = {"w": (32, 64), "v": (64, 16)}
BATCH = {
    "x": np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32),
    "y": np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32),
}
SPECS = {"w": jax.P(None, "model"), "v": jax.P("model", None)}


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - batch["y"]) ** 2)


def params():
    rng = np.random.default_rng(2)
    return {k: (0.2 * rng.normal(size=s)).astype(np.float32) for k, s in PARAMS.items()}


def train_step(mesh, warmup_steps):
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        onebit_adam(
            0.01, axis_name="worker", warmup_steps=warmup_steps, dense=lambda path, leaf: False
        ),
    )
    if mesh is None:
        return parallel.make_train_step(loss, tx, worker_axis="worker", workers=4)
    mesh = parallel.make_mesh(parallel.parse_mesh(mesh))
    return parallel.make_train_step(loss, tx, mesh, param_specs=SPECS, worker_axis="worker")


def losses(step, count):
    state, found = step.init(params()), []
    for _ in range(count):
        state, metrics = step(state, BATCH)
        found.append(float(metrics.loss))
    return found


def test_beside_a_model_axis_the_dense_stage_is_the_same_and_the_compressed_one_as_good():
    whole, divided = (losses(train_step(mesh, 5), 25) for mesh in (None, "worker=4,model=2"))
    np.testing.assert_allclose(divided[:6], whole[:6], rtol=1e-5)  # sums in another order
    assert divided[7:] != whole[7:]  # scales are of parts
    # Which is a difference of rounding no larger than that of the compression itself.
    assert divided[-1] < 0.5 * divided[0]
    assert abs(divided[-1] - whole[-1]) < 0.1 * whole[0]


def test_the_program_sends_the_bytes_that_the_documentation_promises():
    step = train_step("worker=4,model=2", 5)
    like = {k: jax.ShapeDtypeStruct(s, np.float32) for k, s in PARAMS.items()}
    compiled = step.lower(like, BATCH).compile()
    crossing = [c for c in wire.collectives(compiled, step.mesh) if c.axes == ("worker",)]
    staged = [c for c in crossing if c.conditional]
    sent = lambda kinds: sum(c.nbytes * c.times for c in staged if c.kind in kinds)
    held = 32 * 64 // 2 + 64 * 16 // 2  # of the parameters, on a device
    assert sent({"all-reduce"}) == 8 * held * 3 / 4
    pieces = [32 * 64 // 2 // 4, 64 * 16 // 2 // 4]
    one_way = 3 * 128 * -(-sum(p // 8 + 4 for p in pieces) // 128)  # one buffer of whole lines
    assert sent({"all-to-all"}) == one_way
    assert sent({"all-gather"}) == one_way
    assert all(c.conditional for c in crossing)


# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_steps": 0}, "warmup_steps must be an int of at least 1, got 0"),
        ({"variance_ratio": -1.0}, "variance_ratio must be in"),
        ({"variance_interval": 10}, "variance_interval=10 needs a variance_ratio"),
        ({"variance_ratio": 0.9, "variance_interval": 0}, "variance_interval must be an int"),
        ({"variance_floor": -0.1}, "variance_floor must be in"),
    ],
)
def test_bad_arguments_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_an_axis_that_is_not_bound_is_an_error_that_says_how_to_run_it():
    tx = make()
    params = {"w": jnp.ones((16, 16))}
    with pytest.raises(ValueError, match=r"onebit_adam communicates over axis_name='worker'"):
        tx.update(params, tx.init(params))


def test_trees_without_leaves_or_with_empty_ones_pass():
    tx = make(warmup_steps=1, dense=lambda path, leaf: False)
    inputs = {
        "none": None,
        "empty": np.zeros((2, 3, 0), np.float32),
        "one": np.ones((2, 3, 1), "f4"),
    }
    updates, _ = run_fleet(tx, inputs)
    assert updates["empty"].shape == (3, 0)
    assert np.isfinite(updates["one"]).all()
    assert run_fleet(tx, {"only": np.zeros((2, 3, 0), np.float32)})[0]["only"].shape == (3, 0)
