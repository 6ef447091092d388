"""Factorisations of many matrices at once."""

from collections.abc import Callable
from typing import Any

import jax


def batch_factorisation(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.vmap`` for a function that factorises a matrix (SVD, QR, eigendecomposition).

    One batched call on accelerators, one matrix after another on the CPU: there the LAPACK calls of
    a batch are handed to the thread pool that they are waited for in, and when as many devices as
    it has threads do so at once, they wait for ever (seen with JAX 0.10 and 0.12, eight devices).

    Args:
      fn: takes and returns pytrees of arrays.

    Returns:
      A function of the same arguments with one more leading axis each.
    """

    def one_by_one(*args: Any) -> Any:
        return jax.lax.map(lambda row: fn(*row), args)

    def mapped(*args: Any) -> Any:
        return jax.lax.platform_dependent(*args, cpu=one_by_one, default=jax.vmap(fn))

    return mapped
