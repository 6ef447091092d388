"""Eager updates: DiLoCo that takes the mean of the round before, and its own part of this one."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers.diloco import local
from jaxopt_suite.optimizers.diloco.diloco import (
    Cadence,
    Loop,
    Restart,
    check_cadence,
    diloco,
    initial_state,
)
from jaxopt_suite.optimizers.diloco.outer import (
    Contribution,
    Stepped,
    mean_over_workers,
    outer_step,
)
from jaxopt_suite.optimizers.diloco.state import DilocoState, outer_params


class EagerState(NamedTuple):
    """What ``eager_diloco`` keeps besides, of this worker alone: 4mn bytes for an m-by-n matrix."""

    sent: optax.Updates  # float32, shapes of params: x of the last outer step
    weight: jax.Array  # float32 []: its weight relative to the mean over workers


def eager_diloco(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation | None = None,
    *,
    sync_every: Cadence,
    axis_name: str,
    delay: int = 1,
    mean: optax.GradientTransformation | None = None,
    inner_state: Restart = "keep",
    rejoin: Restart = "keep",
) -> optax.GradientTransformationExtraArgs:
    r"""DiLoCo with eager updates: the mean has a whole round to arrive.

    Let $\Delta_{w,t}$ be the pseudo-gradient of worker w of n in round t, and $\bar\Delta_t$ the
    mean of all. Each worker has outer parameters $\Theta_w$ of its own, and feeds

    $$\bar\Delta_{t-1} + \frac{\Delta_{w,t} - \Delta_{w,t-1}}{n}
      = \frac1n \left(\Delta_{w,t} + \sum_{v \ne w} \Delta_{v,t-1}\right)$$

    to its own outer optimizer: of its own work the newest, of the others' what has arrived. In the
    first round nothing has, and $\Delta_0 = 0$.

    **Workers never quite agree.** With an outer optimizer that is linear in what it is fed, such as
    SGD with momentum, $\Theta_w$ is what delayed updates would make of the same pseudo-gradients,
    equal on all workers, and a part $e_w$ driven by the differences alone; these telescope, so that
    it does not grow: without momentum and at a constant rate, $e_w = -\eta \Delta_{w,t} / n$.
    Evaluate at the mean over workers: ``mean_outer_params``.

    **Workers that leave and return** are told by ``active=`` as in ``diloco``, and $\Delta_{w,t}$
    counts with its weight. One who is absent goes on taking outer steps and returns from its own
    outer parameters. If nobody takes part, the outer step is skipped and nothing that is under way
    is lost.

    **What overlaps.** Within one jitted step the mean is still waited for. It is one of values that
    have been known for a whole round, and this is the arithmetic of having sent them then.

    **Wire.** As ``diloco``: nothing in an inner step; what ``mean`` sends, and two numbers, every
    H-th.

    Memory, for an m-by-n matrix: 12mn bytes (outer parameters, momentum, what was last sent), none
    of it shared between workers, and the inner state.

    Args:
      inner: any optimizer; its schedules count inner steps.
      outer: an optimizer that does not communicate. None: SGD with Nesterov's momentum, rate 0.4
        and momentum 0.8; DiLoCo's 0.7 and 0.9 are too much for a delay.
      sync_every: inner steps of a round, or a function of the steps so far that gives it.
      axis_name: the workers' axis.
      delay: rounds that a mean has to arrive, 1 or 0. With 0 it is ``diloco``, and outer parameters
        are equal on all workers.
      mean: the link that communicates. None: ``mean_over_workers(axis_name)``. Of a lossy one, what
        it made of a worker's own part is not known, and its error stays in $\Theta_w$.
      inner_state: ``"keep"`` or ``"reset"`` the inner state at the end of a round.
      rejoin: what an absent worker returns with, as in ``diloco``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose state is a ``DilocoState``.

    Raises:
      ValueError, TypeError: as ``diloco`` does, and for a ``delay`` other than 0 and 1.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxopt_suite import parallel
      >>> from jaxopt_suite.optimizers import eager_diloco, outer_params
      >>> tx = eager_diloco(optax.sgd(0.1), sync_every=5, axis_name="worker")
      >>> loss = lambda x, targets: 0.5 * jnp.mean((x - targets) ** 2)
      >>> step = parallel.make_train_step(loss, tx, worker_axis="worker", workers=4)
      >>> state = step.init(jnp.zeros(()))
      >>> for _ in range(200):
      ...     state, _ = step(state, jnp.arange(4.0))
      >>> [round(float(x), 2) for x in outer_params(state.opt_state, state.params)]
      [1.24, 1.41, 1.58, 1.75]

    References:
      Kale, Douillard and Donchev, "Eager Updates For Overlapped Communication and Computation in
      DiLoCo", 2025, arXiv:2502.12996. What the paper does in the first round is not known to us.
    """
    check_cadence(sync_every)
    core.check_choice("inner_state", inner_state, ("keep", "reset"))
    core.check_choice("rejoin", rejoin, ("keep", "reset"))
    if delay not in (0, 1):
        raise ValueError(f"delay must be 0 or 1 rounds, got {delay!r}")
    link = optax.with_extra_args_support(mean_over_workers(axis_name) if mean is None else mean)
    stepper = optax.sgd(0.4, 0.8, nesterov=True) if outer is None else outer
    if delay == 0:
        return diloco(
            inner,
            optax.chain(link, stepper),
            sync_every=sync_every,
            axis_name=axis_name,
            inner_state=inner_state,
            rejoin=rejoin,
        )
    loop = _Eager(
        inner=optax.with_extra_args_support(inner),
        outer=optax.with_extra_args_support(stepper),
        sync_every=sync_every,
        axis_name=axis_name,
        reset=inner_state == "reset",
        rejoin=rejoin,
        mean=link,
    )
    return optax.GradientTransformationExtraArgs(loop.init, loop.update)  # type: ignore[arg-type]


def mean_outer_params(opt_state: Any, params: optax.Params, axis_name: str) -> optax.Params:
    """The mean over workers of their outer parameters: where a run of eager updates is evaluated.

    Args:
      opt_state: an optimizer state with one ``DilocoState`` somewhere in it, this worker's.
      params: for their dtypes only.
      axis_name: the workers' axis, bound by ``parallel.run_workers`` or the like.

    Returns:
      The mean in the dtypes of ``params``, equal on all workers.

    Raises:
      ValueError: if there is not exactly one such state, or the axis is not bound.
    """
    wide = jax.tree.map(lambda p: jnp.zeros((), core.accumulator_dtype(p)), params)
    own = outer_params(opt_state, wide)
    mean, _ = mean_over_workers(axis_name).update(own, optax.EmptyState())
    return jax.tree.map(lambda x, p: x.astype(p.dtype), mean, params)


@dataclasses.dataclass(frozen=True)
class _Eager(Loop):
    """The loop of ``diloco`` with outer parameters of each worker's own."""

    mean: optax.GradientTransformationExtraArgs

    def init(self, params: optax.Params) -> DilocoState:
        both = lambda theta: (self.mean.init(theta), self.outer.init(theta))
        state = initial_state(self.inner, both, params, self.axis_name)
        sent = jax.tree.map(jnp.zeros_like, state.outer_params)
        means, steps = state.outer
        theta, steps, variant = core.vary(
            (state.outer_params, steps, EagerState(sent, jnp.zeros(()))), self.axis_name
        )
        return state._replace(outer_params=theta, outer=(means, steps), variant=variant)

    def outer_step(
        self, own: Contribution, state: DilocoState, specs: Any
    ) -> tuple[Stepped, EagerState]:
        before: EagerState = state.variant
        means, steps = state.outer
        # As an outer step from zero: what it arrives at is the mean, checked to be one and finite.
        arrived = outer_step(
            self.mean,
            own._replace(x=before.sent, weight=before.weight),
            jax.tree.map(jnp.zeros_like, before.sent),
            means,
            axis_name=self.axis_name,
            param_specs=specs,
            argument="mean",
        )
        workers = jax.lax.axis_size(self.axis_name)
        fed = jax.tree.map(
            lambda others, new, old: others + (new - old) / workers,
            *(arrived.params, own.x, before.sent),
        )
        updates, new_steps = self.outer.update(fed, steps, state.outer_params, param_specs=specs)
        theta = jax.tree.map(lambda p, u: p + u.astype(p.dtype), state.outer_params, updates)
        new = theta, new_steps, EagerState(own.x, own.weight)
        old = state.outer_params, steps, before
        theta, steps, variant = local.choose(arrived.skipped == 0, new, old)
        return Stepped(theta, (arrived.state, steps), arrived.skipped), variant
