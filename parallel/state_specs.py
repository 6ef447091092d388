"""Layouts of optimizer state, decided leaf by leaf from shapes, for any optax-style optimizer.

A leaf of the state belongs to the parameter whose path its own path ends with: ``mu["w"]`` to
``["w"]``, below any wrapper. Its layout then follows from the two shapes. A tree structure alone
would not do: Adafactor keeps vectors, and arrays of one element, in the places of matrices.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec

from jaxopt_suite.parallel import specs as layouts
from jaxopt_suite.parallel.specs import AnyMesh

_LONG = 2**16  # elements from which on a vector is spread: below, what is saved is not worth it
_BLOCK = 64  # entries of a row that a number is for, at least: with fewer it may be a rank

_Path = tuple[Any, ...]
_Owner = tuple[tuple[int, ...], PartitionSpec]  # shape and layout of a parameter


def state_specs(
    tx: optax.GradientTransformation,
    params_like: Any,
    param_specs: Any,
    mesh: AnyMesh,
    *,
    shard_state_over: Sequence[str] = (),
    worker_axis: str | None = None,
) -> Any:
    """A PartitionSpec for every leaf of an optimizer's state.

    A leaf that belongs to a parameter

    - has the parameter's spec, if it has its shape;
    - else takes over the entries of those of its dimensions that are the parameter's: the rows and
      columns of a factored moment, what ``keepdims`` left, the long side of a projection, the
      trailing dimensions of a stack of copies; one number for a block of each row lies where the
      block does, if no block is cut;
    - and is split over ``shard_state_over`` besides. Leaves of the parameter's shape then lie as
      ``zero_specs`` says, so that an elementwise update moves no data between devices.

    A leaf that has nothing in common with a parameter is a stack, such as the blocks ``[n, b, b]``
    of a preconditioner: its leading axis is spread over as many devices as divide it, and no block
    is cut. Scalars and short vectors are whole on every device.

    Args:
      tx: any transformation whose ``init`` can be traced.
      params_like: arrays or ``jax.ShapeDtypeStruct``; what ``tx.init`` would get.
      param_specs: layout of the parameters, as ``broadcast_specs`` takes it.
      mesh: where they lie.
      shard_state_over: axes over which the state of parameters is split although the parameters
        are not: ``("data",)`` is ZeRO-1. ``undivided`` lists what they do not divide.
      worker_axis: the axis whose workers hold states of their own; nothing is spread over it.

    Returns:
      A tree with the structure of ``jax.eval_shape(tx.init, params_like)``.

    Raises:
      ValueError: if ``check_specs`` refuses ``param_specs``, or ``shard_state_over`` has an axis
        that the mesh does not, one twice, or the worker axis.
    """
    layouts.check_specs(params_like, param_specs, mesh, worker_axis=worker_axis)
    if worker_axis in shard_state_over:
        raise ValueError(
            f"shard_state_over has the worker axis {worker_axis!r}, along which states differ"
        )
    zero = layouts.zero_specs(params_like, param_specs, mesh, shard_state_over)
    owners = _owners(params_like, zero)

    def leaf_spec(path: _Path, leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        owner = _owner(owners, path)
        spec = None if owner is None else _follow(leaf.shape, *owner, mesh)
        if spec is None:
            spec = _spread(leaf.shape, mesh, worker_axis)
        if owner is None:
            return spec
        return layouts.split_over(leaf.shape, spec, mesh, shard_state_over)

    return jax.tree_util.tree_map_with_path(leaf_spec, _abstract_state(tx, params_like))


def _abstract_state(tx: optax.GradientTransformation, params_like: Any) -> Any:
    """The state's shapes, from shapes alone: ``init`` need not understand explicit shardings."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(lambda p: p, params_like)
    )
    return jax.eval_shape(tx.init, shapes)


def _owners(params_like: Any, param_specs: Any) -> dict[_Path, _Owner]:
    """Parameters by path, and by every end of it that is the same for no two different ones.

    By the ends because a wrapper may hand only a part of its parameters to the state inside, as
    ``optax.lookahead`` does with its fast ones.
    """
    whole: dict[_Path, _Owner] = {}
    ends: dict[_Path, set[_Owner]] = {}
    for path, leaf, spec in layouts.with_specs(params_like, param_specs):
        whole[path] = (np.shape(leaf), spec)
        for start in range(1, len(path)):
            ends.setdefault(path[start:], set()).add(whole[path])
    return {end: next(iter(found)) for end, found in ends.items() if len(found) == 1} | whole


def _owner(owners: dict[_Path, _Owner], path: _Path) -> _Owner | None:
    """The parameter of which ``path`` ends with most."""
    ends = (path[start:] for start in range(len(path) + 1))
    return next((owners[end] for end in ends if end in owners), None)


def _follow(
    shape: tuple[int, ...], like: tuple[int, ...], spec: PartitionSpec, mesh: AnyMesh
) -> PartitionSpec | None:
    """The layout of a leaf of its parameter's; None where they have no dimension in common."""
    if shape == like or _is_by_block(shape, like, spec, mesh):
        return spec
    pairs = _common(shape, like)
    is_stack = len(shape) > len(like)
    if not pairs or (is_stack and len(pairs) < len(like)):
        return None
    entries: list[tuple[str, ...]] = [()] * len(shape)
    given = layouts.entries_of(spec, len(like))
    for i, j in pairs:
        entries[i] = given[j]
    return layouts.spec_of(entries)


def _is_by_block(
    shape: tuple[int, ...], like: tuple[int, ...], spec: PartitionSpec, mesh: AnyMesh
) -> bool:
    """Whether a leaf has a number, such as a scale, for each block of a row, and none is cut."""
    if not shape or not like or shape[:-1] != like[:-1] or 0 in shape or like[-1] % shape[-1]:
        return False
    across = layouts.entries_of(spec, len(like))[-1]
    return like[-1] // shape[-1] >= _BLOCK and shape[-1] % layouts.parts(mesh, across) == 0


def _common(shape: tuple[int, ...], like: tuple[int, ...]) -> list[tuple[int, int]]:
    """Which dimension of ``shape`` is which of ``like``, as pairs of positions.

    The longest common subsequence of the sizes; of several, the one with most dimensions in their
    places. These are counted from the front, after the leading ones by which ``shape`` has more.
    """
    extra = max(len(shape) - len(like), 0)

    @functools.cache
    def best(i: int, j: int) -> tuple[int, int, tuple[tuple[int, int], ...]]:
        if i == len(shape) or j == len(like):
            return 0, 0, ()
        options = [best(i + 1, j), best(i, j + 1)]
        if shape[i] == like[j]:
            length, in_place, pairs = best(i + 1, j + 1)
            options.append((length + 1, in_place + (i == j + extra), ((i, j), *pairs)))
        return max(options, key=lambda option: option[:2])

    return list(best(0, 0)[2])


def _spread(shape: tuple[int, ...], mesh: AnyMesh, worker_axis: str | None) -> PartitionSpec:
    """The leading axis over as many devices as divide it."""
    if 0 in shape or (len(shape) < 2 and np.prod(shape) < _LONG):
        return PartitionSpec()
    axes = [a for a, size in mesh.shape.items() if size > 1 and a != worker_axis]
    choices = itertools.chain.from_iterable(
        itertools.combinations(axes, n) for n in range(len(axes) + 1)
    )
    legal = [choice for choice in choices if shape[0] % layouts.parts(mesh, choice) == 0]
    return layouts.spec_of([max(legal, key=lambda choice: layouts.parts(mesh, choice))])
