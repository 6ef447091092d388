"""Work on the rows of arrays, each row by itself: on a CPU for some rows at a time, in a loop.

What is made on the way then stays in the cache, and no memory is taken for all of it, whose first
touch can cost more than the arithmetic. Elsewhere one call for all rows keeps the device busy.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_suite.core.varying import alike, vary, varying_axes

AT_ONCE = 20  # rows whose calls of LAPACK run side by side; XLA orders few calls one after another
_BYTES = 2 * 2**20  # of the rows of all arrays that are in work at a time, where no calls are


def by_runs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, but on a CPU called for at most ``AT_ONCE`` rows at a time.

    Args:
      fn: takes and returns pytrees of arrays with a leading axis of rows.
    """
    on_cpu = in_runs(fn)
    return lambda *args: jax.lax.platform_dependent(*args, cpu=on_cpu, default=fn)


def in_runs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A loop over runs of rows; the first rows come once more where they do not divide."""

    def looped(*args: Any) -> Any:
        rows = len(jax.tree.leaves(args)[0])
        each = _run_length(rows)
        if each >= rows:
            return fn(*args)
        runs = -(-rows // each)
        again = lambda x: jnp.concatenate([x, x[: runs * each - rows]]) if rows % each else x
        cut = lambda x: again(x).reshape(runs, each, *x.shape[1:])
        found = jax.lax.map(lambda run: fn(*run), jax.tree.map(cut, args))
        return jax.tree.map(lambda x: x.reshape(runs * each, *x.shape[2:])[:rows], found)

    return looped


def update_rows(fn: Callable[..., Any], old: Any, *args: Any, calls: bool = False) -> Any:
    """``fn(old, *args)``, on a CPU written over ``old`` where nothing else needs that.

    What ``fn`` makes of an array in ``old`` should be the only thing that it makes of it: XLA
    copies the whole array in every turn if something else may be made of its rows afterwards.

    Args:
      fn: makes of the same rows of all arguments those rows of the first, in its shapes and dtypes.
      old: a pytree of arrays with a leading axis of rows; it may be there for its memory alone.
      *args: likewise, with as many rows.
      calls: whether ``fn`` factorises its rows one by one (``batch_factorisation``), so that it
        should have up to ``AT_ONCE`` of them; else as many as fit the cache.
    """
    in_runs = lambda *given: update_in_runs(fn, *given, calls=calls)
    on_cpu, elsewhere = alike([in_runs, fn], old, *args)
    return jax.lax.platform_dependent(old, *args, cpu=on_cpu, default=elsewhere)


def update_in_runs(fn: Callable[..., Any], old: Any, *args: Any, calls: bool = False) -> Any:
    """What ``update_rows`` is on a CPU."""
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves((old, args))))
    old, *args = vary((old, *args), axes)
    rows = len(jax.tree.leaves(old)[0])
    each = _run_length(rows) if calls else _that_fit(rows, (old, args))
    if each >= rows:
        return fn(old, *args)

    def run(i: jax.Array, kept: Any) -> Any:
        start = jnp.minimum(i * each, rows - each)
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, each)
        before = jax.tree.map(take, kept)
        new = fn(before, *jax.tree.map(take, args))
        if rows % each:  # the last run begins with rows that the one before it has done
            due = jnp.arange(each) >= i * each - start
            new = jax.tree.map(lambda x, y: where_rows(due, x, y), new, before)
        put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, start, 0)
        return jax.tree.map(put, kept, new)

    return jax.lax.fori_loop(0, -(-rows // each), run, old)


def where_rows(rows: jax.Array, x: jax.Array, other: jax.typing.ArrayLike) -> jax.Array:
    """``x`` in the rows that are true, bool ``[rows]``, and ``other`` elsewhere."""
    return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, other)


def _run_length(rows: int) -> int:
    """At most ``AT_ONCE`` rows, so that few of the last run are there for nothing."""
    lengths = range(AT_ONCE, AT_ONCE // 2, -1)
    return rows if rows <= AT_ONCE else min(lengths, key=lambda each: -rows % each)


def _that_fit(rows: int, arrays: Any) -> int:
    bytes_of = lambda x: math.prod(x.shape[1:]) * x.dtype.itemsize
    return min(rows, max(1, _BYTES // max(1, sum(map(bytes_of, jax.tree.leaves(arrays))))))
