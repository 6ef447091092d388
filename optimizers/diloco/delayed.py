"""Outer updates that are one round late, so that their mean has a whole round to arrive."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class OneRoundLateState(NamedTuple):
    """State of ``one_round_late``."""

    waiting: optax.Updates  # shapes and dtypes of the updates: those of the last call


def one_round_late() -> optax.GradientTransformation:
    """Gives out the updates of the call before, at first zeros, and keeps these for the next.

    A link of an outer chain. After the mean it makes DiLoCo's updates delayed ones: what workers
    have learned in a round moves the outer parameters at the end of the next, as if the all-reduce
    had been under way in between::

        outer = optax.chain(mean_over_workers(axis), one_round_late(), optax.sgd(0.4, 0.9, True))

    Momentum has to be lower than without the delay. An outer step that is skipped for want of
    workers leaves what is waiting where it is.

    **What overlaps.** Within one jitted step the mean is still waited for, by a step whose result
    does not depend on it. This link is the arithmetic of the overlap; the time it can save is
    ``parallel.utilisation``'s to predict, with ``Schedule.overlapped``.

    Memory, for an m-by-n matrix: 4mn bytes.

    Returns:
      An ``optax.GradientTransformation``.

    References:
      Kale, Douillard and Donchev, "Eager Updates For Overlapped Communication and Computation in
      DiLoCo", 2025, arXiv:2502.12996: the delayed updates to which it compares the eager ones.
    """

    def init(params: optax.Params) -> OneRoundLateState:
        return OneRoundLateState(jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        del params
        return state.waiting, OneRoundLateState(updates)

    return optax.GradientTransformation(init, update)
