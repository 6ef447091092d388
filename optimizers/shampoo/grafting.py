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


def rescaled(updates: Stacks, like: Stacks, site: Site, scope: Scope) -> Stacks:
    """``updates`` with the lengths (root of the sum of squares) of ``like``; zeros stay zeros.

    Args:
      updates: the blocks of a tree.
      like: the same shapes.
      site: whose the rows are.
      scope: ``"block"``: each block has a length of its own. ``"parameter"``: those of one leaf
        have one together.
    """
    wanted, found = (_square_lengths(x, site, scope) for x in (like, updates))

    def one(name: str, update: jax.Array) -> jax.Array:
        nonzero = jnp.where(found[name] > 0, found[name], 1)
        ratio = jnp.sqrt(wanted[name] / nonzero)
        return update * ratio.reshape(-1, *[1] * (update.ndim - 1))

    return {name: one(name, update) for name, update in updates.items()}


def _square_lengths(stacks: Stacks, site: Site, scope: Scope) -> Stacks:
    """For each row of each stack the sum of squares of what it is measured with: ``[rows]``."""
    own = {name: jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim))) for name, x in stacks.items()}
    if scope == "block" or not own:
        return own
    # Padding belongs to nobody; its sums, which are zero, go to a place behind the last leaf.
    owners = {name: site.owners[name] % (site.leaves + 1) for name in own}
    total = jnp.zeros(site.leaves + 1, next(iter(own.values())).dtype)
    for name, sums in own.items():
        total = total.at[owners[name]].add(sums)
    total = site.total(total)
    return {name: total[owners[name]] for name in own}
