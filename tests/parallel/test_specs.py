"""Layouts of parameters: what is refused, and where FSDP and ZeRO-1 put their axes."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_suite.parallel.meshes import make_mesh
from jaxopt_suite.parallel.specs import (
    Undivided,
    broadcast_specs,
    check_specs,
    entries_of,
    fsdp_specs,
    undivided,
    zero_specs,
)

SIZES = {"data": 2, "fsdp": 2, "model": 2}


def like(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def mesh_of(**sizes):
    return make_mesh(sizes or SIZES)


PARAMS = {"block": {"w": like(8, 12), "b": like(12)}, "scale": like(), "absent": None}


def test_a_spec_or_none_stands_for_a_whole_subtree():
    full = broadcast_specs(PARAMS, {"block": P("data"), "scale": None, "absent": None})
    assert full == {"block": {"w": P("data"), "b": P("data")}, "scale": P(), "absent": None}
    assert jax.tree.leaves(broadcast_specs(PARAMS, None)) == [P()] * 3


@pytest.mark.parametrize(
    "specs",
    [
        {"block": None, "scale": None},
        {"block": {"w": P()}, "scale": None, "absent": None},
        {"block": {"w": P(), "b": P(), "c": P()}, "scale": None, "absent": None},
    ],
)
def test_specs_of_another_structure_are_refused_with_the_place(specs):
    with pytest.raises(ValueError, match=r"do not have the structure of the parameters.*key path"):
        broadcast_specs(PARAMS, specs)


def test_a_leaf_that_is_no_spec_is_refused():
    with pytest.raises(TypeError, match=r"PartitionSpec or None, got 'data' of type str"):
        broadcast_specs(PARAMS, {"block": "data", "scale": None, "absent": None})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P("tensor"), "the mesh has no axis 'tensor'"),
        (P("data", "data"), "axis 'data' comes twice"),
        (P(("data", "model", "data")), "axis 'data' comes twice"),
        (P(None, ("data", "fsdp", "model")), "dimension 1 of size 12 .* 8 equal parts"),
        (P(None, None, "data"), "3 entries for 2 dimensions"),
        (P("worker"), "'worker' is the worker axis"),
        (P(P.UNCONSTRAINED), "UNCONSTRAINED"),
        (P(("fsdp", "data")), r"in the order of the mesh, got \('fsdp', 'data'\)"),
        (P("data", unreduced={"model"}), "unreduced"),
    ],
)
def test_a_spec_the_mesh_cannot_carry_out_is_refused(spec, message):
    mesh = mesh_of(worker=1, data=2, fsdp=2, model=2)
    specs = {"block": {"w": spec, "b": P()}, "scale": None, "absent": None}
    with pytest.raises(ValueError, match=message) as refused:
        check_specs(PARAMS, specs, mesh, worker_axis="worker")
    # Every message says which parameter, what was asked for, and what there is.
    for part in ("['block']['w']", str(spec), "(8, 12)", "worker=1,data=2,fsdp=2,model=2"):
        assert part in str(refused.value)


def test_legal_specs_pass():
    specs = {"block": {"w": P(("data", "fsdp"), "model"), "b": P("model")}, "scale": P()}
    check_specs(PARAMS, {**specs, "absent": None}, mesh_of())


def test_fsdp_splits_the_largest_dimension_that_tensor_parallelism_leaves():
    params = {"up": like(8, 24), "down": like(8, 12), "stack": like(3, 8, 8)}
    specs = {"up": P(None, "model"), "down": None, "stack": None}
    assert fsdp_specs(params, mesh_of(), specs=specs) == {
        "up": P("fsdp", "model"),
        "down": P(None, "fsdp"),
        "stack": P(None, "fsdp"),
    }


def test_fsdp_leaves_alone_what_it_cannot_or_should_not_split():
    params = {"vector": like(8), "odd": like(3, 5), "scalar": like(), "done": like(8, 8)}
    specs = {"vector": P("model"), "odd": None, "scalar": None, "done": P("fsdp")}
    expected = {"vector": P("model"), "odd": P(), "scalar": P(), "done": P("fsdp")}
    assert fsdp_specs(params, mesh_of(), specs=specs) == expected


def test_fsdp_over_an_axis_the_mesh_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"no axis 'fsdp' in the mesh data=8"):
        fsdp_specs(PARAMS, mesh_of(data=8))


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((16, 64), P(), P("data")),
        ((12, 16, 64), P(), P(None, None, "data")),  # 8 does not divide 12: the largest
        ((16, 64), P("model"), P("model", "data")),  # not within the parts of a later axis
        ((16, 64), P("early"), P(("early", "data"))),
        ((8, 64), P("early"), P("early", "data")),  # 4 rows on a device are too few for 8 parts
        ((16,), P("model"), P(("data", "model"))),  # unless there is no other; in the mesh's order
        ((16, 64), P(None, "data"), P(None, "data")),
        ((12, 20), P(), P()),
        ((), P(), P()),
        ((0, 8), P(), P()),
    ],
)
def test_zero_adds_its_axis_to_the_first_dimension_or_the_largest(shape, spec, expected):
    mesh = jax.sharding.AbstractMesh((2, 8, 2), ("early", "data", "model"))
    assert zero_specs(like(*shape), spec, mesh, ("data",)) == expected


def test_each_of_several_zero_axes_finds_its_own_dimension():
    mesh = mesh_of()
    assert zero_specs(like(8, 4), P(), mesh, ("data", "fsdp")) == P(("data", "fsdp"))
    assert zero_specs(like(2, 4), P(), mesh, ("data", "fsdp")) == P("data", "fsdp")


@pytest.mark.parametrize(
    ("over", "message"),
    [(("date",), "no axis 'date' in the mesh data=2"), (("data", "data"), "'data' comes twice")],
)
def test_zero_axes_that_make_no_sense_are_refused(over, message):
    with pytest.raises(ValueError, match=message):
        zero_specs(PARAMS, None, mesh_of(), over)


def test_what_stays_whole_is_listed_with_its_bytes_on_a_device():
    params = {"w": like(16, 6), "odd": like(3, 6, dtype=jnp.bfloat16), "s": like(), "e": like(0)}
    mesh = mesh_of()
    specs = zero_specs(params, {"w": P(), "odd": P(None, "model"), "s": P(), "e": P()}, mesh, ())
    assert [u.path for u in undivided(params, specs, mesh, ("fsdp",))] == [
        "['odd']",
        "['s']",
        "['w']",
    ]
    specs = zero_specs(params, specs, mesh, ("fsdp",))
    assert undivided(params, specs, mesh, ("fsdp",)) == [
        Undivided("['odd']", (3, 6), 18),
        Undivided("['s']", (), 4),
    ]


MESHES = [(2, 2, 2), (8, 1, 1), (1, 4, 2), (4, 1, 2), (1, 1, 1), (2, 3, 1), (3, 2, 1)]


@st.composite
def _layouts(draw):
    """A mesh of at most eight devices, a shape, and a legal spec for it."""
    sizes = dict(zip(SIZES, draw(st.sampled_from(MESHES)), strict=True))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 12, 16]), max_size=4)))
    entries, local = [()] * len(shape), list(shape)
    for axis in sizes:  # in the order of the mesh, as is legal
        d = draw(st.integers(0, len(shape)))
        if d < len(shape) and local[d] % sizes[axis] == 0:
            entries[d] += (axis,)
            local[d] //= sizes[axis]
    return make_mesh(sizes), shape, P(*entries)


@hypothesis.given(_layouts(), st.sampled_from([(), ("data",), ("fsdp", "data")]))
def test_whatever_is_added_to_a_legal_spec_is_legal_and_keeps_what_was_there(layout, over):
    mesh, shape, spec = layout
    param, before = like(*shape), NamedSharding(mesh, spec).shard_shape(shape)
    check_specs(param, spec, mesh)
    zero = zero_specs(param, spec, mesh, over)
    for more in (zero, fsdp_specs(param, mesh, specs=spec)):
        check_specs(param, more, mesh)
        after = NamedSharding(mesh, more).shard_shape(shape)
        assert all(a <= b for a, b in zip(after, before, strict=True))
    # Where an axis came in, all are in the order of the mesh.
    order = list(mesh.shape).index
    for old, new in zip(entries_of(spec, len(shape)), entries_of(zero, len(shape)), strict=True):
        assert new == old or list(new) == sorted(new, key=order)
    # An axis is left out only if it divides no dimension.
    local = NamedSharding(mesh, zero).shard_shape(shape)
    used = {axis for axes in entries_of(zero, len(shape)) for axis in axes}
    for axis in set(over) - used:
        assert 0 in shape or all(n % mesh.shape[axis] for n in local)
