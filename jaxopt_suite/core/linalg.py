"""Factorisations of many matrices at once."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_suite.core.rows import in_runs


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
    on_cpu = in_runs(lambda *args: _one_by_one(single, args))

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


def _one_by_one(fn: Callable[..., Any], args: Any) -> Any:
    rows = len(jax.tree.leaves(args)[0])
    found = [fn(*jax.tree.map(operator.itemgetter(i), args)) for i in range(rows)]
    return jax.tree.map(lambda *x: jnp.stack(x), *found)
