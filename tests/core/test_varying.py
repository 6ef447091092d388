"""Varying and invariant: what is read, what a cast changes, and what it does to gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_suite.core.varying import vary, varying_axes
from jaxopt_suite.parallel.meshes import make_mesh

SPLIT = P("data", "model")


def on_mesh(fn, *args, **options):
    """``fn`` of one device's parts, for arguments split over both axes of a 4 by 2 mesh."""
    mesh = make_mesh({"data": 4, "model": 2})
    options = {"in_specs": SPLIT, "out_specs": SPLIT, **options}
    return jax.shard_map(fn, mesh=mesh, **options)(*args)


def test_axes_are_read_off_the_type_and_a_cast_adds_only_what_is_missing():
    seen = []

    def local(x):
        total = jax.lax.psum(x, "data")
        for value in (x, total, jnp.float32(1), vary(total, "data"), vary(1.0 * total, "model")):
            seen.append(varying_axes(value))
        tree = vary({"a": x, "b": (total, None)}, ("data", "model"))
        seen.extend(varying_axes(value) for value in jax.tree.leaves(tree))
        return x

    on_mesh(local, jnp.ones((4, 2)))
    both = {"data", "model"}
    assert seen == [both, {"model"}, set(), both, {"model"}, both, both]


def test_values_stay_as_they_are():
    x = jnp.arange(8.0).reshape(4, 2)
    got = on_mesh(lambda x: x + vary(jnp.float32(3), ("data", "model")), x)
    np.testing.assert_array_equal(got, x + 3)


@pytest.mark.parametrize("axis_names", ["data", ("data", "elsewhere")])
def test_outside_of_shard_map_and_under_vmap_nothing_happens(axis_names):
    x = jnp.arange(3.0)
    assert vary(x, axis_names) is x
    assert varying_axes(x) == frozenset()
    got = jax.vmap(lambda x: jax.lax.psum(vary(x, axis_names), "data"), axis_name="data")(x)
    np.testing.assert_array_equal(got, [3.0] * 3)


def test_axes_that_are_not_manual_are_passed_over():
    """As in a step whose worker axis is manual and whose other axes are the partitioner's."""
    seen = []

    def local(x):
        seen.append(varying_axes(vary(jnp.float32(1), ("data", "model"))))
        return x

    spec = P("data")
    on_mesh(local, jnp.ones((4, 2)), in_specs=spec, out_specs=spec, axis_names={"data"})
    assert seen == [{"data"}]


def test_the_gradient_with_respect_to_varying_parameters_is_the_workers_own():
    x = jnp.arange(1.0, 9.0).reshape(4, 2)
    loss = lambda w, x: jnp.sum(w * x)

    def gradients(w, x, *, own):
        w = vary(w, ("data", "model")) if own else w
        return jnp.broadcast_to(jax.grad(loss)(w, x), x.shape)

    def run(own, out):
        fn = functools.partial(gradients, own=own)
        return on_mesh(fn, jnp.float32(2), x, in_specs=(P(), SPLIT), out_specs=out)

    np.testing.assert_array_equal(run(True, SPLIT), x)
    np.testing.assert_array_equal(run(False, P()), [[36.0]])  # summed over all by JAX
