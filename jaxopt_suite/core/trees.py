"""Tree helpers that JAX and optax do not have."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def accumulator_dtype(param: Any, override: Any = None) -> np.dtype:
    """The dtype of a moment: ``override`` if given, else the parameter's, widened to float32."""
    if override is not None:
        return jnp.dtype(override)
    return jnp.promote_types(jnp.result_type(param), jnp.float32)


def map_unzip(
    fn: Callable[..., tuple[Any, ...]], width: int, tree: Any, *rest: Any
) -> tuple[Any, ...]:
    """``jax.tree.map`` for a function that returns ``width`` values: a tuple of ``width`` trees.

    Trees in ``rest`` may have subtrees where ``tree`` has leaves, as in ``jax.tree.map``.
    """
    leaves, treedef = jax.tree.flatten(tree)
    columns = [treedef.flatten_up_to(r) for r in rest]
    rows = [fn(*args) for args in zip(leaves, *columns, strict=True)]
    return tuple(treedef.unflatten([row[i] for row in rows]) for i in range(width))


def batch_by_shape(fn: Callable[..., Any], *columns: Sequence[jax.Array]) -> list[Any]:
    """Applies a batched function once per distinct shape instead of once per array.

    Program size, compile time and kernel launches then grow with the number of shapes, not arrays.

    Args:
      fn: takes as many arrays as there are columns, each with one more leading axis (the batch),
        and returns a pytree of arrays with that leading axis.
      *columns: lists of equal length; row ``i`` is one call's arguments.

    Returns:
      For each row, what ``fn`` gave for it, without the batch axis, in the order of the rows.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    rows = list(zip(*columns, strict=True))
    for i, row in enumerate(rows):
        groups.setdefault(tuple((x.shape, x.dtype) for x in row), []).append(i)
    results: list[Any] = [None] * len(rows)
    for members in groups.values():
        stacked = [jnp.stack(xs) for xs in zip(*(rows[i] for i in members), strict=True)]
        out = fn(*stacked)
        for position, i in enumerate(members):
            results[i] = jax.tree.map(lambda x, p=position: x[p], out)
    return results


def tree_bytes(tree: Any) -> int:
    """Bytes held by the arrays (or ``ShapeDtypeStruct``) of a tree, counted exactly."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
