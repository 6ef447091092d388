"""PowerSGD: momentum SGD on a mean of low rank, which travels as two thin factors."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.core.collectives import bound_axis_size
from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers.compression import feedback
from jaxopt_suite.optimizers.compression.exchange import mean_of_buffer
from jaxopt_suite.optimizers.compression.low_rank import low_rank
from jaxopt_suite.optimizers.compression.mean import DenseRule, compressed_mean

Form = Literal["paper", "heavy_ball", "nesterov"]
_FORMS = ("paper", "heavy_ball", "nesterov")


class DenseWarmupState(NamedTuple):
    """State of the dense warm-up around a communicating link."""

    count: jax.Array  # type: ignore[assignment]  # int32 []: updates so far
    inner: Any  # of the link


class TraceState(NamedTuple):
    """State of the momentum."""

    trace: optax.Updates  # float32, shapes of params


def powersgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: jax.typing.ArrayLike = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _common.Mask = None,
    *,
    axis_name: str,
    rank: int = 4,
    form: Form = "paper",
    coupled_decay: bool = False,
    warmup_steps: int = 0,
    seed: int = 0,
    dense: DenseRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""PowerSGD: error feedback, one power step on the mean gradient, then momentum.

    Written for one worker of $n$, with gradient $g_w$ of a leaf seen as a matrix (m by c: all axes
    but the last against the last) and the last step's $Q$ (c by r):

    $$X_w = g_w + e_w, \quad \hat P = \mathrm{orth}(\tfrac1n\textstyle\sum_w X_w Q), \quad
    Q_w = X_w^\top \hat P, \quad Q \leftarrow \tfrac1n\sum_w Q_w, \quad \hat g = \hat P Q^\top,
    \quad e_w \leftarrow X_w - \hat P Q_w^\top.$$

    This is ``compressed_mean(compressors.low_rank(rank), feedback=feedback.ef())``. Momentum comes
    after it, on the mean, as all workers have it: $v \leftarrow \mu v + \hat g$, and the step is

    - $\hat g + v$ in the ``"paper"``, which calls it Nesterov's;
    - $v$ with ``"heavy_ball"``, which is ``optax.sgd(momentum=...)``;
    - $\hat g + \mu v$ with ``"nesterov"``, which is ``optax.sgd(momentum=..., nesterov=True)``.

    **Dense leaves.** Vectors, matrices whose factors would be more than half of them, and leaves of
    fewer than 1024 elements are averaged as they are. The paper compresses every matrix.

    **Wire.** Two all-reduces of float32 a step: $P$ of all matrices with the dense leaves, then
    $Q$; for each matrix $\frac{n-1}{n} 8 r (m + c)$ bytes a worker, where a dense mean has
    $\frac{n-1}{n} 8 m c$. And one scalar. In the first ``warmup_steps`` steps one all-reduce of
    everything, in the other branch of a conditional.

    Memory, for an m-by-n matrix: 8mn + 4rn bytes: the momentum and this worker's error, and $Q$.

    Departures from the official code (epfml/powersgd, in ``paper-code``): the error is
    $X_w - \hat P Q_w^\top$, without the mean in $Q$: updates are the same, but theirs keeps all in
    which workers differ, which grows without bound. A dependent column of $P$ is zero, where theirs
    is rounding noise made a direction, and a column of $Q$ that is zero keeps its old value. The
    ``powersgd`` package of the same repository is another rule: it sends one factor a step, in
    turns.

    Args:
      learning_rate: step size, at least 0, or a schedule of the step count.
      momentum: μ, in [0, 1).
      weight_decay: multiplied by the parameters, and by the learning rate.
      mask: tree of bools, or a function of the parameters returning one: which leaves decay.
      axis_name: the workers' axis, of ``parallel.run_workers`` or ``make_train_step``.
      rank: r, at least 1; lowered to the smaller side of a matrix.
      form: of the momentum, see above.
      coupled_decay: add the decay to $\hat g$, before the momentum, as the official code does,
        instead of to the step.
      warmup_steps: first steps with dense means; 0 in the paper, 10 % of a run is common.
      seed: of the first Q.
      dense: ``(path, leaf) -> bool``, the leaves that are averaged as they are.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    Raises:
      ValueError, TypeError: for an argument out of range; at ``init``, for a leaf that is not real
        floating point; at ``update``, if ``axis_name`` is not bound, or specs for a leaf are
        missing.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_suite import parallel
      >>> from jaxopt_suite.optimizers import powersgd
      >>> tx = powersgd(0.005, axis_name="worker", rank=4)
      >>> def worker(x, target):
      ...     def step(carry, _):
      ...         x, state = carry
      ...         updates, state = tx.update(x - target, state, x)
      ...         return (optax.apply_updates(x, updates), state), None
      ...     return jax.lax.scan(step, (x, tx.init(x)), length=400)[0][0]
      >>> targets = jax.random.normal(jax.random.key(0), (4, 64, 64))
      >>> x = parallel.run_workers(worker, axis_name="worker", in_axes=(None, 0))(
      ...     jnp.zeros((64, 64)), targets)
      >>> bool(jnp.mean((x - targets.mean(0)) ** 2) < 0.1 * jnp.mean(targets.mean(0) ** 2))
      True

    References:
      Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
      Optimization", 2019, arXiv:1905.13727.
    """
    core.check_learning_rate(learning_rate)
    core.check_number("momentum", momentum, low=0.0, high=1.0, high_open=True)
    core.check_choice("form", form, _FORMS)
    core.check_int("warmup_steps", warmup_steps, low=0)
    if not callable(weight_decay):
        core.check_number("weight_decay", weight_decay, low=0.0)
    compressor = low_rank(rank)
    mean = compressed_mean(
        compressor, axis_name=axis_name, feedback=feedback.ef(), seed=seed, dense=dense
    )
    if warmup_steps:
        mean = _dense_at_first(mean, warmup_steps, axis_name)
    rules = [optax.add_decayed_weights(weight_decay, mask), _momentum(momentum, form)]
    return optax.chain(
        mean,
        *(rules if coupled_decay else reversed(rules)),
        optax.scale_by_learning_rate(learning_rate),
    )


def _dense_at_first(
    link: optax.GradientTransformationExtraArgs, steps: int, axis_name: str
) -> optax.GradientTransformationExtraArgs:
    """The plain mean for so many updates, then ``link``, in the state it starts with."""

    def init(params: optax.Params) -> DenseWarmupState:
        return DenseWarmupState(jnp.zeros((), jnp.int32), link.init(params))

    def update(
        updates: optax.Updates,
        state: DenseWarmupState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DenseWarmupState]:
        bound_axis_size(axis_name, "powersgd")

        def dense(updates: optax.Updates) -> tuple[optax.Updates, Any]:
            leaves, structure = jax.tree.flatten(updates)
            means = mean_of_buffer(leaves, axis_name)
            means = [mean.astype(x.dtype) for mean, x in zip(means, leaves, strict=True)]
            return structure.unflatten(means), state.inner

        def linked(updates: optax.Updates) -> tuple[optax.Updates, Any]:
            return link.update(updates, state.inner, params, **extra_args)

        updates, inner = jax.lax.cond(state.count < steps, dense, linked, updates)
        return updates, DenseWarmupState(optax.safe_increment(state.count), inner)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def _momentum(decay: jax.typing.ArrayLike, form: Form) -> optax.GradientTransformation:
    """Unlike ``optax.trace`` always in float32, and in the paper's form too."""

    def init(params: optax.Params) -> TraceState:
        zeros = lambda p: jnp.zeros(jnp.shape(p), jnp.float32)
        return TraceState(jax.tree.map(zeros, params))

    def update(
        updates: optax.Updates, state: TraceState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, TraceState]:
        del params

        def leaf(g: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            g32 = g.astype(jnp.float32)
            mu = jnp.asarray(decay, jnp.float32)
            v = mu * v + g32
            step = {"paper": g32 + v, "heavy_ball": v, "nesterov": g32 + mu * v}[form]
            return step.astype(g.dtype), v

        updates, trace = core.map_unzip(leaf, 2, updates, state.trace)
        return updates, TraceState(trace)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
