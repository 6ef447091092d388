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
    operands: Mapping[Place, tuple[Any, ...]],
    kind: Callable[[Place], Hashable] = lambda place: None,
) -> dict[Place, Any]:
    """Calls ``work`` once for all places whose operands have the same shapes but for their rows.

    On a CPU a loop calls it, for some of the rows at a time.

    Args:
      work: ``(kind, *operands) -> pytree of arrays``, all with a leading axis of rows; each row of
        the result is made of that row of the operands.
      operands: for each place what ``work`` takes: pytrees of arrays ``[rows, ...]``.
      kind: places of different kinds are not put together.

    Returns:
      For each place what ``work`` gave for its rows.
    """
    return _put_together(work, operands, kind, core.by_runs)


def _put_together(
    work: Callable[..., Any],
    operands: Mapping[Place, tuple[Any, ...]],
    kind: Callable[[Place], Hashable],
    looped: Callable[..., Any],
) -> dict[Place, Any]:
    batches: dict[Any, list[Place]] = {}
    for place, given in operands.items():
        key = kind(place), tuple((x.shape[1:], x.dtype) for x in jax.tree.leaves(given))
        batches.setdefault(key, []).append(place)
    result: dict[Place, Any] = {}
    for (of_kind, _), places in batches.items():
        run = looped(functools.partial(work, of_kind))
        done = run(*jax.tree.map(lambda *x: jnp.concatenate(x), *map(operands.get, places)))
        start = 0
        for place in places:
            stop = start + len(jax.tree.leaves(operands[place])[0])
            result[place] = jax.tree.map(lambda x, a=start, b=stop: x[a:b], done)
            start = stop
    return result


def update_in_batches(
    work: Callable[..., Any],
    operands: dict[Place, tuple[Any, ...]],
    kind: Callable[[Place], Hashable],
) -> dict[Place, Any]:
    """``in_batches`` for work that gives what the first operand is to become.

    On a CPU each place is by itself, and what is new is written over what was there: to put places
    together and to part them again would take a tenth of the time of their decompositions.
    """

    def by_itself(operands: dict[Place, tuple[Any, ...]]) -> dict[Place, Any]:
        return {
            place: core.update_in_runs(functools.partial(work, kind(place)), *given, calls=True)
            for place, given in operands.items()
        }

    together = lambda operands: _put_together(work, operands, kind, lambda run: run)
    on_cpu, elsewhere = core.alike([by_itself, together], operands)
    return jax.lax.platform_dependent(operands, cpu=on_cpu, default=elsewhere)
