"""What a worker does on its own: inner steps, the way to the outer parameters, new beginnings."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core


def updates_to(params: optax.Params, target: Any) -> optax.Updates:
    """The updates that bring ``params`` to ``target``, in the dtypes of ``params``.

    What is added up need not be the target to the last bit: where the two differ in sign or by
    more than a factor of two, their difference is rounded, and what is reached is off by at most
    one unit in the last place of the larger. Nothing accumulates, as pseudo-gradients are
    measured against the target.
    """

    def leaf(p: jax.Array, t: jax.Array) -> jax.Array:
        wide = core.accumulator_dtype(p)
        return (t.astype(p.dtype).astype(wide) - p.astype(wide)).astype(p.dtype)

    return jax.tree.map(leaf, params, target)


def pseudo_gradient(outer_params: Any, params: optax.Params) -> Any:
    """From the outer parameters back to this worker's: float32, uphill as a gradient is."""
    return jax.tree.map(lambda o, p: o - p.astype(o.dtype), outer_params, params)


def inner_step(
    inner: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    state: Any,
    params: optax.Params,
    outer_params: Any,
    *,
    active: jax.Array | None,
    rejoin: str,
    axis_name: str,
    **extra: Any,
) -> tuple[optax.Updates, Any]:
    """One step of the inner optimizer, or for an absent worker the step to the outer parameters.

    Args:
      inner: the inner optimizer.
      grads: this worker's.
      state: of the inner optimizer.
      params: this worker's.
      outer_params: where an absent worker waits.
      active: float32 [], above 0 if it takes the step; None: it does.
      rejoin: what becomes of an absent worker's state: ``"keep"`` or ``"reset"``.
      axis_name: the workers' axis, over which the results are typed as varying.
      **extra: for the inner optimizer.

    Returns:
      Updates in the dtypes of ``params``, and the new state.
    """
    updates, new = inner.update(grads, state, params, **extra)
    updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
    if active is not None:
        absent = restarted(inner, state, outer_params, params) if rejoin == "reset" else state
        present = (updates, new), (updates_to(params, outer_params), absent)
        updates, new = jax.tree.map(lambda a, b: jnp.where(active > 0, a, b), *present)
    return core.vary((updates, new), axis_name)


def restarted(inner: optax.GradientTransformation, state: Any, target: Any, like: Any) -> Any:
    """A new inner state at ``target``, in which schedules count on.

    States with no other field than ``count`` are what optax's schedules keep
    (``ScaleByScheduleState``, ``WeightDecaySchedule``, ``WrappedScheduleState``), and stay.
    """
    params = jax.tree.map(lambda t, p: t.astype(p.dtype), target, like)
    counts = lambda x: getattr(x, "_fields", None) == ("count",)
    choose = lambda old, new: old if counts(old) else new
    return jax.tree.map(choose, state, inner.init(params), is_leaf=counts)
