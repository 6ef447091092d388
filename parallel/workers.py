"""One worker's function, run for all workers: simulated on one device, or on a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from jaxopt_suite.core.varying import vary, varying_axes

# An axis of a leaf: 0 where each worker has its own (a leading axis of size workers), None where
# all have the same (no such axis). Trees of them are what vmap calls in_axes and out_axes.
Axes = Any


def run_workers(
    fn: Callable[..., Any],
    *,
    axis_name: str,
    mesh: Mesh | None = None,
    size: int | None = None,
    in_axes: Axes = 0,
) -> Callable[..., Any]:
    """Maps a function written for one worker over the leading axis of its arguments.

    ``fn`` sees one worker's arrays and may call ``jax.lax`` collectives over ``axis_name``. Results
    that may differ between workers come back with a leading axis of size workers; those that JAX's
    types know to be equal on all of them (a constant, a ``psum``) come back once, without it. A
    gradient with respect to an equal argument is summed over the workers on a mesh, by JAX;
    ``core.varying.vary`` the argument first where each worker's own gradient is wanted.

    Args:
      fn: takes and returns pytrees of arrays.
      axis_name: the workers' axis.
      mesh: where to run: with ``jax.shard_map``, manual over ``axis_name`` and automatic over the
        other axes. None: with ``jax.vmap``, all workers on one device.
      size: number of workers; needed only without a mesh and without any mapped argument.
      in_axes: as in ``jax.vmap``, a prefix tree of the arguments: 0 for arrays with the leading
        axis, None for those that all workers share.

    Returns:
      A function of the same arguments.

    Raises:
      ValueError: if the mesh has no such axis, or (when called) the number of workers is not known
        or arrays disagree about it.
    """
    _check_axis(axis_name, mesh)

    def mapped(*args: Any) -> Any:
        args = jax.tree.map(jnp.asarray, args)
        workers = count_workers(args, in_axes, axis_name=axis_name, mesh=mesh, size=size)
        out_axes = result_axes(
            fn, args, axis_name=axis_name, mesh=mesh, size=workers, in_axes=in_axes
        )
        run = map_workers(
            fn, axis_name=axis_name, mesh=mesh, size=workers, in_axes=in_axes, out_axes=out_axes
        )
        return run(*args)

    return mapped


def map_workers(
    fn: Callable[..., Any],
    *,
    axis_name: str,
    mesh: Mesh | AbstractMesh | None,
    size: int,
    in_axes: Axes,
    out_axes: Axes,
) -> Callable[..., Any]:
    """``run_workers`` for a caller who knows which results differ between workers.

    Args:
      fn: the function of one worker.
      axis_name: the workers' axis.
      mesh: as in ``run_workers``.
      size: number of workers.
      in_axes: as in ``run_workers``.
      out_axes: 0 or None for every result. 0 is always right; None is an error of JAX's types
        where the result may differ between workers.
    """
    if mesh is None:
        return jax.vmap(fn, in_axes=in_axes, out_axes=out_axes, axis_name=axis_name, axis_size=size)

    def local(*args: Any) -> Any:
        out = fn(*map_axes(lambda axis, x: x if axis is None else x[0], in_axes, args))
        return map_axes(
            lambda axis, x: x if axis is None else vary(jnp.asarray(x), axis_name)[None],
            out_axes,
            out,
        )

    def spec(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(axis_name)

    specs = [jax.tree.map(spec, axes, is_leaf=_is_none) for axes in (in_axes, out_axes)]
    return jax.shard_map(
        local, mesh=mesh, in_specs=specs[0], out_specs=specs[1], axis_names={axis_name}
    )


def result_axes(
    fn: Callable[..., Any],
    args: Any,
    *,
    axis_name: str,
    mesh: Mesh | None,
    size: int,
    in_axes: Axes,
) -> Axes:
    """Which results of ``fn`` may differ between workers: a tree of 0 and None like its result.

    Read off the types of a trace; nothing is computed and no device is needed, so that the answer
    for a simulated fleet is that for a mesh.
    """
    if mesh is None:
        abstract = AbstractMesh((size,), (axis_name,), axis_types=(AxisType.Auto,))
    else:
        types = (AxisType.Auto,) * len(mesh.axis_names)  # what is explicit is no matter here
        abstract = mesh.abstract_mesh.update(axis_types=types)
    found: list[Axes] = []

    def observed(*local: Any) -> Any:
        out = jax.tree.map(jnp.asarray, fn(*local))
        found.append(jax.tree.map(lambda x: 0 if axis_name in varying_axes(x) else None, out))
        return out

    probe = map_workers(
        observed, axis_name=axis_name, mesh=abstract, size=size, in_axes=in_axes, out_axes=0
    )
    # Values would bring the sharding of another mesh with them.
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    with jax.sharding.use_abstract_mesh(abstract):
        jax.eval_shape(probe, *like)
    return found[-1]


def count_workers(
    args: Any, in_axes: Axes, *, axis_name: str, mesh: Mesh | None, size: int | None = None
) -> int:
    """Number of workers, on which mesh, leading axes and ``size`` must agree."""
    counts = {} if size is None else {"size": size}
    if mesh is not None:
        counts[f"mesh axis {axis_name!r}"] = mesh.shape[axis_name]

    def count(axis: int | None, x: Any) -> None:
        if axis is not None:
            if not x.shape:
                raise ValueError(f"an argument mapped over workers needs a leading axis, got {x}")
            counts[f"an argument of shape {x.shape}"] = x.shape[0]

    map_axes(count, in_axes, args)
    if len(set(counts.values())) != 1:
        found = ", ".join(f"{where}: {n}" for where, n in counts.items()) or "nothing to tell it by"
        raise ValueError(f"the number of workers must be one and the same, got {found}")
    return next(iter(counts.values()))


def _check_axis(axis_name: str, mesh: Mesh | None) -> None:
    if mesh is not None and axis_name not in mesh.axis_names:
        legal = ", ".join(map(repr, mesh.axis_names))
        raise ValueError(f"axis_name must be an axis of the mesh, {legal}, got {axis_name!r}")


def _is_none(x: Any) -> bool:
    return x is None


def map_axes(fn: Callable[[int | None, Any], Any], axes: Axes, tree: Any) -> Any:
    """``fn(axis, leaf)`` for every leaf of ``tree``, of which ``axes`` is a prefix.

    None in ``axes`` is an axis, None in ``tree`` no leaf.
    """
    return jax.tree.map(
        lambda axis, sub: jax.tree.map(lambda x: fn(axis, x), sub), axes, tree, is_leaf=_is_none
    )
