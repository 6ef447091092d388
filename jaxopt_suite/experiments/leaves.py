"""The leaves of a state on their way into a checkpoint and out of it."""

import json
import pathlib
from collections.abc import Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxopt_suite.core.errors import UserError

_Row = tuple[str, list[int], str]  # path, shape and dtype of a leaf


def describe(
    state: Any, *, across_processes: bool = False
) -> tuple[list[_Row], dict[str, jax.Array]]:
    """Path, shape and dtype of every leaf; and the leaves by position, without the empty ones.

    orbax refuses arrays without elements. It is given a flat dict, so that no container type of the
    state (named tuples, ``None``, ``optax.MaskedNode``) depends on its rules.

    Args:
      state: a pytree of arrays.
      across_processes: whether every leaf must lie on devices of several processes.

    Raises:
      TypeError: if a leaf is something else.
      ValueError: if there are no elements at all.
    """
    rows, arrays = [], {}
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
        name = jax.tree_util.keystr(path)
        if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"the state must hold numeric arrays, got {leaf!r} at {name}")
        if across_processes and leaf.is_fully_addressable:
            raise TypeError(
                "with several processes the state must hold arrays over devices of all of them, "
                f"got one of this process alone at {name}"
            )
        rows.append((name, list(leaf.shape), leaf.dtype.name))
        if leaf.size:
            arrays[str(i)] = leaf
    if not arrays:
        raise ValueError(f"the state has no elements to save: {state!r}")
    return rows, arrays


def contents(rows: list[_Row], host: Mapping[str, Any]) -> bytes:
    """The file that says what the leaves are, and holds the caller's data.

    Raises:
      TypeError: if ``host`` does not survive JSON.
    """
    text = json.dumps({"host": dict(host), "leaves": rows})
    if json.loads(text)["host"] != dict(host):
        raise TypeError(f"host must be what JSON gives back (lists, string keys), got {host!r}")
    return text.encode()


def refuse_difference(
    directory: pathlib.Path,
    saved: list[_Row],
    wanted: Mapping[str, Any],
    of_workers: Set[str] = frozenset(),
) -> None:
    """Raises ``UserError`` naming the first leaf that differs, but for the number of workers.

    Args:
      directory: of the checkpoint.
      saved: its leaves.
      wanted: shapes and dtypes by path.
      of_workers: paths of the leaves whose first axis is that of the workers.
    """
    here: list[_Row] = [(p, list(leaf.shape), leaf.dtype.name) for p, leaf in wanted.items()]
    have, want = (_texts(rows, of_workers) for rows in (saved, here))
    for path in [*want, *have]:
        if have.get(path) != want.get(path):
            raise UserError(
                f"the checkpoint {directory} was written by another model or optimizer: {path} is "
                f"{have.get(path, 'absent')} there and {want.get(path, 'absent')} here"
            )


def count_workers(saved: list[_Row], of_workers: Set[str]) -> int | None:
    """Length of the first axis of the leaves of workers; None without any."""
    return next((shape[0] for path, shape, _ in saved if path in of_workers and shape), None)


def _texts(rows: list[_Row], of_workers: Set[str]) -> dict[str, str]:
    """``float32[3, 4]`` by path; an axis of workers has no number."""
    workers = count_workers(rows, of_workers)

    def sizes(path: str, shape: list[int]) -> list[Any]:
        own = path in of_workers and shape[:1] == [workers]
        return ["workers", *shape[1:]] if own else shape

    return {p: f"{dtype}[{', '.join(map(str, sizes(p, shape)))}]" for p, shape, dtype in rows}


def restore_args(leaf: Any, *, of_workers: bool = False) -> ocp.RestoreArgs:
    """How orbax shall read an array to become ``leaf``.

    Args:
      leaf: shape, dtype and perhaps sharding.
      of_workers: whether the first axis may have another length in the file: what is too much is
        not read, and what is not there is zeros.
    """
    if getattr(leaf, "sharding", None) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(
        sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=not of_workers
    )


def place(array: Any, leaf: Any) -> jax.Array:
    """What orbax has read, where ``leaf`` wants it."""
    if isinstance(array, jax.Array):
        return array
    placed = np.zeros(leaf.shape, leaf.dtype)  # a copy: JAX cannot donate memory NumPy owns
    rows = slice(min(array.shape[0], leaf.shape[0])) if leaf.shape else ()
    placed[rows] = array[rows]
    return jnp.array(placed)


def empty(leaf: Any) -> jax.Array:
    """An array without elements where ``leaf`` wants it: these are not in the files."""
    values = np.zeros(leaf.shape, leaf.dtype)
    if getattr(leaf, "sharding", None) is None:
        return jnp.array(values)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])
