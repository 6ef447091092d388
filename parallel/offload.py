"""Optimizer state that rests in the host's memory and visits the device for the update.

What it saves is device memory during the forward and the backward pass: for the update the whole
state is on the device again (XLA starts all copies together). What it costs is the transfer of the
state in both directions at every step. On CPU, host and device memory are the same memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

HOST = "pinned_host"
"""The memory kind of host memory that devices read and write directly."""


def host_sharding(sharding: Sharding) -> Sharding:
    """The same layout over the same devices, in the memory of their hosts.

    Args:
      sharding: over devices of any backend; they may be those of a described topology.

    Raises:
      ValueError: if the devices have no such memory. Those of a GPU topology that is only described
        have no memory kinds at all.
    """
    # Devices of other processes do not tell.
    devices = sharding.addressable_devices or sharding.device_set
    device: Any = min(devices, key=lambda d: d.id)  # type: ignore[attr-defined]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        offered = f"only {', '.join(map(repr, kinds))}" if kinds else "no memory kinds at all"
        raise ValueError(
            f"cannot offload to host memory: it takes devices with memory of kind {HOST!r}, and "
            f"{device.device_kind!r} ({device.platform}) has {offered}"
        )
    return sharding.with_memory_kind(HOST)


def host_shardings(tree_like: Any, shardings: Any) -> Any:
    """Where a tree rests when it is offloaded: its arrays with the hosts, the rest on the devices.

    Scalars stay, since a copy either way would take longer than what it saves is worth; so do
    random keys, for which TPU programs with host memory do not lower.

    Args:
      tree_like: arrays or ``jax.ShapeDtypeStruct``.
      shardings: of its leaves, in device memory.

    Raises:
      ValueError: as ``host_sharding``.
    """

    def rest(x: Any, sharding: Sharding) -> Sharding:
        stays = x.ndim == 0 or jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return sharding if stays else host_sharding(sharding)

    return jax.tree.map(rest, tree_like, shardings)


def to_device(tree: Any, shardings: Any) -> Any:
    """Inside ``jit``: a tree that rests with the hosts, fetched for computing with it.

    Args:
      tree: of arrays; those that are on the devices already cost nothing.
      shardings: of its leaves, in device memory.
    """
    return jax.device_put(tree, shardings)


def to_host(tree: Any, shardings: Any) -> Any:
    """Inside ``jit``: a tree brought back to where it rests.

    Args:
      tree: of arrays on the devices.
      shardings: of its leaves, from ``host_shardings``. The program must be given them as its
        ``out_shardings`` too, and the tree as a donated argument, or the hosts hold it twice.
    """
    return jax.device_put(tree, shardings)
