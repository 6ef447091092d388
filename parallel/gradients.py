"""The gradient of a batch, taken in one piece or in several."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite.core.varying import vary


def loss_and_gradient(
    loss_fn: Callable[[Any, Any], jax.Array], *, accumulate: int = 1, axis_name: str | None = None
) -> Callable[[Any, Any], tuple[jax.Array, Any]]:
    """``jax.value_and_grad`` of a mean over a batch, for one worker.

    Args:
      loss_fn: ``(params, batch) -> loss``, the mean over the batch.
      accumulate: micro-batches, one after the other; they divide the batch.
      axis_name: an axis over whose workers the results vary: no sum over them is taken, as JAX
        would for parameters that are equal on all.

    Returns:
      ``(params, batch) -> (loss, gradient)``.
    """

    def whole(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        params = params if axis_name is None else vary(params, axis_name)
        return jax.value_and_grad(loss_fn)(params, batch)

    if accumulate == 1:
        return whole

    def in_pieces(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        size = jax.tree.leaves(batch)[0].shape[0] // accumulate
        mean = _mean(accumulate, () if axis_name is None else (axis_name,))
        return optax.microbatching.microbatch(whole, 1, size, mean)(params, batch)

    return in_pieces


def _mean(terms: int, axis_names: tuple[str, ...]) -> optax.microbatching.Accumulator:
    """optax's own mean, but with a beginning that varies over workers as the terms do."""

    def zeros(like: Any) -> jax.Array:
        return vary(jnp.zeros(like.shape, like.dtype), axis_names)

    return optax.microbatching.Accumulator(
        init=lambda like: jax.tree.map(zeros, like),
        update=lambda total, term, index: jax.tree.map(jnp.add, total, term),
        finalize=lambda total: jax.tree.map(lambda x: x / terms, total),
        aggregate=None,  # of terms that are all there at once, which is not done here
    )
