"""Factorisations of many matrices at once."""

from collections.abc import Callable
from typing import Any

import jax


def batch_factorisation(
    fn: Callable[..., Any], *, tpu: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """``jax.vmap`` for a function that factorises a matrix (SVD, QR, eigendecomposition).

    One batched call, but on the simulated devices of a CPU one matrix after another: there the
    LAPACK calls of a batch are handed to the thread pool that they are waited for in, and when as
    many devices as it has threads do so at once, they wait for ever (seen with JAX 0.10 and 0.12,
    eight devices).

    Args:
      fn: takes and returns pytrees of arrays.
      tpu: takes and returns batches, to be used on TPUs instead.

    Returns:
      A function of the same arguments with one more leading axis each.
    """
    batched = jax.vmap(fn)

    def one_by_one(*args: Any) -> Any:
        return jax.lax.map(lambda row: fn(*row), args)

    def mapped(*args: Any) -> Any:
        on_cpu = batched if _cpu_devices() == 1 else one_by_one
        return jax.lax.platform_dependent(*args, cpu=on_cpu, tpu=tpu or batched, default=batched)

    return mapped


def _cpu_devices() -> int:
    try:
        return jax.local_device_count("cpu")
    except RuntimeError:  # JAX_PLATFORMS has no CPU in it
        return 1
