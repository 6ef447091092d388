r"""The outer step: who takes part, the mean, the step with it, and the check that there is a mean.

**What an outer chain is given.** Its updates are $x_w = s_w \Delta_w$, with this worker's weight
relative to the mean of all workers' weights, $s_w = a_w / \frac1n \sum_v a_v$; so that a plain
mean of them, by whatever link, is the weighted mean $\sum a_w \Delta_w / \sum a_w$. One who is
absent sends zeros. As an extra argument there is ``weight=`` ($s_w$, float32 ``[]``), for links
that remember something of what they sent: one who is absent ($s_w = 0$) has nothing to remember.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxopt_suite import core
from jaxopt_suite.core.collectives import bound_axis_size
from jaxopt_suite.optimizers.diloco.local import choose


def mean_over_workers(axis_name: str) -> optax.GradientTransformationExtraArgs:
    """Replaces each worker's update by the mean of all workers': one all-reduce in float32 a leaf.

    XLA joins the all-reduces of leaves, and on a mesh with more axes each device sends its own part
    of a leaf. 8 (n - 1)/n bytes an entry, for n workers.

    Args:
      axis_name: the workers' axis, of ``parallel.run_workers`` or ``make_train_step``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` without state. Updates keep their dtype.

    Raises:
      ValueError: at ``update``, if ``axis_name`` is not bound.
    """

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        bound_axis_size(axis_name, "mean_over_workers")

        def mean(x: jax.Array) -> jax.Array:
            wide = core.vary(x.astype(core.accumulator_dtype(x)), axis_name)
            return jax.lax.pmean(wide, axis_name).astype(x.dtype)

        return jax.tree.map(mean, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def nesterov(
    axis_name: str,
    learning_rate: optax.ScalarOrSchedule = 0.7,
    momentum: jax.typing.ArrayLike = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""DiLoCo's outer optimizer: the mean over workers, then SGD with Nesterov's momentum.

    PyTorch's form without dampening: $v \leftarrow \mu v + \bar\Delta$, and the step is
    $-\eta(\bar\Delta + \mu v)$. A constant $\bar\Delta$ is so amplified by $1/(1-\mu)$.

    Args:
      axis_name: the workers' axis.
      learning_rate: η, at least 0, or a schedule of the count of outer steps.
      momentum: μ, in [0, 1).
    """
    core.check_learning_rate(learning_rate)
    core.check_number("momentum", momentum, low=0.0, high=1.0, high_open=True)
    return optax.chain(
        mean_over_workers(axis_name), optax.sgd(learning_rate, momentum, nesterov=True)
    )


class Contribution(NamedTuple):
    """One worker's part in an outer step."""

    x: Any  # float32, shapes of params: the pseudo-gradient times its weight, zeros if absent
    weight: jax.Array  # float32 []: relative to the mean over workers
    finite: jax.Array  # bool []: whether the pseudo-gradient was
    anybody: jax.Array  # bool [], equal on all workers: whether any of them takes part
    left_out: jax.Array  # int32 [], equal on all workers: how many are not finite


def contribution(delta: Any, active: jax.Array | None, axis_name: str) -> Contribution:
    """Weighs a pseudo-gradient; one that is not finite takes no part. One all-reduce of 8 bytes.

    Args:
      delta: float32, shapes of params, this worker's.
      active: float32 [], this worker's weight, at least 0; None: 1.
      axis_name: the workers' axis.
    """
    weight = jnp.ones(()) if active is None else active
    finite = jnp.array(True)
    for x in jax.tree.leaves(delta):
        finite &= jnp.all(jnp.isfinite(x))
    bad = (weight > 0) & ~finite
    weight = jnp.where(finite, weight, 0.0)
    mine = jnp.stack([weight, bad.astype(jnp.float32)])
    total, left_out = jax.lax.psum(core.vary(mine, axis_name), axis_name)
    workers = jax.lax.axis_size(axis_name)
    relative = jnp.where(total > 0, workers * weight / total, 0.0)
    scaled = lambda x: jnp.where(relative > 0, relative * x, 0.0)
    return Contribution(
        x=jax.tree.map(scaled, delta),
        weight=relative,
        finite=finite,
        anybody=total > 0,
        left_out=left_out.astype(jnp.int32),
    )


class Stepped(NamedTuple):
    """What an outer step leaves; equal on all workers but for what a lossy mean remembers."""

    params: Any  # float32: the outer parameters
    state: Any  # of the outer chain
    skipped: jax.Array  # int32 []: 1 if nobody took part or the chain's updates were not finite


def outer_step(
    outer: optax.GradientTransformationExtraArgs,
    own: Contribution,
    params: Any,
    state: Any,
    *,
    axis_name: str,
    param_specs: Any,
    argument: str = "outer",
) -> Stepped:
    """The outer parameters and state after a step; as they were, if it had to be skipped.

    Raises:
      ValueError: if the updates of the chain differ between workers; the message has the name of
        the ``argument`` that the chain was given as.
    """
    if axis_name not in jax.sharding.get_abstract_mesh().manual_axes:
        _check_communicates(outer, own.x, params, state, axis_name, argument)
    updates, new_state = outer.update(
        own.x, state, params, weight=own.weight, param_specs=param_specs
    )
    _refuse_varying(updates, axis_name, argument)

    taken = own.anybody
    for u in jax.tree.leaves(updates):
        taken &= jnp.all(jnp.isfinite(u))
    stepped = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
    return Stepped(
        params=choose(taken, stepped, params),
        state=choose(taken, new_state, state),
        skipped=(~taken).astype(jnp.int32),
    )


def _check_communicates(
    outer: optax.GradientTransformationExtraArgs,
    x: Any,
    params: Any,
    state: Any,
    axis_name: str,
    argument: str,
) -> None:
    """Under ``vmap`` there are no types to tell it by: the chain is traced where there are."""
    surrounding = jax.sharding.get_abstract_mesh()
    if surrounding.empty:
        size = jax.lax.axis_size(axis_name)
        mesh = AbstractMesh((size,), (axis_name,), axis_types=(AxisType.Auto,))
    else:  # a mesh in use can get one more axis, if it stays as large
        mesh = AbstractMesh(
            (*surrounding.axis_sizes, 1),
            (*surrounding.axis_names, axis_name),
            axis_types=(*surrounding.axis_types, AxisType.Auto),
        )

    def one_worker(x: Any, params: Any, state: Any) -> jax.Array:
        weight = core.vary(jnp.ones(()), axis_name)
        x = core.vary(x, axis_name)
        for _ in range(2):  # what differs may come out a step later, of what a link has kept
            updates, state = outer.update(x, state, params, weight=weight)
            _refuse_varying(updates, axis_name, argument)
        return jnp.zeros(())

    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (x, params, state))
    probe = jax.shard_map(
        one_worker,
        mesh=mesh,
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        axis_names={axis_name},
    )
    with jax.sharding.use_abstract_mesh(mesh):
        jax.eval_shape(probe, *like)


def _refuse_varying(updates: Any, axis_name: str, argument: str) -> None:
    for path, u in jax.tree_util.tree_leaves_with_path(updates):
        if axis_name in core.varying_axes(u):
            where = jax.tree_util.keystr(path) or "the only leaf"
            raise ValueError(
                f"{argument} must make its updates equal on all workers of axis {axis_name!r}, and "
                f"those of {where} may differ: the outer parameters would drift apart. Begin it "
                f"with a link that communicates, such as mean_over_workers({axis_name!r}) or "
                f"compressed_mean(..., axis_name={axis_name!r})"
            )
