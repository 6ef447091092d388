"""PowerSGD's exchange: two all-reduces of factors, the second made with the mean of the first."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxopt_suite import core
from jaxopt_suite.core.collectives import gather_equal
from jaxopt_suite.optimizers._shards import axes_of
from jaxopt_suite.optimizers.compression import low_rank
from jaxopt_suite.optimizers.compression.compressor import Compressor, Shape
from jaxopt_suite.optimizers.compression.exchange import Exchanged, mean_of_buffer


def exchange_factors(
    messages: Sequence[jax.Array],
    factors: Sequence[Any],
    specs: Sequence[PartitionSpec],
    axis_name: str,
) -> tuple[Exchanged, list[Any]]:
    r"""Means of matrices over workers, cut to low rank by one power step on their mean.

    With worker $w$'s message $X_w$ (m by c) and the last step's $Q$ (c by r):

    $$P = \tfrac1n \textstyle\sum_w X_w Q, \quad \hat P = \mathrm{orth}(P), \quad
    Q_w = X_w^\top \hat P, \quad \bar Q = \tfrac1n \sum_w Q_w;$$

    the mean is $\hat P \bar Q^\top$, and a worker's own message is taken for $\hat P Q_w^\top$:
    what it remembers of its error has nothing in it of how it differs from other workers, which
    would grow without bound. A column of $\bar Q$ that is zero keeps its old value; it would stay
    zero for ever.

    Each round is one all-reduce for all messages; those without a factor go with the first, as they
    are. On a mesh, a device holds a block of $X_w$ and the parts of the factors that belong to it,
    and only these cross between workers. What makes them whole (the sums over blocks of columns in
    $X_w Q$ and of rows in $X_w^\top \hat P$, the rows of $P$ to orthogonalise) crosses between the
    devices of one worker.

    Args:
      messages: float32, a device's blocks; m are all axes but the last.
      factors: for each ``(Q,)``, its block, transposed, float32 ``[r, c]`` and equal on all
        workers; or ``(MaskedNode(),)``.
      specs: of the messages over the axes of a surrounding ``shard_map``.
      axis_name: the workers' axis.

    Returns:
      What was exchanged, and the factors for the next step, in the form of ``factors``.
    """
    matrices = [i for i, factor in enumerate(factors) if jax.tree.leaves(factor)]
    rows = {i: _row_axes(specs[i], messages[i].ndim) for i in matrices}
    columns = {i: axes_of(factor_spec(specs[i], messages[i].ndim)) for i in matrices}

    first = list(messages)
    for i in matrices:
        first[i] = _sum(low_rank.factor(messages[i], factors[i][0].T), columns[i])
    mean = mean_of_buffer(first, axis_name)
    left = {i: _orthogonal(mean[i], rows[i]) for i in matrices}
    own = {i: _sum(low_rank.cofactor(messages[i], left[i]), rows[i]) for i in matrices}
    right = dict(zip(matrices, mean_of_buffer(list(own.values()), axis_name), strict=True))

    sent, kept = list(messages), list(factors)
    for i in matrices:
        shape = messages[i].shape
        mean[i] = low_rank.rebuild(left[i], right[i], shape)
        sent[i] = low_rank.rebuild(left[i], own[i], shape)
        whole = functools.partial(_sum, axis_names=columns[i])
        kept[i] = (low_rank.revive(right[i], factors[i][0].T, total=whole).T,)
    return Exchanged(mean, sent), kept


def factor_shape(compressor: Compressor, shape: Shape) -> tuple[int, int] | None:
    """Shape ``[r, c]`` of the factor kept for a leaf; None where factors would save nothing."""
    rows, columns = math.prod(shape[:-1]), math.prod(shape[-1:])
    rank, rest = divmod(compressor.nbytes(shape), 4 * (rows + columns))
    saves = len(shape) > 1 and rest == 0 and rank * (rows + columns) < rows * columns
    return (rank, columns) if saves else None


def factor_spec(spec: PartitionSpec, rank: int) -> PartitionSpec:
    """The layout of the factor of a leaf with ``rank`` axes: split as the last of them."""
    return PartitionSpec(None, *tuple(spec)[rank - 1 :])


def _row_axes(spec: PartitionSpec, rank: int) -> tuple[str, ...]:
    return axes_of(PartitionSpec(*tuple(spec)[: rank - 1]))


def _sum(x: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(core.vary(x, axis_names), axis_names) if axis_names else x


def _orthogonal(p: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
    """An orthonormal basis of the span of the columns, whose rows lie over these axes."""
    if not axis_names:
        return low_rank.orthogonalise(p)
    whole = low_rank.orthogonalise(gather_equal(p, axis_names, tiled=True))
    return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axis_names) * len(p), len(p))
