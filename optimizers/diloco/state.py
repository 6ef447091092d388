"""The state of an outer loop, and the point at which such a run is evaluated."""

from typing import Any, NamedTuple

import jax
import optax


class DilocoState(NamedTuple):
    """State of ``diloco`` and its variants: for an m-by-n matrix 8mn bytes and the inner state.

    (4mn for the outer parameters and 4mn for the momentum of the default outer chain.) All but
    ``inner``, and what a lossy mean remembers, is equal on all workers.
    """

    count: jax.Array  # type: ignore[assignment]  # int32 []: inner steps
    since: jax.Array  # int32 []: of these, since the last synchronisation
    inner: Any  # of the inner optimizer, this worker's
    outer_params: optax.Params  # float32, shapes of params: what workers start a round from
    outer: Any  # of the outer chain
    skipped: jax.Array  # int32 []: outer steps not taken, for want of workers or of a finite mean
    left_out: jax.Array  # int32 []: contributions left out as not finite, of all workers together
    variant: Any = None  # what a variant needs besides; None in DiLoCo itself


def outer_params(opt_state: Any, params: optax.Params) -> optax.Params:
    """The outer parameters: where a run is to be evaluated, whatever its workers are at.

    Args:
      opt_state: an optimizer state with one ``DilocoState`` somewhere in it.
      params: for their dtypes only.

    Returns:
      The parameters of the last outer step, in the dtypes of ``params``.

    Raises:
      ValueError: if there is not exactly one such state.
    """
    is_state = lambda x: isinstance(x, DilocoState)
    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(x)]
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one DilocoState, got {len(found)}")
    return jax.tree.map(lambda x, p: x.astype(p.dtype), found[0].outer_params, params)
