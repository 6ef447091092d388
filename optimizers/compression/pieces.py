"""Arrays in one buffer, and in pieces of which every worker owns one.

A worker collects its piece of every array from all, and tells all what it made of it. All arrays of
a step travel in one buffer a phase; on a mesh with more axes, those that lie over different ones
cannot share a buffer, and there is one for every such set of axes.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.core.collectives import gather_equal

_LINE = 128


def to_bytes(payloads: Any) -> jax.Array:
    """The arrays of a pytree, end to end and padded to whole lines: uint8 ``[bytes]``.

    A line is 128 bytes. Of an all-gather of anything else XLA may make, for a TPU, an all-reduce of
    the whole result, which sends twice as much.
    """
    cast = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint8).ravel()
    buffer = jnp.concatenate([cast(x) for x in jax.tree.leaves(payloads)])
    return jnp.pad(buffer, (0, -len(buffer) % _LINE))


def from_bytes(buffer: jax.Array, like: Any) -> Any:
    """The inverse of ``to_bytes``, for a pytree of arrays of the same shapes and dtypes."""
    leaves, structure = jax.tree.flatten(like)
    found, start = [], 0
    for x in leaves:
        width = jnp.dtype(x.dtype).itemsize
        shape = x.shape if width == 1 else (*x.shape, width)
        stop = start + math.prod(shape)
        found.append(jax.lax.bitcast_convert_type(buffer[start:stop].reshape(shape), x.dtype))
        start = stop
    return structure.unflatten(found)


def piece_length(size: int, workers: int, block: int) -> int:
    """Elements in each worker's piece of a message: whole blocks, the last padded with zeros."""
    return -(-size // (workers * block)) * block


def cut(x: jax.Array, workers: int, block: int) -> jax.Array:
    """``x`` flat, in one piece a worker: ``[workers, length]``, whole blocks, padded with zeros."""
    length = piece_length(x.size, workers, block)
    return jnp.pad(x.ravel(), (0, workers * length - x.size)).reshape(workers, length)


def join(pieces: jax.Array, shape: tuple[int, ...], size: int) -> jax.Array:
    """The array of this shape and size of which ``pieces`` are the pieces."""
    return pieces.ravel()[:size].reshape(shape)


def entries(size: int, length: int, owner: jax.Array) -> jax.Array:
    """How many entries of a worker's piece are not padding, int32 ``[]``."""
    return jnp.clip(size - owner * length, 0, length)


def to_owners(payloads: Sequence[Any], axis_name: str) -> list[Any]:
    """Sends each piece to its owner: one all-to-all of bytes.

    Args:
      payloads: pytrees of arrays ``[workers, ...]``: row j is for worker j.
      axis_name: the workers' axis.

    Returns:
      The same pytrees: row j is what worker j sent here.
    """

    def send(members: list[Any]) -> list[Any]:
        buffers = core.vary(jax.vmap(to_bytes)(members), axis_name)
        # Under vmap an all-to-all of what is equal on all workers is an error of JAX.
        buffers = buffers + jnp.uint8(0) * jax.lax.axis_index(axis_name).astype(jnp.uint8)
        rows = jax.lax.all_to_all(buffers, axis_name, 0, 0, tiled=True)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), members)
        return jax.vmap(lambda row: from_bytes(row, one))(rows)

    return by_axes(send, payloads, axis_name)


def to_all(payloads: Sequence[Any], axis_name: str) -> list[Any]:
    """Tells all workers what each has made of its piece: one all-gather of bytes.

    Args:
      payloads: pytrees of arrays, this worker's.
      axis_name: the workers' axis.

    Returns:
      The same pytrees with a leading axis of workers, equal on all of them.
    """

    def send(members: list[Any]) -> list[Any]:
        rows = gather_equal(to_bytes(members), axis_name)
        return jax.vmap(lambda row: from_bytes(row, members))(rows)

    return by_axes(send, payloads, axis_name)


def by_axes(
    send: Callable[[list[Any]], list[Any]], payloads: Sequence[Any], axis_name: str
) -> list[Any]:
    """``send`` once for all payloads that lie over the same mesh axes.

    Args:
      send: takes and gives a list, each element for itself.
      payloads: pytrees of arrays.
      axis_name: the workers' axis, over which all are made to vary.
    """
    groups: dict[Any, list[int]] = {}
    payloads = [core.vary(payload, axis_name) for payload in payloads]
    for i, payload in enumerate(payloads):
        groups.setdefault(axes_of_tree(payload), []).append(i)
    received: list[Any] = [None] * len(payloads)
    for axes, members in groups.items():
        same = [core.vary(payloads[i], tuple(axes)) for i in members]
        for i, payload in zip(members, send(same), strict=True):
            received[i] = payload
    return received


def axes_of_tree(tree: Any) -> frozenset[str]:
    """The manual mesh axes along which an array of the tree may differ."""
    return frozenset().union(*map(core.varying_axes, jax.tree.leaves(tree)))
