"""Running a transformation that communicates: as the only worker of a simulated fleet."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def as_only_worker(
    make_tx: Callable[..., optax.GradientTransformation], axis_name: str
) -> Callable[..., optax.GradientTransformation]:
    """A factory with the same signature, of transformations that need no axis around them.

    Args:
      make_tx: a factory of transformations that call collectives over ``axis_name``.
      axis_name: bound by ``jax.vmap`` with one worker around ``init`` and around ``update``.
    """

    def alone(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def bound(*args: Any, **kwargs: Any) -> Any:
            # Arrays get the workers' axis: they are a worker's own, as they are in a fleet.
            stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], args)
            run = jax.vmap(lambda args: fn(*args, **kwargs), axis_name=axis_name, axis_size=1)
            return jax.tree.map(lambda x: x[0], run(stacked))

        return bound

    @functools.wraps(make_tx)
    def factory(*args: Any, **kwargs: Any) -> optax.GradientTransformation:
        tx = make_tx(*args, **kwargs)
        if isinstance(tx, optax.GradientTransformationExtraArgs):
            return optax.GradientTransformationExtraArgs(alone(tx.init), alone(tx.update))
        return optax.GradientTransformation(alone(tx.init), alone(tx.update))

    return factory
