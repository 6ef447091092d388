"""SAVIC: local SGD whose steps are scaled, entry by entry, by what is fixed for a round."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.core.collectives import bound_axis_size
from jaxopt_suite.optimizers.diloco import local
from jaxopt_suite.optimizers.diloco.diloco import Cadence, Restart, diloco
from jaxopt_suite.optimizers.diloco.outer import contribution, mean_over_workers
from jaxopt_suite.optimizers.diloco.state import DilocoState

_RULES = ("adam", "rmsprop", "oasis")


class SavicState(NamedTuple):
    """What ``savic`` keeps besides; equal on all workers with global scaling, else a worker's."""

    rounds: jax.Array  # int32 []: estimates taken in so far
    scale: optax.Updates  # float32, shapes of params: D² of "adam" and "rmsprop", D of "oasis"


def savic(
    learning_rate: optax.ScalarOrSchedule,
    b2: float = 0.999,
    floor: float = 1e-3,
    *,
    sync_every: Cadence,
    axis_name: str,
    rule: Literal["adam", "rmsprop", "oasis"] = "adam",
    scaling: Literal["global", "local"] = "global",
    rejoin: Restart = "keep",
) -> optax.GradientTransformationExtraArgs:
    r"""SAVIC: local SGD with a diagonal preconditioner that stays as it is during a round.

    In the first step of a round, where all workers have the same parameters, an estimate $h$ of the
    scale of each entry is taken in; the steps of the round are

    $$x_w \leftarrow x_w - \gamma\, g_w / \hat D, \qquad \hat D = \max(\alpha, |D|),$$

    and its end takes the mean of all $x_w$. In round k (from 0), entry by entry,

    - ``"rmsprop"``: $D^2 \leftarrow \beta D^2 + (1 - \beta) h^2$, with $h$ the gradient;
    - ``"adam"``: the same, with $\beta_k = \beta (1 - \beta^k) / (1 - \beta^{k+1})$ for β, that is
      with Adam's correction of the bias;
    - ``"oasis"``: $D \leftarrow \beta D + (1 - \beta) h$, with $h$ an estimate of the diagonal of
      the Hessian, $v \odot \nabla^2\! f\, v$ with random signs v.

    The first estimate is D itself. With global scaling $h$ is the mean over workers (the *mean* is
    squared), and D equal on all of them. With local scaling each has its own, which saves an
    all-reduce, and moves the fixed point where data differ, to that of
    $\sum_w \hat D_w^{-1} \nabla f_w = 0$.

    It is ``diloco`` with inner SGD of scaled gradients and outer SGD of rate 1: workers may leave
    and return (those present make the mean of $h$, too), and it is evaluated at ``outer_params``.

    **Wire.** At the end of a round an all-reduce in float32, 8 (n - 1)/n bytes an entry, and at its
    beginning another one for the mean of $h$ if scaling is global; two numbers beside each. No
    other step sends anything.

    Memory, for an m-by-n matrix: 8mn bytes, outer parameters and D.

    Args:
      learning_rate: γ, at least 0, or a schedule of inner steps. What is a stable rate depends on
        ``floor``.
      b2: β, in [0, 1).
      floor: α, above 0: the least scale.
      sync_every: inner steps of a round, or a function of the steps so far that gives it.
      axis_name: the workers' axis.
      rule: how estimates are made into D. ``"oasis"`` asks for ``update(..., curvature=f)``, a
        function without arguments that gives this worker's $v \odot \nabla^2\! f\, v$ at its
        parameters, shapes of params. It is called in the branch of a round's first step only; v
        should be the same on all workers.
      scaling: ``"global"`` or ``"local"``.
      rejoin: of the inner state of an absent worker, as in ``diloco``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose state is a ``DilocoState``.

    Raises:
      ValueError, TypeError: for an argument out of range; at ``update``, without ``params``, if
        ``axis_name`` is not bound, or without ``curvature`` where the rule asks for it.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxopt_suite import parallel
      >>> from jaxopt_suite.optimizers import outer_params, savic
      >>> tx = savic(0.1, sync_every=5, axis_name="worker")
      >>> loss = lambda x, targets: 0.5 * jnp.mean((x - targets) ** 2)
      >>> step = parallel.make_train_step(loss, tx, worker_axis="worker", workers=4)
      >>> state = step.init(jnp.zeros(()))
      >>> for _ in range(200):
      ...     state, _ = step(state, jnp.arange(4.0))
      >>> round(float(outer_params(state.opt_state, state.params[0])), 3)
      1.5

    References:
      Chezhegov et al., "Local Methods with Adaptivity via Scaling", 2024, arXiv:2406.00846. Written
      after its abstract and the methods that it names, and not compared with its pseudo-code; no
      official code is known. The paper keeps the scale between synchronisations; that an estimate
      is of a round's first step is our reading. OASIS: Jahani et al., "Doubly Adaptive Scaled
      Algorithm for Machine Learning Using Second-Order Information", 2021, arXiv:2109.05198.
    """
    core.check_learning_rate(learning_rate)
    core.check_number("b2", b2, low=0.0, high=1.0, high_open=True)
    core.check_number("floor", floor, low=0.0, low_open=True)
    core.check_choice("rule", rule, _RULES)
    core.check_choice("scaling", scaling, ("global", "local"))
    local_sgd = diloco(
        optax.sgd(learning_rate),
        optax.chain(mean_over_workers(axis_name), optax.sgd(1.0)),
        sync_every=sync_every,
        axis_name=axis_name,
        rejoin=rejoin,
    )
    scaled = _Scaled(local_sgd, b2, floor, axis_name, rule, scaling == "global")
    return optax.GradientTransformationExtraArgs(scaled.init, scaled.update)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """What ``savic`` was called with, checked."""

    local_sgd: optax.GradientTransformationExtraArgs
    b2: float
    floor: float
    axis_name: str
    rule: str
    is_global: bool

    def init(self, params: optax.Params) -> DilocoState:
        state = self.local_sgd.init(params)
        zeros = jax.tree.map(jnp.zeros_like, state.outer_params)
        variant = SavicState(jnp.zeros((), jnp.int32), zeros)
        return state._replace(
            variant=variant if self.is_global else core.vary(variant, self.axis_name)
        )

    def update(
        self,
        updates: optax.Updates,
        state: DilocoState,
        params: optax.Params | None = None,
        *,
        active: jax.typing.ArrayLike | None = None,
        curvature: Callable[[], optax.Updates] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DilocoState]:
        bound_axis_size(self.axis_name, "savic")
        if self.rule == "oasis" and curvature is None:
            raise ValueError("rule 'oasis' needs curvature: call update(..., curvature=function)")
        estimate = curvature if self.rule == "oasis" and curvature else lambda: updates
        weight = local.as_weight(active)
        begin = lambda kept: self._taken_in(estimate(), kept, weight)
        branches = core.alike([begin, lambda kept: kept], state.variant)
        variant = jax.lax.cond(state.since == 0, *branches, state.variant)
        state = state._replace(variant=variant)
        return self.local_sgd.update(
            self._divided(updates, variant.scale), state, params, active=active, **extra_args
        )

    def _taken_in(self, estimate: Any, kept: SavicState, active: jax.Array | None) -> SavicState:
        """The scale with one more estimate; as it was, if that is nobody's."""
        wide = jax.tree.map(lambda h, d: h.astype(d.dtype), estimate, kept.scale)
        if self.is_global:
            own = contribution(wide, active, self.axis_name)
            h, _ = mean_over_workers(self.axis_name).update(own.x, optax.EmptyState())
            usable = own.anybody
        else:
            h, usable = wide, jnp.array(True) if active is None else active > 0
        for x in jax.tree.leaves(h):
            usable &= jnp.all(jnp.isfinite(x))
        beta = self._beta(kept.rounds)
        square = (lambda x: x) if self.rule == "oasis" else jnp.square
        average = lambda d, x: (beta * d + (1 - beta) * square(x)).astype(d.dtype)
        scale = jax.tree.map(average, kept.scale, h)
        new = SavicState(optax.safe_increment(kept.rounds), scale)
        return local.choose(usable, new, kept)

    def _beta(self, rounds: jax.Array) -> jax.Array:
        """How much of the old scale stays: at first nothing."""
        if self.rule == "adam":
            power = jnp.power(self.b2, rounds.astype(float))
            return self.b2 * (1 - power) / (1 - self.b2 * power)
        return jnp.where(rounds > 0, self.b2, 0.0)

    def _divided(self, updates: optax.Updates, scale: Any) -> optax.Updates:
        def leaf(g: jax.Array, d: jax.Array) -> jax.Array:
            size = jnp.abs(d) if self.rule == "oasis" else jnp.sqrt(d)
            return (g.astype(d.dtype) / jnp.maximum(size, self.floor)).astype(g.dtype)

        return jax.tree.map(leaf, updates, scale)
