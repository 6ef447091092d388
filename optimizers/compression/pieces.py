"""Two phases: each worker owns a piece of every array, collects it from all, and tells them all.

For methods whose owners do something of their own between the phases. All arrays of a step travel
in one buffer a phase; on a mesh with more axes, those that lie over different ones cannot share a
buffer, and there is one for every such set of axes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.core.collectives import gather_equal
from jaxopt_suite.optimizers.compression.exchange import from_bytes, piece_length, to_bytes


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
        axes = frozenset().union(*map(core.varying_axes, jax.tree.leaves(payload)))
        groups.setdefault(axes, []).append(i)
    received: list[Any] = [None] * len(payloads)
    for axes, members in groups.items():
        same = [core.vary(payloads[i], tuple(axes)) for i in members]
        for i, payload in zip(members, send(same), strict=True):
            received[i] = payload
    return received
