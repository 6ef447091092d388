"""Varying and invariant: JAX's types for what differs between the devices of a manual mesh axis.

Inside ``jax.shard_map`` a value either may differ from device to device along an axis (varying) or
is the same on all of them (invariant). Scan carries, the branches of a conditional and the operands
of a collective must agree in this. Under ``vmap`` and outside of both there are no such types.
"""

from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[str]:
    """The manual mesh axes along which ``x`` may differ; empty where there are none."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(tree: Any, axis_names: str | tuple[str, ...]) -> Any:
    """``tree`` with every array typed as varying over ``axis_names``; its values stay as they are.

    Free in the forward pass; the transposed cast is a sum over the axis. So the gradient with
    respect to ``vary(params, axis)`` is this worker's own, where the one with respect to invariant
    parameters has been summed over all workers already.

    Args:
      tree: a pytree of arrays.
      axis_names: axes of the surrounding ``shard_map``. Ones that are not manual there, as under
        ``vmap``, have no types and are passed over.
    """
    names = (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)
    manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)

    def cast(x: Any) -> Any:
        missing = tuple(n for n in names if n in manual and n not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
