"""One worker's function for all workers: a fleet on one device and a mesh give the same."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_suite.core.varying import vary
from jaxopt_suite.parallel.meshes import make_mesh
from jaxopt_suite.parallel.workers import map_workers, result_axes, run_workers

WORKERS = 4
X = np.random.default_rng(0).normal(size=(WORKERS, 3, 5)).astype(np.float32)
MESHES = {
    "fleet": lambda: None,
    "mesh": lambda: make_mesh({"worker": WORKERS}),
    "mesh with a model axis": lambda: make_mesh({"worker": WORKERS, "model": 2}),
    "workers last": lambda: make_mesh({"model": 2, "worker": WORKERS}),
}


def on_all(fn, *args, jitted=True, **options):
    """Results of a fleet and of every mesh, which must agree in structure and values."""
    found = {}
    for name, mesh in MESHES.items():
        run = run_workers(fn, axis_name="worker", mesh=mesh(), **options)
        found[name] = (jax.jit(run) if jitted else run)(*args)
    for name, tree in found.items():
        assert jax.tree.structure(tree) == jax.tree.structure(found["fleet"]), name
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(found["fleet"]), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            # Sums of four float32 numbers near 1, in another order.
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)
    return found["fleet"]


def test_collectives_mean_the_same_on_a_fleet_and_on_a_mesh():
    def worker(x):
        return {
            "sum": jax.lax.psum(x, "worker"),
            "mean": jax.lax.pmean(x, "worker"),
            "max": jax.lax.pmax(x, "worker"),
            "gathered": jax.lax.all_gather(x, "worker"),
            "exchanged": jax.lax.all_to_all(x[:, :4], "worker", 1, 0),
            "from the left": jax.lax.ppermute(
                x, "worker", [(i, (i + 1) % WORKERS) for i in range(WORKERS)]
            ),
            "index": jax.lax.axis_index("worker"),
            "scattered": jax.lax.psum_scatter(x[0, :4], "worker", tiled=True),
        }

    got = on_all(worker, X)
    np.testing.assert_allclose(got["sum"], X.sum(0), rtol=1e-5, atol=1e-6)  # float32
    np.testing.assert_allclose(got["mean"], X.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got["max"], X.max(0))
    np.testing.assert_array_equal(got["gathered"], [X] * WORKERS)
    np.testing.assert_array_equal(got["exchanged"][1], X[:, :, 1])
    np.testing.assert_array_equal(got["from the left"], np.roll(X, 1, axis=0))
    np.testing.assert_array_equal(got["index"], range(WORKERS))
    np.testing.assert_allclose(got["scattered"][:, 0], X[:, 0, :4].sum(0), rtol=1e-5, atol=1e-6)


def test_it_runs_without_jit_too():
    got = on_all(lambda x: (x, jax.lax.psum(x, "worker")), X, jitted=False)
    np.testing.assert_array_equal(got[0], X)


def test_own_and_equal_results_are_told_apart_by_what_they_are_made_of():
    def worker(state, x):
        seen = state["seen"] + 1
        shared = 0.5 * state["shared"] + jax.lax.pmean(x, "worker")
        rest = state["rest"] + x - shared
        return {"seen": seen, "shared": shared, "rest": rest, "none": None, "pair": (rest, 7)}

    state = {"seen": jnp.int32(3), "shared": np.ones((3, 5), np.float32), "rest": X}
    axes = {"seen": None, "shared": None, "rest": 0}
    got = on_all(worker, state, X, in_axes=(axes, 0))
    assert jax.tree.map(jnp.shape, got) == {
        "seen": (),
        "shared": (3, 5),
        "rest": (4, 3, 5),
        "none": None,
        "pair": ((4, 3, 5), ()),
    }
    assert (int(got["seen"]), int(got["pair"][1])) == (4, 7)
    np.testing.assert_allclose(got["shared"], 0.5 + X.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["rest"], 2 * X - 0.5 - X.mean(0), rtol=1e-5, atol=1e-5)


def test_none_and_nested_containers_pass_through_as_arguments():
    def worker(tree, scale):
        assert tree["b"] is None
        return {"y": [leaf * scale for leaf in tree["a"]], "b": tree["b"]}

    tree = {"a": [X, X[:, 0]], "b": None}
    got = on_all(worker, tree, jnp.float32(2), in_axes=({"a": 0, "b": None}, None))
    np.testing.assert_array_equal(got["y"][1], 2 * X[:, 0])


@pytest.mark.parametrize("in_axes", [0, (0, 0), (0, [0, 0])])
def test_an_axis_does_for_all_arguments_and_for_subtrees(in_axes):
    got = on_all(lambda x, pair: x + pair[0] * pair[1], X, [X, X], in_axes=in_axes)
    np.testing.assert_allclose(got, X + X * X, rtol=1e-6)  # a fused multiply-add may round once


def test_random_keys_are_one_per_worker_or_one_for_all():
    def worker(own, shared):
        draw = functools.partial(jax.random.normal, shape=(3,))
        return draw(own), draw(shared), jax.random.split(own), jax.random.fold_in(shared, 1)

    own, shared = jax.random.split(jax.random.key(0), WORKERS), jax.random.key(1)
    for mesh in MESHES.values():
        run = run_workers(worker, axis_name="worker", mesh=mesh(), in_axes=(0, None))
        draws, common, keys, folded = jax.jit(run)(own, shared)
        np.testing.assert_allclose(draws[2], jax.random.normal(own[2], (3,)), rtol=1e-6)
        np.testing.assert_allclose(common, jax.random.normal(shared, (3,)), rtol=1e-6)
        assert (common.shape, keys.shape, folded.shape) == ((3,), (WORKERS, 2), ())
        assert keys.dtype == folded.dtype == own.dtype
        np.testing.assert_array_equal(
            jax.random.key_data(keys[1]), jax.random.key_data(jax.random.split(own[1]))
        )


def test_the_number_of_workers_is_given_where_nothing_has_the_axis():
    def worker(x):
        return jax.lax.psum(vary(x, "worker"), "worker"), jax.lax.axis_index("worker")

    total, index = on_all(worker, jnp.ones(2), in_axes=None, size=WORKERS)
    np.testing.assert_array_equal(total, [4.0, 4.0])
    np.testing.assert_array_equal(index, range(WORKERS))


def test_gradients_of_varying_parameters_are_each_workers_own():
    loss = lambda w, x: jnp.sum(jnp.tanh(w * x))

    def worker(w, x):
        return jax.grad(loss)(vary(w, "worker"), x)

    w = np.float32(0.3)
    got = on_all(worker, w, X, in_axes=(None, 0))
    np.testing.assert_allclose(got, [np.sum(x / np.cosh(w * x) ** 2) for x in X], rtol=1e-5)


@pytest.mark.parametrize("name", ["mesh", "mesh with a model axis"])
def test_results_of_a_mesh_lie_with_their_workers(name):
    run = run_workers(
        lambda x: (x, jax.lax.psum(x, "worker")), axis_name="worker", mesh=MESHES[name]()
    )
    own, total = jax.jit(run)(X)
    assert {s.data.shape[0] for s in own.addressable_shards} == {1}
    assert {s.data.shape for s in total.addressable_shards} == {(3, 5)}


def test_the_other_axes_stay_with_the_partitioner():
    mesh = make_mesh({"worker": WORKERS, "model": 2})
    x = jax.device_put(np.ones((WORKERS, 6), np.float32), NamedSharding(mesh, P("worker", "model")))
    run = run_workers(lambda x: jnp.cumsum(x) / jnp.sum(x), axis_name="worker", mesh=mesh)
    np.testing.assert_allclose(jax.jit(run)(x)[0], np.arange(1, 7) / 6, rtol=1e-6)


@pytest.mark.parametrize("sizes", [{"worker": WORKERS}, {"worker": WORKERS, "model": 2}])
@pytest.mark.parametrize("in_context", [False, True])
def test_a_mesh_with_explicit_axes_gives_the_same(sizes, in_context):
    mesh = make_mesh(sizes, axis_types=AxisType.Explicit)
    x = jax.device_put(X, NamedSharding(mesh, P("worker")))
    fn = lambda x: (x - jax.lax.pmean(x, "worker"), jax.lax.psum(x, "worker"))
    run = jax.jit(run_workers(fn, axis_name="worker", mesh=mesh))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        own, total = run(x)
    np.testing.assert_allclose(own, X - X.mean(0), rtol=1e-5, atol=1e-6)  # float32
    np.testing.assert_allclose(total, X.sum(0), rtol=1e-5, atol=1e-6)


def test_which_results_differ_is_known_without_computing():
    calls = []

    def worker(x):
        calls.append(1)
        return x, jax.lax.psum(x, "worker"), jnp.zeros(2), None

    for mesh in MESHES.values():
        axes = result_axes(
            worker, (X,), axis_name="worker", mesh=mesh(), size=WORKERS, in_axes=(0,)
        )
        assert axes == (0, None, None, None)
    assert len(calls) == len(MESHES)


def test_a_result_said_to_be_equal_that_may_differ_is_an_error_on_a_mesh():
    run = map_workers(
        lambda x: x,
        axis_name="worker",
        mesh=make_mesh({"worker": WORKERS}),
        size=WORKERS,
        in_axes=(0,),
        out_axes=None,
    )
    with pytest.raises(ValueError, match="out_specs"):
        run(X)


def test_an_axis_the_mesh_does_not_have_is_refused_with_those_it_has():
    mesh = make_mesh({"worker": 2, "model": 4})
    with pytest.raises(ValueError, match=r"an axis of the mesh, 'worker', 'model', got 'island'"):
        run_workers(lambda x: x, axis_name="island", mesh=mesh)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((np.ones(4), np.ones(3)), {}, r"shape \(4,\): 4, an argument of shape \(3,\): 3"),
        ((np.ones(4),), {"size": 3}, r"size: 3, an argument of shape \(4,\): 4"),
        ((np.ones(3),), {"mesh": 4}, r"mesh axis 'worker': 4, an argument of shape \(3,\): 3"),
        ((np.ones(4),), {"in_axes": None}, "got nothing to tell it by"),
        ((np.float32(1),), {}, r"mapped over workers needs a leading axis, got 1\.0"),
    ],
)
def test_a_number_of_workers_that_is_not_one_and_the_same_is_refused(args, options, message):
    if "mesh" in options:
        options = {"mesh": make_mesh({"worker": options["mesh"]})}
    run = run_workers(lambda *xs: xs, axis_name="worker", **options)
    with pytest.raises(ValueError, match=message):
        run(*args)


def test_one_worker_is_a_fleet_too():
    for mesh in (None, make_mesh({"worker": 1})):
        run = run_workers(lambda x: (x, jax.lax.pmean(x, "worker")), axis_name="worker", mesh=mesh)
        own, mean = run(X[:1])
        np.testing.assert_array_equal(own, X[:1])
        np.testing.assert_array_equal(mean, X[0])
