"""What a train step reports."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


@functools.partial(jax.tree_util.register_dataclass, data_fields=["numbers"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a step reports; with workers: the mean loss, root mean squares of the workers' norms.

    A step leaves each worker's numbers where the worker is, so that reporting makes nobody wait for
    the others. They cross when one of ``loss``, ``grad_norm``, ``update_norm`` and ``finite`` is
    read: of several processes with workers, either all read or none.

    Attributes:
      numbers: ``[4]``, of workers ``[workers, 4]``: loss, squared norms of gradient and update, and
        1; all 0 for a worker of weight 0. Dtype of the loss.
    """

    numbers: jax.Array

    @property
    def loss(self) -> jax.Array:
        """(), dtype of the loss, float32 at least; before the update."""
        return self._means[0]

    @property
    def grad_norm(self) -> jax.Array:
        """(), global norm."""
        return self._means[1]

    @property
    def update_norm(self) -> jax.Array:
        """(), global norm."""
        return self._means[2]

    @property
    def finite(self) -> jax.Array:
        """bool (): whether the three others are; False without any worker of weight above 0."""
        return self._means[3]

    @property
    def finite_here(self) -> bool:
        """Whether the numbers on this process's devices are. Nothing crosses."""
        here = jax.device_get([shard.data for shard in self.numbers.addressable_shards])
        return all(bool(np.isfinite(numbers).all()) for numbers in here)

    @functools.cached_property
    def _means(self) -> tuple[jax.Array, ...]:
        return _means(self.numbers)


@jax.jit
def _means(numbers: jax.Array) -> tuple[jax.Array, ...]:
    rows = numbers.astype(jnp.promote_types(numbers.dtype, jnp.float32)).reshape(-1, 4)
    *sums, present = jnp.sum(rows, axis=0)
    loss, *squares = (x / present for x in sums)
    means = loss, *map(jnp.sqrt, squares)
    return *means, jnp.all(jnp.isfinite(jnp.stack(means)))


def measure(loss: jax.Array, grads: Any, updates: Any, active: jax.Array | None = None) -> Metrics:
    """The metrics of a step; of workers, this one's.

    Args:
      loss: a scalar.
      grads: the gradient.
      updates: what the transformation made of it.
      active: this worker's weight []: those of weight 0 are in no mean.
    """
    squares = (optax.tree.norm(tree, squared=True) for tree in (grads, updates))
    numbers = jnp.stack([loss, *(x.astype(loss.dtype) for x in squares), jnp.ones_like(loss)])
    return Metrics(numbers if active is None else jnp.where(active > 0, numbers, 0))
