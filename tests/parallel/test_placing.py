"""Putting arrays where they belong, before a step and inside one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_suite.parallel.meshes import make_mesh
from jaxopt_suite.parallel.placing import constrain, place, split_batch

SIZES = {"data": 4, "model": 2}


@pytest.mark.parametrize("axis_types", [AxisType.Auto, AxisType.Explicit])
def test_arrays_of_every_kind_are_laid_out_leaf_by_leaf(axis_types):
    mesh = make_mesh(SIZES, axis_types=axis_types)
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    tree = {"a": np.arange(8.0).reshape(4, 2), "b": (jnp.ones(3), None, np.int32(1))}
    placed = place(tree, {"a": rows, "b": (whole, None, whole)})
    assert jax.tree.map(lambda x: x.sharding, placed) == {"a": rows, "b": (whole, None, whole)}
    assert [s.data.shape for s in placed["a"].addressable_shards] == [(1, 2)] * 8
    np.testing.assert_array_equal(placed["a"], tree["a"])


def test_one_sharding_does_for_all_leaves_and_for_subtrees():
    mesh = make_mesh(SIZES)
    rows = NamedSharding(mesh, P("data"))
    tree = {"a": np.ones((4, 2)), "b": [np.ones(8), np.ones(4)]}
    assert {x.sharding for x in jax.tree.leaves(place(tree, rows))} == {rows}


def test_what_lies_right_is_passed_through_and_what_does_not_is_moved():
    mesh = make_mesh(SIZES)
    rows, columns = NamedSharding(mesh, P("data")), NamedSharding(mesh, P(None, "model"))
    x = jax.device_put(np.arange(8.0).reshape(4, 2), rows)
    assert place(x, rows) is x
    moved = place(x, columns)
    assert moved.sharding == columns
    assert not x.is_deleted()
    np.testing.assert_array_equal(moved, x)


def test_constraints_lay_out_values_inside_a_program():
    mesh = make_mesh(SIZES)
    specs = {"a": P("data", "model"), "b": P("model")}

    @jax.jit
    def program(tree):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return constrain(jax.tree.map(jnp.sin, tree), specs)

    whole = NamedSharding(mesh, P())
    placed = program(place({"a": np.ones((4, 2)), "b": np.ones(2)}, whole))
    for name, spec in specs.items():
        assert placed[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), placed[name].ndim)
    tree = {"a": 1}
    assert constrain(tree, None) is tree


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": 4, "model": 2}, P("data")),
        ({"data": 2, "fsdp": 2, "model": 2}, P(("data", "fsdp"))),
        ({"worker": 2, "fsdp": 4}, P(("worker", "fsdp"))),
    ],
)
def test_activations_are_split_over_the_batch_axes(sizes, expected):
    mesh = make_mesh(sizes)

    @jax.jit
    def program(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return split_batch(x)

    out = program(place(np.ones((8, 4)), NamedSharding(mesh, P())))
    assert out.sharding.is_equivalent_to(NamedSharding(mesh, expected), 2)


def test_activations_stay_as_they_are_without_an_axis_that_splits_batches():
    x = jnp.ones((8, 4))
    assert split_batch(x) is x
    for sizes, types in (({"model": 8}, AxisType.Auto), ({"data": 8}, AxisType.Explicit)):
        with jax.sharding.use_abstract_mesh(make_mesh(sizes, axis_types=types).abstract_mesh):
            assert split_batch(x) is x


def test_a_manual_worker_axis_is_left_out_and_the_automatic_ones_are_used():
    mesh = make_mesh({"worker": 2, "data": 4})
    fn = jax.shard_map(
        split_batch, mesh=mesh, in_specs=P("worker"), out_specs=P("worker"), axis_names={"worker"}
    )
    out = jax.jit(fn)(np.ones((8, 4), np.float32))
    assert [s.data.shape for s in out.addressable_shards] == [(1, 4)] * 8
