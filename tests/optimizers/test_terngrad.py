"""TernGrad: shared scales and exact sums by hand, its expectation, its bytes, every substrate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fleets import WORKERS, copies, normal, relative_difference, run_fleet

from jaxopt_suite import parallel
from jaxopt_suite.optimizers import terngrad_mean
from jaxopt_suite.parallel import wire

SHAPES = {"matrix": (12, 20), "odd": (7, 19), "vector": (7,)}
SMALL = lambda path, leaf: leaf.size < 100


def make(clip=2.5, dense=SMALL, **settings):
    return terngrad_mean(axis_name="worker", clip=clip, dense=dense, **settings)


def shared_scale(x, clip):
    """Of one leaf ``[workers, ...]``, in float64."""
    x = x.astype(np.float64).reshape(len(x), -1)
    largest = np.abs(x).max(1)
    return max(largest if clip is None else np.minimum(largest, clip * x.std(1)))


@pytest.mark.parametrize("workers", [1, 3, 8, 16])  # sums of 2, 4 and 8 bits
@pytest.mark.parametrize("clip", [None, 2.5, 1.0])
def test_updates_are_whole_multiples_of_the_shared_scale_and_dense_leaves_means(workers, clip):
    inputs = normal(SHAPES, steps=3, workers=workers)
    updates, _ = run_fleet(make(clip), inputs)
    for name in ("matrix", "odd"):
        for t in range(3):
            s = shared_scale(inputs[name][:, t], clip)
            multiples = updates[name][t] / (s / workers)
            np.testing.assert_allclose(multiples, np.round(multiples), atol=1e-4)  # float32
            assert np.abs(multiples).max() <= workers + 1e-4
            assert len(np.unique(np.round(multiples))) > min(workers, 3)
    np.testing.assert_allclose(updates["vector"], inputs["vector"].mean(0), rtol=1e-5, atol=1e-6)


def test_the_largest_entry_of_all_workers_always_fires_and_zeros_never_do():
    inputs = normal({"w": (16, 16)}, steps=20, workers=4)
    inputs["w"][:, :, 0] = 0
    inputs["w"][2, :, 3, 3] = -100.0
    updates, _ = run_fleet(make(clip=None), inputs)
    assert not np.any(updates["w"][:, 0])
    # Of the others at most a few in a hundred fire there, up or down.
    assert np.median(updates["w"][:, 3, 3]) == -25.0


@pytest.mark.parametrize("clip", [None, 2.0])
def test_the_mean_over_many_draws_is_the_mean_of_the_clipped_updates(clip):
    draws = 4000
    once = normal({"w": (8, 8)}, steps=1, workers=4)["w"]
    tx = make(clip, dense=lambda path, leaf: False)

    def worker(x):
        step = lambda state, _: tx.update(x, state)[::-1]
        return jax.lax.scan(step, tx.init(x), length=draws)[1]

    found = jax.jit(parallel.run_workers(worker, axis_name="worker"))(once[:, 0])
    found = np.asarray(found, np.float64).reshape(-1, draws, 8, 8)[0]
    s = shared_scale(once[:, 0], clip)
    x = np.clip(once[:, 0].astype(np.float64), -s, s)
    assert (clip is None) == (x == once[:, 0]).all()
    variance = (s * np.abs(x) - x**2).sum(0) / 16  # of the mean of 4 independent workers
    deviations = (found.mean(0) - x.mean(0)) / np.sqrt(variance / draws + 1e-12)
    assert np.abs(deviations).max() < 4.5  # 64 normal numbers exceed it in 4 of 10,000 tests
    np.testing.assert_allclose(found.var(0), variance, rtol=0.2, atol=1e-3)


def test_the_seed_the_step_the_leaf_and_the_worker_change_the_draws():
    inputs = normal({"a": (16, 16)}, steps=1, workers=2)["a"]
    same = {"a": np.repeat(inputs, 2, axis=1)} | {"b": np.repeat(inputs, 2, axis=1)}
    updates, _ = run_fleet(make(), same)
    assert (updates["a"][0] != updates["a"][1]).any()
    assert (updates["a"] != updates["b"]).any()
    assert (updates["a"] != run_fleet(make(seed=1), same)[0]["a"]).any()
    equal = {"a": np.broadcast_to(inputs[:1], inputs.shape)}
    sums = run_fleet(make(), equal)[0]["a"] / shared_scale(inputs[:1, 0], 2.5)
    assert (np.abs(np.abs(sums) - 0.5) < 1e-3).any()  # one of two workers fired


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_number_on_one_worker_spoils_the_leaf_on_all_and_nothing_later(bad):
    inputs = normal(SHAPES, steps=3)
    inputs["matrix"][5, 1, 2, 2] = bad
    updates, _ = run_fleet(make(), inputs)
    assert np.isnan(updates["matrix"][1]).all()
    assert np.isfinite(updates["odd"]).all()
    assert np.isfinite(updates["matrix"][2]).all()


def test_leaves_of_zeros_constants_and_single_entries_pass():
    shapes = {"zeros": (2, 1, 6), "constant": (2, 1, 6), "one": (2, 1), "empty": (2, 1, 0)}
    inputs = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    inputs["zeros"][:] = 0
    updates, _ = run_fleet(make(dense=lambda path, leaf: False), inputs)
    np.testing.assert_array_equal(updates["zeros"], 0.0)
    np.testing.assert_array_equal(updates["constant"], 0.5)
    np.testing.assert_array_equal(updates["one"], 0.5)
    assert updates["empty"].shape == (1, 0)


def test_a_mesh_and_a_simulated_fleet_take_the_same_steps_and_replicas_are_equal_bits():
    inputs = normal(SHAPES, steps=30)
    simulated = run_fleet(make(), inputs)
    real = run_fleet(make(), inputs, mesh=parallel.make_mesh({"worker": WORKERS}))
    # The same draws; a mean or a deviation may be summed in another order.
    assert relative_difference(real, simulated) < 1e-6
    for leaf in jax.tree.leaves(real[0]):
        held = copies(leaf)
        assert len(held) == WORKERS
        for other in held[1:]:
            np.testing.assert_array_equal(held[0].view(np.int32), other.view(np.int32))


def loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"] @ params["v"] - batch["y"]) ** 2)


def test_beside_a_model_axis_the_program_sends_what_the_documentation_promises():
    mesh = parallel.make_mesh({"worker": 4, "model": 2})
    step = parallel.make_train_step(
        loss,
        make(clip=None, dense=lambda path, leaf: False),
        mesh,
        param_specs={"w": jax.P(None, "model"), "v": jax.P("model", None)},
        worker_axis="worker",
    )
    like = {"w": jax.ShapeDtypeStruct((32, 64), "f4"), "v": jax.ShapeDtypeStruct((64, 16), "f4")}
    batch = {"x": np.ones((16, 32), np.float32), "y": np.ones((16, 16), np.float32)}
    compiled = step.lower(like, batch).compile()
    crossing = [c for c in wire.collectives(compiled, mesh) if c.axes == ("worker",)]
    sent = lambda kind: sum(c.nbytes * c.times for c in crossing if c.kind == kind)
    piece = (32 * 64 + 64 * 16) // 2 // 4  # entries, on a device
    lines = lambda size: 128 * -(-size // 128)  # of which the buffers are
    assert sent("all-to-all") == 3 * lines(piece // 4)
    assert sent("all-gather") == 3 * lines(piece // 2)
    assert sent("all-reduce") == 2 * 3 / 4 * 4 * 2  # two scales


def test_bad_arguments_and_an_unbound_axis_are_errors():
    with pytest.raises(ValueError, match="clip must be in"):
        make(clip=0.0)
    tx, params = make(), {"w": jnp.ones((16, 16))}
    with pytest.raises(ValueError, match=r"terngrad communicates over axis_name='worker'"):
        tx.update(params, tx.init(params))
