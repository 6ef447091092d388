"""Directions whose length a preconditioned update takes over: the methods that are grafted."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers.shampoo.blocks import Stacks
from jaxopt_suite.optimizers.shampoo.stacked import Site

Graft = Literal["none", "sgd", "adagrad", "rmsprop", "adam"]
Scope = Literal["block", "parameter"]
GRAFTS = ("none", "sgd", "adagrad", "rmsprop", "adam")
SCOPES = ("block", "parameter")


def has_moment(graft: Graft) -> bool:
    """Whether the method keeps squared gradients."""
    return graft in ("adagrad", "rmsprop", "adam")


def update_moment(
    graft: Graft, nu: jax.Array, blocks: jax.Array, decay: jax.typing.ArrayLike
) -> jax.Array:
    """The method's moment after a step with these gradients; shapes and dtypes stay."""
    square = jnp.square(blocks).astype(nu.dtype)
    if graft == "adagrad":
        return nu + square
    return _common.update_mean(nu, square, decay)


def direction(
    graft: Graft,
    blocks: jax.Array,
    nu: jax.Array | None,
    decay: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    count: jax.Array,
) -> jax.Array:
    """What the method would step along, for gradients or their mean.

    Args:
      graft: the method.
      blocks: ``[rows, ...]``.
      nu: its moment, after this step; ``None`` where it has none.
      decay: of the moment.
      eps: added to the root of the moment.
      count: int32 ``[]``, updates of the moment so far, this one included.
    """
    if nu is None:
        return blocks
    if graft == "adam":
        nu = nu / _common.bias_correction(decay, count).astype(nu.dtype)
    return blocks / (jnp.sqrt(nu) + jnp.asarray(eps, nu.dtype))


def by_parameter(lengths: Stacks, site: Site) -> Stacks:
    """For each row of each stack the sum over all blocks of its leaf: ``[rows]``."""
    if not lengths:
        return lengths
    # Padding belongs to nobody; its sums, which are zero, go to a place behind the last leaf.
    owners = {name: site.owners[name] % (site.leaves + 1) for name in lengths}
    total = jnp.zeros(site.leaves + 1, next(iter(lengths.values())).dtype)
    for name, sums in lengths.items():
        total = total.at[owners[name]].add(sums)
    total = site.total(total)
    return {name: total[owners[name]] for name in lengths}


def rescaled(updates: jax.Array, found: jax.Array, wanted: jax.Array) -> jax.Array:
    """Blocks with other lengths; zeros stay zeros.

    Args:
      updates: ``[rows, ...]``.
      found: the square of the length that each has, ``[rows]``.
      wanted: of the one that it is given, ``[rows]``.
    """
    ratio = jnp.sqrt(wanted / jnp.where(found > 0, found, 1))
    return updates * ratio.reshape(-1, *[1] * (updates.ndim - 1))
