"""DeMo: each worker sends the largest cosine coefficients of its own momentum, and no gradient."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxopt_suite import core, kernels
from jaxopt_suite.core.collectives import any_worker, bound_axis_size
from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers._shards import layout_of, run_on_shards
from jaxopt_suite.optimizers.compression import pieces
from jaxopt_suite.optimizers.compression.coefficients import Coefficients, Mean
from jaxopt_suite.optimizers.compression.dct import dct_top_k
from jaxopt_suite.optimizers.compression.exchange import Exchanged, mean_of_buffer
from jaxopt_suite.optimizers.compression.mean import DenseRule, default_dense
from jaxopt_suite.optimizers.compression.sparse import ValueName

Phi = Literal["sign", "identity"]


class ScaleByDemoState(NamedTuple):
    """State of ``scale_by_demo``: for an m-by-n matrix 4mn bytes, and one counter."""

    count: jax.Array  # type: ignore[assignment]  # int32 []: updates so far
    momentum: optax.Updates  # float32, shapes of params: what this worker has not sent yet


def scale_by_demo(
    decay: jax.typing.ArrayLike = 0.999,
    *,
    axis_name: str,
    k: int = 32,
    side: int = 64,
    pad: bool = True,
    alpha: jax.typing.ArrayLike = 1.0,
    values: ValueName = "float32",
    mean: Mean = "senders",
    phi: Phi = "sign",
    gradient_weight: optax.ScalarOrSchedule | None = None,
    dense: DenseRule | None = None,
    impl: kernels.Impl = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Turns workers' gradients into one update, made of what stands out in their momenta.

    Written for one worker. With its gradient $g_w$, momentum $M_w$ (float32, of the parameter's
    shape, starts at zero) and $C$ the k largest coefficients of the orthonormal DCT-II of every
    chunk of side by side entries (``compression.dct``):

    $$M_w \leftarrow \beta M_w + (1-\beta) g_w, \quad q_w = C(M_w), \quad
    M_w \leftarrow M_w - \alpha q_w, \quad u = \phi(\mathrm{mean}_w\, q_w).$$

    What is sent leaves the momentum, which is therefore its own error memory. The mean is taken of
    coefficients, each over the workers that sent it (``mean="senders"``): one that a single worker
    found large is not divided by their number. It is then transformed back once, and $\phi$ is the
    sign or the identity. For Muon's orthogonalisation take ``phi="identity"`` and let
    ``optax.contrib.scale_by_muon`` follow, without momentum of its own (``beta=0``,
    ``nesterov=False``). A chunk of which nobody sent anything does not move.

    **Shapes.** The last two axes of a leaf are cut into chunks, axes before them are a stack of
    matrices. Vectors are cut into chunks of one row, and a scalar is a vector of one entry; both
    compress badly, so by default these and other small leaves are sent dense.

    **Wire.** One all-gather a step for all compressed leaves, of k values and k indices a chunk,
    the indices in the narrowest of 8, 12, 16 and 32 bits: 176 bytes for the 4096 entries of a chunk
    with the defaults, the sum filled up to a multiple of 128, and (n - 1) times that from each of n
    workers. Dense leaves share one all-reduce of float32. Messages are decoded and added up in the
    order of the workers, so that all of them hold the same bits. If ``update`` is given
    ``param_specs=`` (``make_train_step`` does so), each device cuts what it holds into chunks and
    talks along ``axis_name`` only: chunks are those of the whole leaf where shards are multiples of
    ``side``, and there is one collective of each kind for every set of axes that leaves are split
    over.

    **Non-finite numbers.** A NaN or infinity in one worker's gradient is in its message (it spoils
    its chunk, and what is spoilt counts as large). All workers then give NaN in every leaf and keep
    their momenta as they were, at no extra collective.

    Memory: 4mn bytes for an m-by-n matrix on each worker; momenta differ between workers, so that a
    checkpoint holds all of them.

    Departures from the released code (bloc97/DeMo): it adds $\gamma g_w$, with the learning rate
    $\gamma$, in the place of $(1-\beta) g_w$ (``gradient_weight``); the sides of its chunks are
    divisors of the axes (``pad=False``); it compresses vectors too (a ``dense`` that is never true)
    and refuses other axes than one or two; it keeps the momentum in the parameter's dtype, and
    sends indices as int64 in two all-gathers a leaf. Where a chunk has fewer than k coefficients
    that are not zero it sends zeros at arbitrary indices and counts them in the mean; here a zero
    is not a value sent. With its settings the two agree to 2e-6 in float32 over 25 steps, with 1
    and with 4 workers (``python -m benchmarks.parity demo``).

    Args:
      decay: β, in [0, 1).
      axis_name: the workers' axis, of ``parallel.run_workers`` or ``make_train_step``.
      k: coefficients sent of each chunk, all if it has fewer.
      side: longest side of a chunk.
      pad: fill axes up with zeros to a multiple of ``side``; ``False`` takes the largest divisor of
        the axis up to ``side``, which is 1 for a long prime.
      alpha: the share of what was sent that leaves the momentum, in (0, 1]. 1 in the first version
        of the paper and in the released code; the second version finds 0.2 best.
      values: what coefficients travel in, ``"float32"`` or ``"bfloat16"``; the momentum loses what
        was sent as it was rounded.
      mean: over the ``"senders"`` of a coefficient, or over all ``"workers"``.
      phi: ``"sign"`` or ``"identity"``.
      gradient_weight: what gradients are multiplied by in the momentum, a number of at least 0 or a
        schedule of the step count. ``None`` is 1 - β.
      dense: ``(path, leaf) -> bool``, the leaves that are sent whole, as if k were the size of the
        chunk. ``None``: those of fewer than two axes or 1024 elements, and those whose payload is
        not smaller than half of their bytes in float32.
      impl: what finds the coefficients: ``"auto"``, ``"xla"``, or the kernel ``dct_top_k`` by
        ``"pallas"``, ``"interpret"`` on a CPU. It takes up to 64 coefficients of chunks of 64 by
        64, and others for which ``kernels.dct_top_k_takes``; other leaves are XLA's.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; updates keep their dtype.

    Raises:
      ValueError, TypeError: for an argument out of range; at ``init``, for a leaf that is not real
        floating point; at ``update``, if ``axis_name`` is not bound, or specs for a leaf are
        missing.

    References:
      Peng, Quesnelle, Kingma, "DeMo: Decoupled Momentum Optimization", 2024, arXiv:2411.19870; its
      second version (with Chen, Su, Liu), 2026.
    """
    core.check_number("decay", decay, low=0.0, high=1.0, high_open=True)
    core.check_number("alpha", alpha, low=0.0, high=1.0, low_open=True)
    core.check_choice("mean", mean, ("senders", "workers"))
    core.check_choice("phi", phi, ("sign", "identity"))
    if gradient_weight is not None and not callable(gradient_weight):
        core.check_number("gradient_weight", gradient_weight, low=0.0)
    if dense is None:
        dense = _default_dense(k, side=side, pad=pad, values=values, impl=impl)
    else:
        dct_top_k(k, side=side, pad=pad, values=values, impl=impl)  # checks them
    coefficients = Coefficients(axis_name, k, side, pad, values, mean, impl)
    link = _Link(decay, alpha, phi, gradient_weight, dense, coefficients)
    return optax.GradientTransformationExtraArgs(link.init, link.update)  # type: ignore[arg-type]


def _default_dense(k: int, **settings: Any) -> DenseRule:
    of_matrices = default_dense(dct_top_k(k, **settings))
    return lambda path, leaf: jnp.ndim(leaf) < 2 or of_matrices(path, leaf)


class _Leaf(NamedTuple):
    """One leaf of the updates and its momentum; or the layouts of these."""

    x: Any
    momentum: Any


@dataclasses.dataclass(frozen=True)
class _Link:
    """What ``scale_by_demo`` was called with, checked."""

    decay: jax.typing.ArrayLike
    alpha: jax.typing.ArrayLike
    phi: Phi
    gradient_weight: optax.ScalarOrSchedule | None
    dense: DenseRule
    coefficients: Coefficients

    @property
    def axis_name(self) -> str:
        return self.coefficients.axis_name

    def init(self, params: optax.Params) -> ScaleByDemoState:
        core.check_real_floating(params, "demo")
        zeros = jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)
        return ScaleByDemoState(jnp.zeros((), jnp.int32), core.vary(zeros, self.axis_name))

    def update(
        self,
        updates: optax.Updates,
        state: ScaleByDemoState,
        params: optax.Params | None = None,
        *,
        param_specs: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByDemoState]:
        del params, extra_args  # the rule reads gradients only
        bound_axis_size(self.axis_name, "demo")
        with_paths, structure = jax.tree_util.tree_flatten_with_path(updates)
        paths, gradients = [path for path, _ in with_paths], [x for _, x in with_paths]
        momenta = structure.flatten_up_to(state.momentum)
        leaves = [_Leaf(*pair) for pair in zip(gradients, momenta, strict=True)]

        axes, specs = layout_of(paths, param_specs, self.axis_name)
        layouts = [_Leaf(spec, spec) for spec in specs]
        whole = [self.dense(path, x) or x.size == 0 for path, x in with_paths]
        leaves = run_on_shards(
            functools.partial(self._step, whole, axes),
            (leaves, self._factors(state.count)),
            (layouts, PartitionSpec()),
            like=0,
            axes=axes,
        )
        result, momentum = (structure.unflatten([leaf[i] for leaf in leaves]) for i in (0, 1))
        return result, ScaleByDemoState(optax.safe_increment(state.count), momentum)

    def _factors(self, count: jax.Array) -> tuple[jax.Array, ...]:
        """β, the weight of the gradient, and α."""
        weight = self.gradient_weight
        if weight is None:
            weight = 1.0 - self.decay
        elif callable(weight):
            weight = weight(count)
        return tuple(jnp.asarray(x, jnp.float32) for x in (self.decay, weight, self.alpha))

    def _step(
        self,
        whole: Sequence[bool],
        axes: tuple[str, ...],
        leaves: Sequence[_Leaf],
        factors: tuple[jax.Array, ...],
    ) -> list[_Leaf]:
        """The update of what one device holds of every leaf."""
        decay, weight, alpha = factors
        messages = [
            core.vary(decay * leaf.momentum + weight * leaf.x.astype(jnp.float32), self.axis_name)
            for leaf in leaves
        ]
        means, sent = self._exchange(messages, whole)
        # Means are equal on all workers, and so is the verdict; other axes have to be asked.
        bad = jnp.asarray(False)
        for x in means:
            bad |= ~jnp.all(jnp.isfinite(x))
        bad = any_worker(bad, axes) if axes else bad
        result = []
        for leaf, message, mean, own in zip(leaves, messages, means, sent, strict=True):
            direction = jnp.sign(mean) if self.phi == "sign" else mean
            update = jnp.where(bad, jnp.nan, direction).astype(leaf.x.dtype)
            result.append(_Leaf(update, jnp.where(bad, leaf.momentum, message - alpha * own)))
        return result

    def _exchange(self, messages: Sequence[jax.Array], whole: Sequence[bool]) -> Exchanged:
        nothing: list[Any] = [None] * len(messages)
        result = Exchanged(nothing, list(messages))
        dense = [i for i, flag in enumerate(whole) if flag]
        averaged = mean_of_buffer([messages[i] for i in dense], self.axis_name)
        for i, x in zip(dense, averaged, strict=True):
            result.mean[i] = x
        exchange = lambda members: list(zip(*self.coefficients.exchange(members), strict=True))
        coded = [i for i, flag in enumerate(whole) if not flag]
        done = pieces.by_axes(exchange, [messages[i] for i in coded], self.axis_name)
        for i, (mean, own) in zip(coded, done, strict=True):
            result.mean[i], result.sent[i] = mean, own
        return result


def demo(
    learning_rate: optax.ScalarOrSchedule,
    decay: jax.typing.ArrayLike = 0.999,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _common.Mask = None,
    *,
    axis_name: str,
    k: int = 32,
    side: int = 64,
    pad: bool = True,
    alpha: jax.typing.ArrayLike = 1.0,
    values: ValueName = "float32",
    mean: Mean = "senders",
    phi: Phi = "sign",
    rate_in_momentum: bool = False,
    dense: DenseRule | None = None,
    impl: kernels.Impl = "auto",
) -> optax.GradientTransformationExtraArgs:
    """DeMo with decoupled weight decay: ``scale_by_demo``, decay, learning rate.

    The released code decays the parameters before its step, which is the same: its step does not
    look at them.

    Args:
      learning_rate: step size, at least 0, or a schedule of the step count.
      decay: see ``scale_by_demo``, as all arguments not described here.
      weight_decay: decoupled, multiplied by the learning rate; 0 as in the paper.
      mask: tree of bools, or a function of the parameters returning one: which leaves decay.
      axis_name: see ``scale_by_demo``.
      k: see ``scale_by_demo``.
      side: see ``scale_by_demo``.
      pad: see ``scale_by_demo``.
      alpha: see ``scale_by_demo``.
      values: see ``scale_by_demo``.
      mean: see ``scale_by_demo``.
      phi: see ``scale_by_demo``.
      rate_in_momentum: weigh gradients with the learning rate instead of 1 - ``decay``, as the
        released code does. A rate that falls then makes older gradients count more.
      dense: see ``scale_by_demo``.
      impl: see ``scale_by_demo``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_suite import parallel
      >>> from jaxopt_suite.optimizers import demo
      >>> rate = optax.linear_schedule(0.1, 0.0, 200)
      >>> tx = demo(rate, 0.9, axis_name="worker", side=8, k=8)
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
      Peng, Quesnelle, Kingma, "DeMo: Decoupled Momentum Optimization", 2024, arXiv:2411.19870.
    """
    core.check_learning_rate(learning_rate)
    rule = scale_by_demo(
        decay,
        axis_name=axis_name,
        k=k,
        side=side,
        pad=pad,
        alpha=alpha,
        values=values,
        mean=mean,
        phi=phi,
        gradient_weight=learning_rate if rate_in_momentum else None,
        dense=dense,
        impl=impl,
    )
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)
