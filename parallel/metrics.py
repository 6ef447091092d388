"""What a train step reports."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite.core.varying import vary


class Metrics(NamedTuple):
    """What a step reports; with workers: the mean loss, root mean squares of the workers' norms."""

    loss: jax.Array  # (), dtype of the loss; before the update
    grad_norm: jax.Array  # (), global norm
    update_norm: jax.Array  # (), global norm
    finite: jax.Array  # bool (): whether the three above are


def measure(
    loss: jax.Array,
    grads: Any,
    updates: Any,
    *,
    axis_name: str | None = None,
    active: jax.Array | None = None,
) -> Metrics:
    """The metrics of a step.

    Args:
      loss: this worker's.
      grads: this worker's.
      updates: this worker's.
      axis_name: the workers' axis, if there is one.
      active: this worker's weight []: of those above 0 the means are taken, each counting once.
        NaN if there is none.
    """
    numbers = [loss, *(optax.tree.norm(tree, squared=True) for tree in (grads, updates))]
    if axis_name is not None:
        # The one thing besides the optimizer's own that crosses between workers.
        local = vary(jnp.stack([x.astype(loss.dtype) for x in numbers]), axis_name)
        if active is None:
            numbers = list(jax.lax.pmean(local, axis_name))
        else:
            one = jnp.where(active > 0, jnp.append(local, 1), 0)
            *sums, present = jax.lax.psum(one, axis_name)
            numbers = [x / present for x in sums]
    loss, grad_norm, update_norm = numbers[0], *map(jnp.sqrt, numbers[1:])
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
    return Metrics(loss, grad_norm, update_norm, finite)
