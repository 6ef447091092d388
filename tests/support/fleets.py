"""Workers' updates through a transformation, on every substrate."""

import jax
import numpy as np
import optax

from jaxopt_suite import core, parallel

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


def train_fleet(tx, gradient, inputs, params, *, mesh=None, axis_name="worker", active=None):
    """Every worker's parameters after each step, ``[workers, steps, ...]``, and the last state.

    Args:
      tx: the transformation.
      gradient: ``(params, x) -> gradient`` of one worker.
      inputs: a tree of arrays ``[workers, steps, ...]`` of which a step gets its ``x``.
      params: what all workers start from.
      mesh: as for ``run_workers``.
      axis_name: the workers' axis.
      active: ``[workers, steps]``, handed to ``tx.update``; None: it is not.
    """

    def worker(params, own):
        def step(carry, given):
            params, state = carry
            x, extra = given
            updates, state = tx.update(gradient(params, x), state, params, **extra)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        start = core.vary(params, axis_name), tx.init(params)
        (_, state), trajectory = jax.lax.scan(step, start, own)
        return trajectory, state

    extra = {} if active is None else {"active": np.asarray(active, np.float32)}
    run = parallel.run_workers(worker, axis_name=axis_name, mesh=mesh, in_axes=(None, 0))
    return jax.jit(run)(params, (inputs, extra))
