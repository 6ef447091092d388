"""Work on many stacks of matrices at once: those of one size, of whatever block, are one batch."""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_suite import core

Place = tuple[str, int]  # the name of a stack of blocks, and one of its modes


def in_batches(
    work: Callable[..., Any],
    arrays: Mapping[Place, tuple[jax.Array, ...]],
    kind: Callable[[Place], Hashable] = lambda place: None,
) -> dict[Place, Any]:
    """Calls ``work`` once for all places whose arrays have the same shapes but for their rows.

    On a CPU a loop calls it, for some of the rows at a time.

    Args:
      work: ``(kind, *arrays) -> pytree of arrays``, all with a leading axis of rows; each row of
        the result is made of that row of the arrays.
      arrays: for each place as many arrays ``[rows, ...]`` as ``work`` takes.
      kind: places of different kinds are not put together.

    Returns:
      For each place what ``work`` gave for its rows.
    """
    batches: dict[Any, list[Place]] = {}
    for place, columns in arrays.items():
        key = kind(place), tuple((x.shape[1:], x.dtype) for x in columns)
        batches.setdefault(key, []).append(place)
    result: dict[Place, Any] = {}
    for (of_kind, _), places in batches.items():
        together = zip(*(arrays[place] for place in places), strict=True)
        run = core.by_runs(functools.partial(work, of_kind))
        done = run(*(jnp.concatenate(column) for column in together))
        start = 0
        for place in places:
            stop = start + len(arrays[place][0])
            result[place] = jax.tree.map(lambda x, a=start, b=stop: x[a:b], done)
            start = stop
    return result
