"""CO2: local updates, a mean that is one round late, and a slow momentum that bears with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers.diloco.delayed import one_round_late
from jaxopt_suite.optimizers.diloco.diloco import Cadence, Restart, diloco
from jaxopt_suite.optimizers.diloco.outer import mean_over_workers

Penalty = Callable[[jax.Array, jax.Array], jax.Array]


class SlowMomentumState(NamedTuple):
    """State of ``slow_momentum``: 4mn bytes for an m-by-n matrix."""

    count: jax.Array  # type: ignore[assignment]  # int32 []: outer steps
    momentum: optax.Updates  # float32, shapes of params
    moved: jax.Array  # float32 []: Euclidean length of the last outer step


def relative_movement(moved: jax.Array, update: jax.Array) -> jax.Array:
    """A staleness gap: 1 + moved / update; 1 where nothing has arrived.

    How far the outer parameters went while a pseudo-gradient was under way, beside its own length.

    Args:
      moved: float32 [], Euclidean length of the last outer step.
      update: float32 [], Euclidean length of the mean pseudo-gradient that has arrived.

    Returns:
      float32 [], at least 1.
    """
    return 1 + jnp.where(update > 0, moved / jnp.where(update > 0, update, 1.0), 0.0)


def slow_momentum(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    momentum: jax.typing.ArrayLike = 0.2,
    *,
    inner_rate: optax.ScalarOrSchedule = 1.0,
    penalty: Penalty | None = None,
    clip: float | None = None,
) -> optax.GradientTransformation:
    r"""An outer optimizer: heavy-ball momentum of pseudo-gradients in units of the inner rate.

    With the mean pseudo-gradient $\bar\Delta$, the inner rate $\gamma_t$ and a penalty
    $\Lambda_t \ge 1$,

    $$m \leftarrow \mathrm{clip}\left(\beta m + \frac{\bar\Delta}{\gamma_t \Lambda_t}, \pm c\right),
    \quad u = -\alpha_t \gamma_t m.$$

    Without penalty and clip it is SlowMo's outer step.

    Args:
      learning_rate: α, at least 0, or a schedule of the count of outer steps.
      momentum: β, in [0, 1).
      inner_rate: γ, above 0, or a schedule of the count of outer steps. Of a constant one only the
        product with ``clip`` matters.
      penalty: Λ as a function of two lengths, see ``relative_movement``; None: 1.
      clip: c, above 0, for each entry of the momentum, which counts in inner rates; None: no limit.

    Returns:
      An ``optax.GradientTransformation``; its updates are to be added.

    Raises:
      ValueError, TypeError: for an argument out of range.

    References:
      Wang, Tantia, Ballas and Rabbat, "SlowMo: Improving Communication-Efficient Distributed SGD
      with Slow Momentum", 2019, arXiv:1910.00643.
    """
    core.check_learning_rate(learning_rate)
    core.check_number("momentum", momentum, low=0.0, high=1.0, high_open=True)
    if not callable(inner_rate):
        core.check_number("inner_rate", inner_rate, low=0.0, low_open=True)
    if clip is not None:
        core.check_number("clip", clip, low=0.0, low_open=True)
    if penalty is not None and not callable(penalty):
        raise TypeError(f"penalty must be a function of two lengths or None, got {penalty!r}")

    def init(params: optax.Params) -> SlowMomentumState:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, core.accumulator_dtype(p)), params)
        return SlowMomentumState(jnp.zeros((), jnp.int32), zeros, jnp.zeros(()))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SlowMomentumState]:
        del params
        alpha, gamma = (f(state.count) if callable(f) else f for f in (learning_rate, inner_rate))
        gap = penalty(state.moved, optax.tree.norm(updates)) if penalty else 1.0

        def accumulate(m: jax.Array, u: jax.Array) -> jax.Array:
            m = momentum * m + u.astype(m.dtype) / (gamma * gap)
            return m if clip is None else jnp.clip(m, -clip, clip)

        mu = jax.tree.map(accumulate, state.momentum, updates)
        step = jax.tree.map(lambda m, u: (-alpha * gamma * m).astype(u.dtype), mu, updates)
        moved = optax.tree.norm(step).astype(state.moved.dtype)
        return step, SlowMomentumState(optax.safe_increment(state.count), mu, moved)

    return optax.GradientTransformation(init, update)


def co2(
    inner: optax.GradientTransformation,
    *,
    sync_every: Cadence,
    axis_name: str,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    momentum: jax.typing.ArrayLike = 0.2,
    inner_rate: optax.ScalarOrSchedule = 1.0,
    penalty: Penalty | None = relative_movement,
    clip: float | None = None,
    mean: optax.GradientTransformation | None = None,
    inner_state: Restart = "keep",
    rejoin: Restart = "keep",
) -> optax.GradientTransformationExtraArgs:
    r"""CO2: DiLoCo whose outer step takes the mean of the round before.

    Round t starts from $x_t$ on all workers, and worker w ends it at $y_{w,t}$. The mean
    $\bar y_t$ is under way during round t + 1, whose end applies it:

    $$m \leftarrow \mathrm{clip}\left(\beta m + \frac{x_{t-1} - \bar y_{t-1}}{\gamma_t \Lambda_t},
    \pm c\right), \quad x_{t+1} = x_t - \alpha_t \gamma_t m; \qquad x_1 = x_0.$$

    It is ``diloco`` with the outer chain of a mean, ``one_round_late`` and ``slow_momentum``, and
    says everything else as they do: state, wire, what overlaps, workers that leave and return.
    $x_{t-1} - \bar y_{t-1}$ is the mean pseudo-gradient, so that no older parameters are kept.

    The momentum amplifies a constant pseudo-gradient by $1/(1-\beta)$, and the delay makes that
    unstable. A penalty or a clip suffices for a small β; a large one needs both.

    Memory, for an m-by-n matrix: 12mn bytes (outer parameters, the mean under way, momentum) and
    the inner state.

    Args:
      inner: any optimizer; its schedules count inner steps.
      sync_every: inner steps of a round, or a function of the steps so far that gives it.
      axis_name: the workers' axis.
      learning_rate: α, at least 0, or a schedule of rounds.
      momentum: β, in [0, 1). The authors' example takes 0 for up to 16 workers, 0.2 for up to 32,
        0.5 for up to 64, and 0.6 beyond.
      inner_rate: γ, above 0, or a schedule of rounds: what the momentum is measured in.
      penalty: Λ as a function of two lengths; None: none.
      clip: c, above 0, for each entry of the momentum; None: no limit.
      mean: the link that communicates. None: ``mean_over_workers(axis_name)``.
      inner_state: ``"keep"`` or ``"reset"`` the inner state at the end of a round.
      rejoin: what an absent worker returns with, as in ``diloco``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``, whose state is a ``DilocoState``.

    Raises:
      ValueError, TypeError: as ``diloco`` and ``slow_momentum`` do.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxopt_suite import parallel
      >>> from jaxopt_suite.optimizers import co2, outer_params
      >>> tx = co2(optax.sgd(0.1), sync_every=5, axis_name="worker")
      >>> loss = lambda x, targets: 0.5 * jnp.mean((x - targets) ** 2)
      >>> step = parallel.make_train_step(loss, tx, worker_axis="worker", workers=4)
      >>> state = step.init(jnp.zeros(()))
      >>> for _ in range(200):
      ...     state, _ = step(state, jnp.arange(4.0))
      >>> round(float(outer_params(state.opt_state, state.params[0])), 3)
      1.5

    References:
      Sun et al., "CO2: Efficient Distributed Training with Full Communication-Computation Overlap",
      2024, arXiv:2401.16265. The default penalty is ours: the paper's formula could not be checked,
      and the authors' code (weigao266/fairscale-CO2) has a constant 1 in its place. That code
      computes a clipped momentum and discards it; here it counts.
    """
    link = mean_over_workers(axis_name) if mean is None else mean
    slow = slow_momentum(learning_rate, momentum, inner_rate=inner_rate, penalty=penalty, clip=clip)
    return diloco(
        inner,
        optax.chain(link, one_round_late(), slow),
        sync_every=sync_every,
        axis_name=axis_name,
        inner_state=inner_state,
        rejoin=rejoin,
    )
