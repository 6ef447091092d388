"""What a worker does on its own: inner steps, the way to the outer parameters, new beginnings."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.core.collectives import bound_axis_size
from jaxopt_suite.optimizers.diloco.state import DilocoState


def in_dtype_of(params: optax.Params, outer_params: Any) -> Any:
    """Outer parameters as workers have them: rounded to the dtypes of ``params``, stored wide."""

    def leaf(p: jax.Array, o: jax.Array) -> jax.Array:
        form = jnp.finfo(p.dtype)
        # Not a cast and one back, of which compilers may leave out both.
        return o if p.dtype == o.dtype else jax.lax.reduce_precision(o, form.nexp, form.nmant)

    return jax.tree.map(leaf, params, outer_params)


def updates_to(params: optax.Params, target: Any) -> optax.Updates:
    """The updates that bring ``params`` to ``target``, in the dtypes of ``params``.

    What is added up need not be the target to the last bit: where the two differ in sign or by
    more than a factor of two, their difference is rounded, and what is reached is off by at most
    one unit in the last place of the larger. Nothing accumulates, as pseudo-gradients are not
    measured against what was reached.
    """
    difference = lambda p, t: (t - p.astype(t.dtype)).astype(p.dtype)
    return jax.tree.map(difference, params, in_dtype_of(params, target))


def pseudo_gradient(outer_params: Any, params: optax.Params) -> Any:
    """How far this worker is from where the round began: float32, uphill as a gradient is.

    It began at the outer parameters in the dtype of ``params``. What that rounding took away is in
    no worker's way, and stays in the outer parameters: small steps of many rounds add up there.
    """
    difference = lambda o, p: o - p.astype(o.dtype)
    return jax.tree.map(difference, in_dtype_of(params, outer_params), params)


def as_weight(active: jax.typing.ArrayLike | None) -> jax.Array | None:
    """A worker's weight in this step, float32 ``[]``; None where all have the same."""
    return None if active is None else jnp.asarray(active, jnp.float32)


def choose(condition: jax.Array, first: Any, second: Any) -> Any:
    """One of two trees."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


def advance(
    inner: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    state: DilocoState,
    params: optax.Params | None,
    *,
    active: jax.Array | None,
    rejoin: str,
    axis_name: str,
    **extra: Any,
) -> tuple[optax.Updates, DilocoState]:
    """One step of the inner optimizer, or for an absent worker the step to the outer parameters.

    Args:
      inner: the inner optimizer.
      grads: this worker's.
      state: before the step.
      params: this worker's.
      active: float32 [], above 0 if it takes the step; None: it does.
      rejoin: what becomes of an absent worker's state: ``"keep"`` or ``"reset"``.
      axis_name: the workers' axis, over which updates and inner state are typed as varying.
      **extra: for the inner optimizer.

    Returns:
      Updates in the dtypes of ``params``, and the state with its counts and inner state advanced.

    Raises:
      ValueError: without ``params``, or if ``axis_name`` is not bound.
    """
    if params is None:
        raise ValueError("diloco needs params: call update(grads, state, params)")
    bound_axis_size(axis_name, "diloco")
    updates, new = inner.update(grads, state.inner, params, **extra)
    updates = jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params)
    if active is not None:
        theta, waiting = state.outer_params, state.inner
        if rejoin == "reset":
            waiting = restarted(inner, waiting, theta, params)
        absent = updates_to(params, theta), waiting
        updates, new = choose(active > 0, (updates, new), absent)
    updates, new = core.vary((updates, new), axis_name)
    return updates, state._replace(
        count=optax.safe_increment(state.count),
        since=optax.safe_increment(state.since),
        inner=new,
    )


def restarted(inner: optax.GradientTransformation, state: Any, target: Any, like: Any) -> Any:
    """A new inner state at ``target``, in which schedules count on.

    States with no other field than ``count`` are what optax's schedules keep
    (``ScaleByScheduleState``, ``WeightDecaySchedule``, ``WrappedScheduleState``), and stay.
    """
    params = jax.tree.map(lambda t, p: t.astype(p.dtype), target, like)
    keep = lambda old, new: old if counts_only(old) else new
    return jax.tree.map(keep, state, inner.init(params), is_leaf=counts_only)


def counts_only(state: Any) -> bool:
    """Whether a state has no other field than ``count``, as those of optax's schedules."""
    return getattr(state, "_fields", None) == ("count",)
