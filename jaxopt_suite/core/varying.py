"""Varying and invariant: JAX's types for what differs between the devices of a manual mesh axis.

Inside ``jax.shard_map`` a value either may differ from device to device along an axis (varying) or
is the same on all of them (invariant). Scan carries, the branches of a conditional and the operands
of a collective must agree in this. Under ``vmap`` and outside of both there are no such types.
"""

from collections.abc import Callable, Sequence
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


def alike(branches: Sequence[Callable[..., Any]], *operands: Any) -> list[Callable[..., Any]]:
    """The branches of a conditional, with results of one type: varying where any of theirs is.

    ``jax.lax.cond`` and ``jax.lax.switch`` do not cast a value that is equal on all devices in one
    branch and differs between them in another.

    Args:
      branches: functions of the operands, whose results have one structure.
      *operands: what they will be called with.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return list(branches)  # no types: all are alike, and a trace is saved
    rows: list[list[frozenset[str]]] = []
    for branch in branches:
        # Noted while it is traced: what eval_shape returns does not tell types on every mesh.
        note = lambda *args, branch=branch: rows.append(
            [varying_axes(x) for x in jax.tree.leaves(branch(*args))]
        )
        jax.eval_shape(note, *operands)
    axes = [tuple(frozenset().union(*column)) for column in zip(*rows, strict=True)]

    def cast(branch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            leaves, structure = jax.tree.flatten(branch(*args))
            return structure.unflatten([vary(x, a) for x, a in zip(leaves, axes, strict=True)])

        return run

    return [cast(branch) for branch in branches]
