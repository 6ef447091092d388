"""Putting arrays where they belong: before a step, and inside one."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

from jaxopt_suite.parallel.meshes import BATCH_AXES


def place(tree: Any, shardings: Any) -> Any:
    """Arrays laid out as ``shardings`` say; every process gives the same, whole arrays.

    Args:
      tree: NumPy or JAX arrays. One that lies as it should is passed through; of any other, a
        process copies what its own devices hold.
      shardings: one for all, or a prefix tree.
    """
    if isinstance(shardings, Sharding):
        return jax.tree.map(lambda x: _place(x, shardings), tree)
    return jax.tree.map(_place, tree, shardings)


def _place(x: Any, sharding: Sharding) -> jax.Array:
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda y: y, out_shardings=sharding)(x)  # every process takes part
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def constrain(tree: Any, specs: Any) -> Any:
    """Tells the partitioner how to lay out each leaf over the automatic axes of the context.

    Args:
      tree: arrays being traced.
      specs: their PartitionSpecs; None where there is no mesh.
    """
    if specs is None:
        return tree
    mesh = jax.sharding.get_abstract_mesh()
    return jax.tree.map(
        lambda x, spec: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)), tree, specs
    )


def split_batch(x: jax.Array) -> jax.Array:
    """Splits the first axis of an activation over the batch axes of the context's mesh.

    Without it the partitioner may rather split an activation as the next layer's parameters are
    split, and add up partial sums of activations where it should have gathered parameters.

    Args:
      x: [batch, ...]; returned as it is where no mesh, or no automatic axis that splits batches,
        is in context.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = tuple(
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if name in BATCH_AXES and kind == AxisType.Auto
    )
    if not names:
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(names, *rest)))
