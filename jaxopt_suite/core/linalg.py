"""Factorisations of many matrices at once."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_AT_ONCE = 20  # rows in the body of a loop on a CPU; XLA orders few calls one after another


def batch_factorisation(
    fn: Callable[..., Any], *, tpu: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """``jax.vmap`` for a function that factorises a matrix (SVD, QR, eigendecomposition).

    One batched call, but on a CPU a loop over some matrices at a time, each with a call of its own.
    There the LAPACK calls of a batch are handed to the thread pool that they are waited for in:
    when as many batches as it has threads are at it at once, of one program or of several devices,
    they wait for ever (seen with JAX 0.10 and 0.12). Single calls run in that pool, too, and wait
    for none. Under a further ``vmap`` the batches become one.

    Args:
      fn: takes and returns pytrees of arrays; must not close over traced values.
      tpu: takes and returns batches, to be used on TPUs instead.

    Returns:
      A function of the same arguments with one more leading axis each. It has no derivative.
    """
    batched, single = jax.vmap(fn), jax.jit(fn)
    on_cpu = _in_runs(lambda *args: _one_by_one(single, args))

    def one_by_one(*args: Any) -> Any:
        return on_cpu(*args) if len(jax.tree.leaves(args)[0]) else batched(*args)

    @jax.custom_batching.custom_vmap
    def mapped(*args: Any) -> Any:
        return jax.lax.platform_dependent(
            *args, cpu=one_by_one, tpu=tpu or batched, default=batched
        )

    @mapped.def_vmap
    def _(size: int, is_batched: Any, *args: Any) -> tuple[Any, Any]:
        spread = lambda x, has: x if has else jnp.broadcast_to(x, (size, *x.shape))
        args = jax.tree.map(spread, args, tuple(is_batched))
        found = mapped(*jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), args))
        found = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return mapped


def by_runs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, but on a CPU called for some rows at a time, in a loop.

    What it makes on the way then stays in the cache, and is not allocated for all rows. Elsewhere
    one call for all of them keeps the device busy.

    Args:
      fn: takes and returns pytrees of arrays with a leading axis of rows, each row by itself.
    """
    on_cpu = _in_runs(fn)
    return lambda *args: jax.lax.platform_dependent(*args, cpu=on_cpu, default=fn)


def _in_runs(fn: Callable[..., Any]) -> Callable[..., Any]:
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


def _run_length(rows: int) -> int:
    """At most ``_AT_ONCE`` rows, so that few of the last run are there for nothing."""
    lengths = range(_AT_ONCE, _AT_ONCE // 2, -1)
    return rows if rows <= _AT_ONCE else min(lengths, key=lambda each: -rows % each)


def _one_by_one(fn: Callable[..., Any], args: Any) -> Any:
    rows = len(jax.tree.leaves(args)[0])
    found = [fn(*jax.tree.map(operator.itemgetter(i), args)) for i in range(rows)]
    return jax.tree.map(lambda *x: jnp.stack(x), *found)
