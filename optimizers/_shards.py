"""Running a link on what each device holds: one ``shard_map`` over all axes but the workers'."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

Path = tuple[Any, ...]


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a spec uses, in the order of the dimensions."""
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec]
    return tuple(axis for entry in entries for axis in entry)


def free_axes() -> dict[str, int]:
    """The sizes of the axes of the context's mesh that the partitioner has, those of one left out.

    None under ``vmap``: a simulated worker is on one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = (axis for axis in mesh.axis_names if axis not in mesh.manual_axes)
    return {axis: mesh.shape[axis] for axis in free if mesh.shape[axis] > 1}


def automatic_axes(axis_name: str) -> tuple[str, ...]:
    """The mesh axes around ``axis_name`` that are left to the partitioner; none under ``vmap``."""
    mesh = jax.sharding.get_abstract_mesh()
    if axis_name not in mesh.manual_axes:
        return ()
    return tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes)


def aligned_specs(paths: Sequence[Path], param_specs: Any) -> list[PartitionSpec]:
    """The spec of each leaf, by path: a wrapper may have left other leaves out of the updates.

    Raises:
      ValueError: if there is none for a leaf.
    """
    is_spec = lambda x: x is None or isinstance(x, PartitionSpec)
    given = jax.tree_util.tree_leaves_with_path(param_specs, is_leaf=is_spec)
    by_path = {path: PartitionSpec() if spec is None else spec for path, spec in given}
    for path in paths:
        if path not in by_path:
            legal = ", ".join(jax.tree_util.keystr(p) for p in by_path) or "none"
            where = jax.tree_util.keystr(path)
            raise ValueError(f"param_specs has no PartitionSpec for {where}; it has: {legal}")
    return [by_path[path] for path in paths]


def layout_of(
    paths: Sequence[Path], param_specs: Any, axis_name: str
) -> tuple[tuple[str, ...], list[PartitionSpec]]:
    """The axes to run on the shards of, for ``run_on_shards``, and the spec of each leaf.

    Args:
      paths: of the leaves; where there are none, there are no axes either.
      param_specs: as an update is given them; None: every leaf is taken whole.
      axis_name: the workers' axis.

    Raises:
      ValueError: as ``aligned_specs``.
    """
    axes = automatic_axes(axis_name) if paths and param_specs is not None else ()
    return axes, aligned_specs(paths, param_specs) if axes else [PartitionSpec()] * len(paths)


def keys_of_parts(
    keys: Sequence[jax.Array] | jax.Array, specs: Sequence[PartitionSpec]
) -> list[jax.Array]:
    """A random key for each leaf, another for every part of it that a device holds."""
    return [
        jax.random.fold_in(key, jax.lax.axis_index(axes_of(spec))) if axes_of(spec) else key
        for key, spec in zip(keys, specs, strict=True)
    ]


def run_on_shards(
    fn: Callable[..., Any], args: Any, specs: Any, *, like: int, axes: tuple[str, ...]
) -> Any:
    """``fn(*args)`` on each device's parts of the arguments.

    Args:
      fn: takes and returns pytrees of arrays.
      args: its arguments, whole.
      specs: their layouts, a tree like ``args``.
      like: the argument whose structure and layouts the result has.
      axes: over which they lie. None: ``fn`` is simply called.
    """
    if not axes:
        return fn(*args)
    run = jax.shard_map(fn, in_specs=specs, out_specs=specs[like], axis_names=set(axes))
    return run(*args)
