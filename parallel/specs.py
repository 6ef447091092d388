"""Layouts of parameters: one PartitionSpec for each, checked, split further for FSDP and ZeRO-1."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxopt_suite.parallel.meshes import format_mesh

AnyMesh = Mesh | AbstractMesh


class Undivided(NamedTuple):
    """An array that the axes it was to be split over do not divide."""

    path: str  # as ``jax.tree_util.keystr`` writes it
    shape: tuple[int, ...]  # of the whole array
    nbytes: int  # on each device


def broadcast_specs(params_like: Any, specs: Any) -> Any:
    """One PartitionSpec for every parameter.

    Args:
      params_like: arrays or ``jax.ShapeDtypeStruct``.
      specs: the same tree with a PartitionSpec for each leaf. A PartitionSpec in the place of a
        subtree holds for all of its leaves; so does ``None``, which stands for ``P()``: whole on
        every device.

    Returns:
      A tree with the structure of ``params_like``.

    Raises:
      ValueError: if the trees do not fit (the message says where).
      TypeError: if something else than a PartitionSpec or ``None`` stands for a leaf.
    """
    is_spec = lambda x: x is None or isinstance(x, PartitionSpec)
    try:
        full = jax.tree.broadcast(specs, params_like, is_leaf=is_spec)
    except ValueError as error:
        raise ValueError(
            f"the specs do not have the structure of the parameters: {error}"
        ) from None
    given = jax.tree.structure(params_like).flatten_up_to(full)
    for spec in given:
        if not is_spec(spec):
            raise TypeError(
                f"a spec is a jax.sharding.PartitionSpec or None, got {spec!r} "
                f"of type {type(spec).__name__}"
            )
    whole = PartitionSpec()
    return jax.tree.map(lambda _, spec: whole if spec is None else spec, params_like, full)


def check_specs(
    params_like: Any, specs: Any, mesh: AnyMesh, *, worker_axis: str | None = None
) -> None:
    """Refuses specs that the mesh cannot carry out.

    Args:
      params_like: arrays or ``jax.ShapeDtypeStruct``.
      specs: as ``broadcast_specs`` takes them.
      mesh: where the parameters are to lie.
      worker_axis: the axis whose workers hold parameters of their own; no spec may use it.

    Raises:
      ValueError: if a spec names an axis that the mesh does not have, an axis twice or the worker
        axis, has more entries than the array has dimensions, splits a dimension into parts of
        unequal size, or by axes in another order than that of the mesh. The message has the
        parameter's path, its spec and shape, and the mesh.
      TypeError: as ``broadcast_specs``.
    """
    for path, leaf, spec in with_specs(params_like, specs):
        shape = np.shape(leaf)
        problem = _problem(shape, spec, mesh, worker_axis)
        if problem:
            raise ValueError(
                f"parameter {jax.tree_util.keystr(path) or '(the only one)'}: {problem}. "
                f"Its spec is {spec}, its shape {shape}, the mesh {format_mesh(mesh.shape)}"
            )


def with_specs(tree: Any, specs: Any) -> list[tuple[tuple[Any, ...], Any, PartitionSpec]]:
    """Path, leaf and spec of every leaf; ``specs`` as ``broadcast_specs`` takes them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    full = jax.tree.leaves(broadcast_specs(tree, specs))
    return [(path, leaf, spec) for (path, leaf), spec in zip(leaves, full, strict=True)]


def fsdp_specs(params_like: Any, mesh: AnyMesh, *, axis: str = "fsdp", specs: Any = None) -> Any:
    """Splits every parameter over one more axis: its largest dimension that can be.

    Sizes are counted after what ``specs`` split already, and dimensions split over later axes of
    the mesh come last: a matrix that lies over a tensor axis is split along its other dimension.

    Args:
      params_like: arrays or ``jax.ShapeDtypeStruct``.
      mesh: where the parameters are to lie.
      axis: of the mesh. Specs that use it already stay as they are.
      specs: layouts to start from, as ``broadcast_specs`` takes them.

    Returns:
      A PartitionSpec for every parameter. Scalars, vectors and arrays none of whose dimensions the
      axis divides keep theirs.

    Raises:
      ValueError: if the mesh does not have the axis, or as ``check_specs``.
    """
    check_axes(mesh, (axis,))
    check_specs(params_like, specs, mesh)

    def split(leaf: Any, spec: PartitionSpec) -> PartitionSpec:
        shape = np.shape(leaf)
        return spec if len(shape) < 2 else _add(shape, spec, mesh, axis, first=False)

    return jax.tree.map(split, params_like, broadcast_specs(params_like, specs))


def zero_specs(params_like: Any, param_specs: Any, mesh: AnyMesh, over: Sequence[str]) -> Any:
    """The layout of gradients, moments and updates under ZeRO-1.

    Args:
      params_like: arrays or ``jax.ShapeDtypeStruct``.
      param_specs: layout of the parameters, as ``broadcast_specs`` takes them.
      mesh: where they lie.
      over: axes to split over besides.

    Returns:
      A PartitionSpec for every parameter: ``split_over`` of its shape and spec.

    Raises:
      ValueError: if the mesh does not have one of the axes, or one comes twice.
    """
    check_axes(mesh, over)
    return jax.tree.map(
        lambda leaf, spec: split_over(np.shape(leaf), spec, mesh, over),
        params_like,
        broadcast_specs(params_like, param_specs),
    )


def split_over(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: AnyMesh, over: Iterable[str]
) -> PartitionSpec:
    """``spec`` with the axes ``over`` added, as far as they divide an array of this shape.

    An axis goes to the first dimension if its size on a device can be divided, since the parts are
    then contiguous; else to the largest one that can be. Dimensions split over later axes of the
    mesh come last: there, parts would not lie within the parts that are there already, and more
    data would move between the two layouts. Axes that the spec uses stay where they are.
    """
    for axis in over:
        spec = _add(shape, spec, mesh, axis, first=True)
    return spec


def undivided(tree_like: Any, specs: Any, mesh: AnyMesh, over: Sequence[str]) -> list[Undivided]:
    """What is not split over all of the axes ``over``: scalars, and sizes they do not divide.

    Args:
      tree_like: arrays or ``jax.ShapeDtypeStruct``, parameters or optimizer state.
      specs: their layout, such as ``state_specs`` gives.
      mesh: where they lie.
      over: as was given to ``zero_specs`` or ``state_specs``.

    Raises:
      ValueError: if the mesh does not have one of the axes, or one comes twice.
    """
    check_axes(mesh, over)
    left = []
    for path, leaf, spec in with_specs(tree_like, specs):
        entries = entries_of(spec, leaf.ndim)
        used = {axis for axes in entries for axis in axes}
        elements = math.prod(_local_shape(leaf.shape, entries, mesh))
        if elements and not used.issuperset(over):
            name = jax.tree_util.keystr(path)
            left.append(Undivided(name, leaf.shape, elements * leaf.dtype.itemsize))
    return left


def check_axes(mesh: AnyMesh, axes: Sequence[str]) -> None:
    """Refuses axes that the mesh does not have, and axes that come twice."""
    for i, axis in enumerate(axes):
        if axis not in mesh.shape:
            raise ValueError(f"there is no axis {axis!r} in the mesh {format_mesh(mesh.shape)}")
        if axis in axes[:i]:
            raise ValueError(f"axis {axis!r} comes twice in {tuple(axes)}")


def entries_of(spec: PartitionSpec, rank: int) -> list[tuple[str, ...]]:
    """The mesh axes of each of ``rank`` dimensions; the last axis of several changes fastest."""
    given = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return given + [()] * (rank - len(given))


def spec_of(entries: Sequence[tuple[str, ...]]) -> PartitionSpec:
    """The inverse of ``entries_of``, without entries for whole dimensions at the end."""
    used = max((d + 1 for d, axes in enumerate(entries) if axes), default=0)
    return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in entries[:used]))


def parts(mesh: AnyMesh, axes: Iterable[str]) -> int:
    """Into how many parts these axes split a dimension."""
    return math.prod(mesh.shape[axis] for axis in axes)


def _add(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: AnyMesh, axis: str, *, first: bool
) -> PartitionSpec:
    """``spec`` with one axis more, where that divides: see ``split_over``."""
    entries = entries_of(spec, len(shape))
    if any(axis in axes for axes in entries):
        return spec
    local = _local_shape(shape, entries, mesh)
    fits = [d for d, n in enumerate(local) if 0 not in shape and n % mesh.shape[axis] == 0]
    if not fits:
        return spec
    order = list(mesh.shape).index
    fits = [d for d in fits if all(order(a) < order(axis) for a in entries[d])] or fits
    chosen = 0 if first and 0 in fits else max(fits, key=local.__getitem__)
    # In the order of the mesh: XLA is seen to compute wrong values more often in another. On a mesh
    # data=2,fsdp=2,model=2, m @ q.T with m over P(("fsdp", "data"), "model"), q over
    # P("data", "model") and the result over P("fsdp", "model") is wrong in JAX 0.10.2 and 0.12.
    entries[chosen] = tuple(sorted((*entries[chosen], axis), key=order))
    return spec_of(entries)


def _local_shape(
    shape: tuple[int, ...], entries: Sequence[tuple[str, ...]], mesh: AnyMesh
) -> tuple[int, ...]:
    return tuple(n // parts(mesh, axes) for n, axes in zip(shape, entries, strict=True))


def _problem(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: AnyMesh, worker_axis: str | None
) -> str | None:
    """What is wrong with a spec, if anything."""
    if spec.unreduced or spec.reduced:
        return "parameters are values, not partial sums: unreduced and reduced have no meaning here"
    if len(spec) > len(shape):
        return f"{len(spec)} entries for {len(shape)} dimensions"
    if PartitionSpec.UNCONSTRAINED in tuple(spec):
        return "a layout says where every dimension lies: UNCONSTRAINED does not"
    entries = entries_of(spec, len(shape))
    used = [axis for axes in entries for axis in axes]
    for axis in used:
        if axis not in mesh.shape:
            return f"the mesh has no axis {axis!r}"
        if axis == worker_axis:
            return f"{axis!r} is the worker axis, and every worker holds parameters of its own"
        if used.count(axis) > 1:
            return f"axis {axis!r} comes twice"
    order = list(mesh.shape)
    for axes in entries:
        if list(axes) != sorted(axes, key=order.index):
            # XLA's partitioner (JAX 0.10 and 0.12) got matrix products of such layouts wrong.
            return f"the axes of one dimension must come in the order of the mesh, got {axes}"
    for d, (size, axes) in enumerate(zip(shape, entries, strict=True)):
        if size % parts(mesh, axes):
            return (
                f"dimension {d} of size {size} cannot be split into {parts(mesh, axes)} equal parts"
            )
    return None
