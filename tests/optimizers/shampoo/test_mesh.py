"""Stacks spread over a mesh: what arrives where, what crosses, and that no result depends on it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_suite import parallel
from jaxopt_suite.optimizers.shampoo import routes, shampoo, stacked
from jaxopt_suite.optimizers.shampoo.blocks import Cutting
from jaxopt_suite.parallel import wire

MESH = {"data": 2, "fsdp": 2, "model": 2}
SHAPES = {
    "columns": (12, 20),
    "rows": (20, 12),
    "both_on_one": (32, 6),
    "tensor": (4, 6, 10),
    "merged": (4, 2, 3),
    "prime": (22, 14),
    "whole": (19, 5),
    "vector": (24,),
    "scalar": (),
    "empty": (0, 3),
}
SPECS = {
    "columns": P("fsdp", "model"),
    "rows": P("model", "fsdp"),
    "both_on_one": P(("fsdp", "model"), None),
    "tensor": P(None, "model", None),
    "merged": P("data", "fsdp", None),  # cut along the second of three that become one
    "prime": P("fsdp", None),  # parts of eleven, blocks of eight
    "whole": P(),
    "vector": P("fsdp"),
    "scalar": P(),
    "empty": P(),
}


def leaves(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in SHAPES.items()}


def on_mesh(fn, mesh, *args):
    """``fn`` compiled with the mesh as its context, as a train step has it."""

    def in_context(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return jax.jit(in_context)(*args)


def placed(mesh, tree):
    return {name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in tree.items()}


@pytest.mark.parametrize("block_size", [5, 8])
def test_owners_get_the_blocks_and_holders_get_their_leaves_back_bit_for_bit(block_size):
    cutting, mesh = Cutting(block_size, True, 8), parallel.make_mesh(MESH)
    tree = leaves() | {"columns": leaves(jnp.bfloat16)["columns"]}
    wide = [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
    expected = cutting.blocks(tree).stack(wide)

    def rule(stacks, state, site):
        assert site.devices == 8
        return stacks, stacks

    none = {name: jnp.zeros_like(x) for name, x in expected.items()}
    run = functools.partial(stacked.run, rule, cutting)
    back, seen = on_mesh(lambda t, s: run(t, s, SPECS), mesh, placed(mesh, tree), none)
    assert seen.keys() == expected.keys()
    for name, stack in expected.items():
        np.testing.assert_array_equal(seen[name], stack)
    for name, leaf in tree.items():
        assert back[name].dtype == leaf.dtype
        np.testing.assert_array_equal(back[name], leaf)


def loss(params, batch):
    """Its gradient changes from step to step and has no zeros."""
    terms = jax.tree.map(lambda w: jnp.sum(jnp.sin(3 * w + jnp.mean(batch))), params)
    return sum(jax.tree.leaves(terms))


def steps(tx, mesh, batches):
    step = parallel.make_train_step(loss, tx, mesh, param_specs=None if mesh is None else SPECS)
    state = step.init(leaves(np.float64))
    for batch in batches:
        state, _ = step(state, batch)
    return jax.device_get(state)


@pytest.mark.parametrize(
    "settings",
    [
        {"refresh_every": 2, "graft_scope": "parameter"},
        {"refresh_every": 3, "refresh": "staggered", "momentum": 0.9, "nesterov": True},
    ],
)
def test_steps_on_a_mesh_are_those_of_one_device(settings):
    with jax.enable_x64(True):
        tx = shampoo(0.05, block_size=8, stack_multiple=8, **settings)
        batches = np.random.default_rng(1).normal(size=(5, 8, 3))
        alone, spread = (steps(tx, mesh, batches) for mesh in (None, parallel.make_mesh(MESH)))
        # Float64: what is left are other orders of the same sums, times the condition of the roots.
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_between_gradient_and_update_only_atoms_cross_and_no_state_is_gathered():
    mesh = parallel.make_mesh({"data": 2, "fsdp": 4})
    shapes = {"a": (64, 32), "b": (64, 32), "c": (32, 64), "scale": (16,)}
    specs = {"a": P("fsdp", None), "b": P("fsdp", None), "c": P(None, "fsdp"), "scale": P()}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    tx = shampoo(0.1, block_size=16, stack_multiple=8)
    step = parallel.make_train_step(loss, tx, mesh, param_specs=specs)
    compiled = step.lower(params, jax.ShapeDtypeStruct((8, 3), jnp.float32)).compile()
    found = [c for c in wire.collectives(compiled, mesh) if "shard_map" in c.op_name]
    # All three matrices travel in one lane, as atoms of 16x16 in float32. 24 blocks are three rows
    # a device, of which up to two are in one part: buffers of two cells for each of four parts, of
    # which three quarters leave the device, to the owners and back. The owners at one copy have
    # the first matrix and half of the second, or the rest: up to four of the six atoms of a part,
    # which are gathered, as two times four are no more than two times six.
    atom = 4 * 16 * 16
    exchanged = [c for c in found if c.kind == "all-to-all"]
    assert [c.nbytes for c in exchanged] == [3 / 4 * 4 * 2 * atom] * 2
    copied = {c.axes: c.nbytes for c in found if c.kind == "all-gather"}
    assert copied == {("data",): 4 * atom}
    # The vector is one block on one of eight devices: seven empty slots are more than it twice.
    (summed,) = [c for c in found if c.kind == "all-reduce" and c.nbytes > 8]
    assert (summed.axes, summed.nbytes) == (("data", "fsdp"), 2 * 7 / 8 * 4 * 16)


def test_a_grid_takes_the_longest_atoms_that_parts_and_blocks_allow():
    mesh = {"fsdp": 4, "model": 2}
    make = lambda shape, merged, spec, block: routes.make_grid(shape, merged, spec, block, mesh)
    whole_blocks = make((64, 32), (64, 32), P("fsdp", "model"), 16)
    assert (whole_blocks.atom, whole_blocks.count) == ((16, 16), (1, 1))
    parts_in_blocks = make((64, 32), (64, 32), P("fsdp", "model"), 64)
    assert (parts_in_blocks.atom, parts_in_blocks.parts) == ((16, 16), (4, 2))
    divisor = make((72, 32), (72, 32), P("fsdp"), 8)
    assert (divisor.atom, divisor.count) == ((6, 8), (3, 4))
    prime = make((4 * 13, 32), (52, 32), P("fsdp", "model"), 8)
    assert prime.spec == P(None, "model")
    assert (prime.parts, prime.axes) == ((1, 2), ("model",))
    inner = make((4, 8), (32,), P(None, "model"), 32)
    assert (inner.spec, inner.parts) == (P(None, None), (1,))
