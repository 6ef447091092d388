"""TernGrad: gradients as -1, 0 and 1 times one scale that all workers share."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxopt_suite import core
from jaxopt_suite.core.collectives import bound_axis_size
from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers._shards import Path, keys_of_parts, layout_of, run_on_shards
from jaxopt_suite.optimizers.compression import pieces
from jaxopt_suite.optimizers.compression.exchange import mean_of_buffer
from jaxopt_suite.optimizers.compression.mean import DenseRule, default_dense
from jaxopt_suite.optimizers.compression.packing import Width, pack, unpack
from jaxopt_suite.optimizers.compression.signs import (
    pack_ternary,
    ternary,
    ternary_scales,
    unpack_ternary,
)
from jaxopt_suite.optimizers.grams import scale_by_grams

_BLOCK = 4  # trits a byte: pieces are whole bytes


class TerngradMeanState(NamedTuple):
    """State of ``terngrad_mean``: nothing but a counter, which its random numbers come from."""

    count: jax.Array  # type: ignore[assignment]  # int32 []: updates so far


def terngrad_mean(
    *,
    axis_name: str,
    clip: float | None = 2.5,
    seed: int = 0,
    dense: DenseRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces each worker's update by the mean of all workers', each made ternary at random.

    Written for one worker of $n$. For every leaf, with update $x_w$ of standard deviation
    $\sigma_w$ (its mean removed for that only):

    $$s_w = \min(\max|x_w|, c\,\sigma_w), \quad s = \max_w s_w, \quad
    t_w = \mathrm{sgn}(x_w)\, b_w, \quad P(b_w = 1) = \min(|x_w| / s, 1), \quad
    u = \tfrac{s}{n} \textstyle\sum_w t_w.$$

    The scale is shared so that what is added up are integers: the sum is exact, and the mean over
    the randomness is that of the updates, clipped to $\pm s$. No error is remembered. Clipping
    trades a small bias for a much smaller variance, which is $s\|x\|_1 - \|x\|^2$ for each worker;
    ``clip=None`` is without bias. A leaf that is constant is not clipped.

    **Wire.** Every worker owns a piece of each leaf: it gets that piece of all messages in two bits
    an entry, adds them up, and sends the sums to all, in 2 bits an entry for 1 worker, 4 for up to
    7, 8 for up to 127, 16 for more. For a leaf of $d$ entries these are
    $\frac{n-1}{n}d(\frac14 + \frac12)$, $\frac{n-1}{n}d(\frac14 + 1)$ or
    $\frac{n-1}{n}d(\frac14 + 2)$ bytes a worker and step, where a dense mean has
    $\frac{n-1}{n}8d$; and one all-reduce of a float32 scale a leaf. To send two bits an entry both
    ways, drawing the sums at random again, use
    ``compressed_mean(compressors.ternary(clip=2.5), ...)``. If ``update`` is given
    ``param_specs=`` (``make_train_step`` does so), each device talks along ``axis_name`` only, and
    its part of a leaf has a scale of its own.

    **Non-finite numbers.** One in any worker's leaf makes the leaf NaN on all workers, as the dense
    mean would be somewhere in it. Nothing is remembered that could be poisoned.

    Departures from the paper and the official code (wenwei202/terngrad): a scale is never above the
    largest magnitude, as $c\,\sigma_w$ alone would be for leaves without outliers; sums travel in
    whole numbers of bits that divide a byte, not $\log_2(2n+1)$; in the official code they travel
    as floats.

    Args:
      axis_name: the workers' axis, of ``parallel.run_workers`` or ``make_train_step``.
      clip: c, in standard deviations; 2.5 in the paper. ``None``: the scale is the largest
        magnitude.
      seed: of the randomness, which depends on nothing else than this, the leaf's path, the count
        of updates and the worker.
      dense: ``(path, leaf) -> bool``, the leaves that are averaged as they are, all in one
        all-reduce of float32. ``None``: those of fewer than 1024 elements. The paper leaves out
        the last layer, too, on large problems.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Updates keep their dtype.

    Raises:
      ValueError, TypeError: for an argument out of range; at ``init``, for a leaf that is not real
        floating point; at ``update``, if ``axis_name`` is not bound, or specs for a leaf are
        missing.

    References:
      Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
      Learning", 2017, arXiv:1705.07878.
    """
    compressor = ternary(clip=clip)  # checks it
    link = _Link(axis_name, clip, seed, default_dense(compressor) if dense is None else dense)
    return optax.GradientTransformationExtraArgs(link.init, link.update)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _Link:
    """What ``terngrad_mean`` was called with, checked."""

    axis_name: str
    clip: float | None
    seed: int
    dense: DenseRule

    def init(self, params: optax.Params) -> TerngradMeanState:
        core.check_real_floating(params, "terngrad")
        return TerngradMeanState(jnp.zeros((), jnp.int32))

    def update(
        self,
        updates: optax.Updates,
        state: TerngradMeanState,
        params: optax.Params | None = None,
        *,
        param_specs: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, TerngradMeanState]:
        del params, extra_args
        bound_axis_size(self.axis_name, "terngrad")
        with_paths, structure = jax.tree_util.tree_flatten_with_path(updates)
        paths, leaves = [path for path, _ in with_paths], [x for _, x in with_paths]
        axes, specs = layout_of(paths, param_specs, self.axis_name)
        dense = [x.size == 0 or self.dense(path, x) for path, x in with_paths]
        means = run_on_shards(
            functools.partial(self._means, paths, dense, specs),
            (leaves, state.count),
            (specs, PartitionSpec()),
            like=0,
            axes=axes,
        )
        return structure.unflatten(means), TerngradMeanState(optax.safe_increment(state.count))

    def _means(
        self,
        paths: Sequence[Path],
        dense: Sequence[bool],
        specs: Sequence[PartitionSpec],
        leaves: Sequence[jax.Array],
        count: jax.Array,
    ) -> list[jax.Array]:
        """The means of what one device holds of every leaf."""
        own = [core.vary(x.astype(jnp.float32), self.axis_name) for x in leaves]
        averaged = [i for i, flag in enumerate(dense) if flag]
        ternary = [i for i, flag in enumerate(dense) if not flag]
        means: list[Any] = [None] * len(leaves)
        for i, mean in zip(
            averaged, mean_of_buffer([own[i] for i in averaged], self.axis_name), strict=True
        ):
            means[i] = mean
        keys = self._keys([paths[i] for i in ternary], [specs[i] for i in ternary], count)
        exchanged = _ternary_means([own[i] for i in ternary], keys, self.clip, self.axis_name)
        for i, mean in zip(ternary, exchanged, strict=True):
            means[i] = mean
        return [mean.astype(x.dtype) for mean, x in zip(means, leaves, strict=True)]

    def _keys(
        self, paths: Sequence[Path], specs: Sequence[PartitionSpec], count: jax.Array
    ) -> list[jax.Array]:
        """A random key for each leaf: another on every worker, and for every part of the leaf."""
        keys = core.leaf_keys(self.seed, paths, count, jax.lax.axis_index(self.axis_name))
        return keys_of_parts(keys, specs)


def _ternary_means(
    leaves: Sequence[jax.Array], keys: Sequence[jax.Array], clip: float | None, axis_name: str
) -> list[jax.Array]:
    if not leaves:
        return []
    workers = jax.lax.axis_size(axis_name)
    scales = _shared_scales(leaves, clip, axis_name)
    rows = [pieces.cut(x, workers, _BLOCK) for x in leaves]
    codes = [_trits(*row) for row in zip(rows, scales, keys, strict=True)]

    sums = []
    for received in pieces.to_owners(codes, axis_name):
        trits = jax.vmap(lambda code: unpack_ternary(code, _BLOCK * code.size))(received)
        sums.append(_pack_sum(jnp.sum(trits, axis=0, dtype=jnp.int32), workers))

    means = []
    for x, row, s, told in zip(leaves, rows, scales, pieces.to_all(sums, axis_name), strict=True):
        length = row.shape[1]
        total = jax.vmap(lambda code, n=length: _unpack_sum(code, n, workers))(told)
        mean = jnp.where(jnp.isfinite(s), s / workers, jnp.nan) * total
        means.append(pieces.join(mean, x.shape, x.size))
    return means


def _shared_scales(
    leaves: Sequence[jax.Array], clip: float | None, axis_name: str
) -> list[jax.Array]:
    """The largest of the workers' scales of each leaf, infinite if one is not finite."""
    scales = []
    for x in leaves:
        (scale,) = ternary_scales(x.reshape(1, -1), jnp.full(1, x.size, jnp.float32), clip)
        scales.append(jnp.where(jnp.isfinite(scale), scale, jnp.inf))
    largest = lambda members: list(jax.lax.pmax(jnp.stack(members), axis_name))
    return pieces.by_axes(largest, scales, axis_name)


def _trits(rows: jax.Array, scale: jax.Array, key: jax.Array) -> jax.Array:
    """A message for the owners of its pieces, uint8 ``[workers, length / 4]``."""
    keys = jax.random.split(key, len(rows))
    draw = lambda row, key: pack_ternary(row[None], scale[None], key, row.size)
    return jax.vmap(draw)(rows, keys)


def _sum_width(workers: int) -> Width | None:
    """Bits for a whole number from -n to n; ``None``: whole bytes."""
    return 2 if workers == 1 else 4 if workers <= 7 else None


def _pack_sum(total: jax.Array, workers: int) -> jax.Array:
    width = _sum_width(workers)
    if width is not None:
        return pack((total + workers).astype(jnp.uint8), width)
    return total.astype(jnp.int8 if workers <= 127 else jnp.int16)


def _unpack_sum(packed: jax.Array, length: int, workers: int) -> jax.Array:
    width = _sum_width(workers)
    if width is not None:
        return unpack(packed, width, length).astype(jnp.float32) - workers
    return packed.astype(jnp.float32)


def terngrad(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _common.Mask = None,
    *,
    axis_name: str,
    clip: float | None = 2.5,
    seed: int = 0,
    dense: DenseRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """TernGrad with Adam: ``terngrad_mean``, Adam with float32 moments, decay, learning rate.

    The paper also has it with momentum: ``optax.chain(terngrad_mean(...), optax.sgd(...))``.

    Args:
      learning_rate: step size, at least 0, or a schedule of the step count.
      b1: decay of Adam's first moment, in [0, 1).
      b2: decay of Adam's second moment, in [0, 1).
      eps: added to the root, at least 0.
      eps_root: added under the root, at least 0.
      mu_dtype: dtype of the first moment; ``None`` is float32.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: tree of bools, or a function of the parameters returning one: which leaves decay.
      axis_name: see ``terngrad_mean``, as all arguments that follow.
      clip: see ``terngrad_mean``.
      seed: see ``terngrad_mean``.
      dense: see ``terngrad_mean``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_suite import parallel
      >>> from jaxopt_suite.optimizers import terngrad
      >>> tx = terngrad(optax.linear_schedule(0.1, 0.0, 200), axis_name="worker")
      >>> def worker(x, target):
      ...     def step(carry, _):
      ...         x, state = carry
      ...         updates, state = tx.update(x - target, state, x)
      ...         return (optax.apply_updates(x, updates), state), None
      ...     return jax.lax.scan(step, (x, tx.init(x)), length=200)[0][0]
      >>> targets = jax.random.normal(jax.random.key(0), (4, 64, 64))
      >>> x = parallel.run_workers(worker, axis_name="worker", in_axes=(None, 0))(
      ...     jnp.zeros((64, 64)), targets)
      >>> bool(jnp.mean((x - targets.mean(0)) ** 2) < 0.1 * jnp.mean(targets.mean(0) ** 2))
      True

    References:
      Wen et al., "TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
      Learning", 2017, arXiv:1705.07878.
    """
    rule = optax.chain(
        terngrad_mean(axis_name=axis_name, clip=clip, seed=seed, dense=dense),
        scale_by_grams(b1, b2, eps, eps_root, mu_dtype, kappa=1.0),  # which is Adam
    )
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)
