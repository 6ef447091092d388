"""Workers' updates through a transformation, on every substrate."""

import jax
import numpy as np

from jaxopt_suite import parallel

WORKERS = 8


def normal(shapes, *, steps, workers=WORKERS, seed=0, spread=1.0):
    """A tree of inputs ``[workers, steps, *shape]``: noise around a mean of each worker's own."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        centre = spread * rng.normal(size=(workers, 1, *shape))
        return (centre + rng.normal(size=(workers, steps, *shape))).astype(np.float32)

    return {name: leaf(shape) for name, shape in shapes.items()}


def run_fleet(tx, inputs, *, mesh=None, axis_name="worker", params=None, **extra):
    """Updates ``[steps, ...]``, equal on all workers, and the state after them.

    Args:
      tx: the transformation.
      inputs: a tree of arrays ``[workers, steps, ...]``.
      mesh: as for ``run_workers``.
      axis_name: the workers' axis.
      params: the same at every step; None: none.
      **extra: handed to ``tx.update``.
    """

    def worker(own):
        def step(state, updates):
            updates, state = tx.update(updates, state, params, **extra)
            return state, updates

        state = tx.init(jax.tree.map(lambda x: x[0], own) if params is None else params)
        state, updates = jax.lax.scan(step, state, own)
        return updates, state

    return jax.jit(parallel.run_workers(worker, axis_name=axis_name, mesh=mesh))(inputs)


def relative_difference(a, b):
    """Of two trees: the largest over leaves of ‖a − b‖ / ‖b‖."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs]
    return max(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30) for x, y in pairs)


def copies(array):
    """What each device holds of an array that is the same on all."""
    return [np.asarray(shard.data) for shard in array.addressable_shards]
