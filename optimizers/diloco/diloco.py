"""DiLoCo: workers train on their own for many steps, then step together along where they went."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers.diloco import local
from jaxopt_suite.optimizers.diloco.outer import (
    Contribution,
    Stepped,
    contribution,
    nesterov,
    outer_step,
)
from jaxopt_suite.optimizers.diloco.state import DilocoState

Cadence = int | Callable[[jax.Array], jax.typing.ArrayLike]
Restart = Literal["keep", "reset"]


def diloco(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation | None = None,
    *,
    sync_every: Cadence,
    axis_name: str,
    inner_state: Restart = "keep",
    rejoin: Restart = "keep",
) -> optax.GradientTransformationExtraArgs:
    r"""DiLoCo: any inner optimizer on each worker, and every H steps an outer one on their mean.

    Written for one worker: ``update`` takes its gradient and gives the update of its own
    parameters. Worker $w$ of $n$ has parameters $\theta_w$, and all have the outer ones $\Theta$.
    Each step is the inner optimizer's; after every H-th,

    $$\Delta_w = \Theta - \theta_w, \quad \bar\Delta = \frac{\sum_w a_w \Delta_w}{\sum_w a_w},
    \quad \Theta \leftarrow \Theta + \mathrm{outer}(\bar\Delta), \quad \theta_w \leftarrow \Theta.$$

    $\Delta_w$ points uphill as a gradient does, so that ``outer`` is an ordinary optax chain whose
    updates are added; its first link communicates. $\Theta$ and $\Delta_w$ are float32 whatever the
    parameters are. Weight decay and clipping of gradients belong to ``inner``. Evaluate at
    $\Theta$: ``outer_params(opt_state, params)``.

    With ``outer`` SGD of rate 1 it is local SGD; with one worker, and SGD of rate α, Lookahead.

    **Workers that leave and return.** ``update(..., active=a)`` takes this worker's weight
    $a_w \ge 0$ in this step (float ``[]``; not given: 1). One of weight 0 takes no inner step; it
    goes to $\Theta$ and waits there, so that the gradient of the step in which it returns is taken
    there. Its inner state is kept or, with ``rejoin="reset"``, begun anew. At a synchronisation
    weights are those of that very step, and the mean is over those present. If nobody is, the outer
    step is skipped and counted in ``skipped``; so it is if the outer updates are not finite.

    **Non-finite numbers.** A worker whose $\Delta_w$ is not finite is left out, counted in
    ``left_out``, and begins anew at $\Theta$ with a new inner state. But updates are added, and
    none mends a parameter that was NaN before that step: a worker with such is left out for good.
    ``optax.apply_if_finite`` around ``inner`` keeps single bad batches from doing this.

    **What an outer chain is given**: $x_w = n a_w \Delta_w / \sum_v a_v$, of which any plain mean
    is the weighted one, and ``weight=``, the factor, for links that remember (``diloco.outer``).

    **Wire.** An inner step sends nothing: the synchronisation is one branch of a conditional on a
    count that is equal on all workers. It sends what the chain does (by default 8 (n - 1)/n bytes
    an entry) and two numbers. ``make_train_step`` averages its metrics in every step besides.

    **Rounding.** After a synchronisation $\theta_w$ is $\Theta$ in the dtype of the parameters, but
    for entries that changed sign or more than doubled or halved in the round: these are off by up
    to one unit in the last place, as an update is a difference that is added again. $\Delta_w$ is
    measured against $\Theta$ rounded to that dtype, from where the round began: so nothing
    accumulates, and for parameters of 16 bits $\Theta$ is what their master copies are, which keep
    what is below a rounding. Were it measured against $\Theta$ itself, that would be lost.

    **Between synchronisations.** A run that ends H - 1 steps after the last one has ``since`` of
    H - 1, and these steps are in no outer parameters.

    Memory, for an m-by-n matrix: 4mn bytes for $\Theta$, what ``outer`` keeps (by default 4mn), and
    what ``inner`` does; and while a step runs, the updates, which a conditional's result cannot be
    fused with. The inner state is a worker's own to the last counter: under ``vmap`` a
    conditional on one (a refresh every k steps) becomes a selection, and costs both branches.

    Args:
      inner: any optimizer; its schedules count inner steps. It gets ``param_specs=`` and whatever
        else ``update`` is given.
      outer: any chain that makes its updates equal on all workers. None: ``nesterov(axis_name)``,
        rate 0.7 and momentum 0.9.
      sync_every: H, at least 1; or a function of the inner steps made so far that gives it. A
        synchronisation follows as soon as H steps have been made since the last.
      axis_name: the workers' axis, of ``parallel.run_workers`` or ``make_train_step``.
      inner_state: at a synchronisation, ``"keep"`` the inner state, as the paper does, or
        ``"reset"`` it; the counts of schedules are kept in either case.
      rejoin: what an absent worker returns with: its old inner state (``"keep"``), or a new one.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; ``init`` must get parameters that are equal on
      all workers.

    Raises:
      ValueError, TypeError: for an argument out of range; at ``init``, for a leaf that is not real
        floating point, or differs between workers; at ``update``, without ``params``, if
        ``axis_name`` is not bound, or if the updates of ``outer`` differ between workers, so that
        they would drift apart.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_suite import parallel
      >>> from jaxopt_suite.optimizers import diloco, outer_params
      >>> tx = diloco(optax.sgd(0.1), sync_every=5, axis_name="worker")
      >>> loss = lambda x, target: jnp.mean((x - target) ** 2) / 2
      >>> step = parallel.make_train_step(loss, tx, worker_axis="worker", workers=4)
      >>> state = step.init(jnp.zeros(()))
      >>> for _ in range(500):
      ...     state, metrics = step(state, jnp.arange(4.0))
      >>> round(float(outer_params(state.opt_state, state.params)), 3)
      1.5

    References:
      Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023,
      arXiv:2311.08105. Local SGD: Stich, "Local SGD Converges Fast and Communicates Little", 2018,
      arXiv:1805.09767. Departs from the paper in that a worker whose contribution is missing goes
      on from the outer parameters, where theirs goes on from its own.
    """
    check_cadence(sync_every)
    core.check_choice("inner_state", inner_state, ("keep", "reset"))
    core.check_choice("rejoin", rejoin, ("keep", "reset"))
    loop = Loop(
        inner=optax.with_extra_args_support(inner),
        outer=optax.with_extra_args_support(nesterov(axis_name) if outer is None else outer),
        sync_every=sync_every,
        axis_name=axis_name,
        reset=inner_state == "reset",
        rejoin=rejoin,
    )
    return optax.GradientTransformationExtraArgs(loop.init, loop.update)  # type: ignore[arg-type]


def check_cadence(sync_every: Any) -> None:
    """Raises unless ``sync_every`` is an int of at least 1, or a function."""
    if not callable(sync_every):
        core.check_int("sync_every", sync_every)


def initial_state(
    inner: optax.GradientTransformation,
    outer_state: Callable[[Any], Any],
    params: optax.Params,
    axis_name: str,
) -> DilocoState:
    """The state before the first step, common to all variants.

    Args:
      inner: the inner optimizer.
      outer_state: makes the state of the outer chain of the outer parameters.
      params: equal on all workers.
      axis_name: the workers' axis.

    Raises:
      TypeError: for a leaf that is not real floating point.
      ValueError: for one that differs between workers.
    """
    core.check_real_floating(params, "diloco")
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        if axis_name in core.varying_axes(p):
            where = jax.tree_util.keystr(path) or "the only leaf"
            raise ValueError(f"init needs params equal on all workers, and {where} may differ")
    # Copies: the outer parameters of float32 would else be the caller's own arrays.
    theta = jax.tree.map(lambda p: jnp.array(p, core.accumulator_dtype(p)), params)
    zero = lambda: jnp.zeros((), jnp.int32)
    return DilocoState(
        count=zero(),
        since=zero(),
        inner=core.vary(inner.init(params), axis_name),
        outer_params=theta,
        outer=outer_state(theta),
        skipped=zero(),
        left_out=zero(),
    )


@dataclasses.dataclass(frozen=True)
class Loop:
    """What ``diloco`` was called with, checked. A variant has an ``outer_step`` of its own."""

    inner: optax.GradientTransformationExtraArgs
    outer: optax.GradientTransformationExtraArgs
    sync_every: Cadence
    axis_name: str
    reset: bool
    rejoin: str

    def init(self, params: optax.Params) -> DilocoState:
        """The state before the first step."""
        return initial_state(self.inner, self.outer.init, params, self.axis_name)

    def update(
        self,
        updates: optax.Updates,
        state: DilocoState,
        params: optax.Params | None = None,
        *,
        active: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DilocoState]:
        """This worker's step, to the outer parameters if it is the last of a round."""
        weight, specs = local.as_weight(active), extra_args.get("param_specs")
        every = self.sync_every(state.count) if callable(self.sync_every) else self.sync_every
        step, state = local.advance(
            self.inner,
            updates,
            state,
            params,
            active=weight,
            rejoin=self.rejoin,
            axis_name=self.axis_name,
            **extra_args,
        )
        together = lambda step, state: self.synchronise(params, step, state, weight, specs)
        branches = core.alike([together, lambda *same: same], step, state)
        return jax.lax.cond(state.since >= every, *branches, step, state)

    def synchronise(
        self,
        params: optax.Params,
        step: optax.Updates,
        state: DilocoState,
        active: jax.Array | None,
        specs: Any,
    ) -> tuple[optax.Updates, DilocoState]:
        """The outer step, and in place of the inner one the step to where it leads."""
        reached = optax.apply_updates(params, step)
        delta = local.pseudo_gradient(state.outer_params, reached)
        own = contribution(delta, active, self.axis_name)
        stepped, variant = self.outer_step(own, state, specs)
        fresh = local.restarted(self.inner, state.inner, stepped.params, params)
        begin_anew = ~own.finite | self.reset
        return local.updates_to(params, stepped.params), state._replace(
            since=jnp.zeros_like(state.since),
            inner=local.choose(begin_anew, fresh, state.inner),
            outer_params=stepped.params,
            outer=stepped.state,
            skipped=state.skipped + stepped.skipped,
            left_out=state.left_out + own.left_out,
            variant=variant,
        )

    def outer_step(self, own: Contribution, state: DilocoState, specs: Any) -> tuple[Stepped, Any]:
        """What an outer step leaves, and ``variant`` after it."""
        stepped = outer_step(
            self.outer,
            own,
            state.outer_params,
            state.outer,
            axis_name=self.axis_name,
            param_specs=specs,
        )
        return stepped, state.variant
