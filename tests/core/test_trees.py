"""Tree helpers and keys."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_suite import core


def test_map_unzip_returns_one_tree_a_value_and_keeps_empty_nodes():
    tree = {"a": jnp.arange(3.0), "n": None, "m": optax.MaskedNode(), "t": (jnp.ones(()),)}
    double, square = core.map_unzip(lambda x: (2 * x, x * x), 2, tree)
    chex.assert_trees_all_equal_structs(double, square, tree)
    np.testing.assert_array_equal(double["a"], [0, 2, 4])
    np.testing.assert_array_equal(square["a"], [0, 1, 4])


def test_map_unzip_passes_subtrees_of_the_other_trees_whole():
    seen = []
    core.map_unzip(lambda x, y: (seen.append(y),), 1, {"a": 1, "b": 2}, {"a": (3, 4), "b": None})
    assert seen == [(3, 4), None]


def test_map_unzip_of_an_empty_tree_has_the_right_width():
    assert core.map_unzip(lambda x: (x, x, x), 3, {}) == ({}, {}, {})


def test_batch_by_shape_calls_once_a_shape_and_keeps_the_order():
    calls = []

    def batched(x, y):
        calls.append(x.shape)
        return {"sum": x.sum(axis=(1, 2)), "y": y}

    xs = [jnp.full((2, 3), 1.0), jnp.full((3, 2), 2.0), jnp.full((2, 3), 3.0)]
    ys = [jnp.asarray(i) for i in range(3)]
    out = core.batch_by_shape(batched, xs, ys)
    assert calls == [(2, 2, 3), (1, 3, 2)]
    assert [float(o["sum"]) for o in out] == [6.0, 12.0, 18.0]
    assert [int(o["y"]) for o in out] == [0, 1, 2]


def test_batch_by_shape_keeps_dtypes_apart():
    xs = [jnp.ones(2), jnp.ones(2, jnp.bfloat16)]
    assert [x.dtype for x in core.batch_by_shape(lambda x: x, xs)] == [jnp.float32, jnp.bfloat16]


@pytest.mark.parametrize(
    ("param", "override", "expected"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "float32"),
        ("float16", None, "float32"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
def test_moments_are_at_least_float32_unless_told_otherwise(param, override, expected):
    assert core.accumulator_dtype(jnp.ones(2, param), override) == jnp.dtype(expected)


def test_tree_bytes_counts_arrays_and_shapes_alike():
    tree = {
        "a": jnp.ones((3, 2), jnp.bfloat16),
        "b": jax.ShapeDtypeStruct((5,), jnp.int8),
        "n": None,
    }
    assert core.tree_bytes(tree) == 12 + 5


def test_keys_depend_on_seed_path_and_counters_but_not_on_the_other_leaves():
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path({"a": 0, "b": 0, "c": 0})]
    data = lambda *args: jax.random.key_data(core.leaf_keys(*args))
    keys = data(0, paths, 7)
    assert keys.shape[0] == 3
    assert len({tuple(np.asarray(k)) for k in keys}) == 3
    np.testing.assert_array_equal(keys[2], data(0, paths[2:], 7)[0])
    assert not np.array_equal(keys, data(1, paths, 7))
    assert not np.array_equal(keys, data(0, paths, 8))
