"""Random keys that depend only on a seed, a leaf's path and counters: never on order or host."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def leaf_keys(
    seed: int, paths: Sequence[tuple[Any, ...]], *counters: jax.typing.ArrayLike
) -> jax.Array:
    """A key for each leaf of a tree, recomputable after a restart and equal on every host.

    A leaf's key does not change when other leaves come or go.

    Args:
      seed: base seed, at least 0.
      paths: the leaves' key paths, as ``jax.tree_util.tree_flatten_with_path`` gives them.
      *counters: int32 scalars, possibly traced, that tell draws for the same leaf apart.

    Returns:
      Typed PRNG keys, ``[len(paths)]``.
    """
    key = jax.random.key(seed)
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    names = [zlib.crc32(jax.tree_util.keystr(path).encode()) for path in paths]
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(names, jnp.uint32))
