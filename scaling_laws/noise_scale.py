"""The gradient noise scale: how large a batch pays, measured beside the mean of the gradients."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.core.collectives import bound_axis_size

__all__ = ["NoiseEstimate", "NoiseScaleState", "noise_scale", "read_noise_scale", "two_batches"]


class NoiseScaleState(NamedTuple):
    """State of ``noise_scale``: 16 bytes, and that of the inner link; equal on all workers."""

    inner: optax.OptState  # of the link that takes the mean
    count: jax.Array  # type: ignore[assignment]  # int32 []: steps that are in the averages
    signal: jax.Array  # float32 []: running average of |G|^2, begun at zero
    noise: jax.Array  # float32 []: running average of tr(Sigma), begun at zero
    weight: jax.Array  # float32 []: what the averages of ones would be, 1 - decay^count


@dataclasses.dataclass(frozen=True)
class NoiseEstimate:
    """What the averages say; each estimate is unbiased, and negative where noise hides the signal.

    Attributes:
      scale: the noise scale tr(Sigma) / |G|^2 in the unit of ``batch_size``; NaN unless the status
        is ``"ok"``. Not unbiased: a ratio of two that are.
      signal: estimate of |G|^2.
      noise: estimate of tr(Sigma), of one example.
      count: steps in the averages.
      status: ``"ok"``; ``"no_estimate"``: no step yet, or only one worker; ``"negative_signal"``:
        |G|^2 is not above 0, the noise is too large for so few steps; ``"negative_noise"``:
        tr(Sigma) is not above 0.
    """

    scale: float
    signal: float
    noise: float
    count: int
    status: str


def two_batches(small_norm: Any, large_norm: Any, *, small: float, large: float) -> tuple[Any, Any]:
    r"""Unbiased estimates of $|G|^2$ and $\mathrm{tr}\,\Sigma$ from gradients of two batch sizes.

    A gradient of $b$ examples has $\mathrm E|g_b|^2 = |G|^2 + \mathrm{tr}\,\Sigma / b$, so that

    $$|G|^2 \approx \frac{B |g_B|^2 - b |g_b|^2}{B - b}, \qquad
    \mathrm{tr}\,\Sigma \approx \frac{|g_b|^2 - |g_B|^2}{1/b - 1/B}.$$

    Args:
      small_norm: $|g_b|^2$, the mean over all small batches that make up the large one.
      large_norm: $|g_B|^2$, of their mean.
      small: $b$, in examples.
      large: $B > b$.

    Returns:
      The estimates of $|G|^2$ and of $\mathrm{tr}\,\Sigma$.

    Raises:
      ValueError: if not $0 < b < B$.
    """
    if not 0 < small < large:
        raise ValueError(f"batches must be 0 < small < large, got small={small}, large={large}")
    signal = (large * large_norm - small * small_norm) / (large - small)
    noise = (small_norm - large_norm) / (1 / small - 1 / large)
    return signal, noise


def noise_scale(
    inner: optax.GradientTransformation | None = None,
    *,
    axis_name: str,
    batch_size: int,
    decay: jax.typing.ArrayLike = 0.99,
) -> optax.GradientTransformationExtraArgs:
    r"""Measures the gradient noise scale around the link that takes the workers' mean.

    Written for one worker of $n$: the updates are those of ``inner``, unchanged. Its input is this
    worker's gradient $g_w$ of $b$ examples, its output the mean $\bar g$ of $B = nb$. With
    $\frac1n \sum_w |g_w|^2$ and $|\bar g|^2$, ``two_batches`` estimates $|G|^2$ and
    $\mathrm{tr}\,\Sigma$, the squared norm of the true gradient and the variance of one example's;
    exponential averages of the two are kept apart, and ``read_noise_scale`` divides them:

    $$B_\mathrm{simple} = \mathrm{tr}\,\Sigma / |G|^2.$$

    Put it where the gradients are still the workers' own and before any clipping, which would
    change their norms: ``optax.chain(noise_scale(axis_name="worker", batch_size=8),
    optax.clip_by_global_norm(1.0), optax.adamw(rate))``.

    **What it sends**: one float32 in an all-reduce, beside what ``inner`` sends. On a mesh with
    more axes norms are of whole tensors.

    **What is measured.** A mean that is not exact has another norm: around ``compressed_mean``
    neither estimate is unbiased, as what is applied holds errors and what earlier steps left out.
    An optimizer that rescales gradients sees another noise scale than this one. A step in which a
    norm is not finite is left out of the averages. One worker has nothing to compare: no step is
    counted.

    On one device, run micro-batches as a simulated fleet: ``parallel.run_workers`` without a mesh.

    Memory: 16 bytes, and that of ``inner``.

    Args:
      inner: the link that gives the mean, equal on all workers. None: an uncompressed mean.
      axis_name: the workers' axis.
      batch_size: $b$, examples (sequences, tokens: the unit of the answer) in one worker's
        gradient.
      decay: of the averages, in [0, 1); they are corrected for having begun at zero.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError, TypeError: for an argument out of range; at ``update``, if ``axis_name`` is not
        bound, or ``inner`` gives on a mesh what may differ between workers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_suite import parallel
      >>> from jaxopt_suite.scaling_laws import noise_scale, read_noise_scale
      >>> tx = noise_scale(axis_name="worker", batch_size=1)
      >>> def worker(grads):
      ...     step = lambda state, g: (tx.update(g, state)[1], None)
      ...     return jax.lax.scan(step, tx.init(grads[0]), grads)[0]
      >>> grads = 1.0 + jax.random.normal(jax.random.key(0), (8, 500, 1000))  # |G|² = trΣ = 1000
      >>> states = parallel.run_workers(worker, axis_name="worker")(grads)
      >>> round(read_noise_scale(states).scale, 1)
      1.0

    References:
      McCandlish, Kaplan, Amodei et al., "An Empirical Model of Large-Batch Training", 2018,
      arXiv:1812.06162, appendix A.
    """
    core.check_int("batch_size", batch_size)
    core.check_number("decay", decay, low=0.0, high=1.0, high_open=True)
    mean = optax.with_extra_args_support(_mean(axis_name) if inner is None else inner)

    def init(params: optax.Params) -> NoiseScaleState:
        zero = lambda: jnp.zeros((), jnp.float32)
        return NoiseScaleState(
            inner=mean.init(params),
            count=jnp.zeros((), jnp.int32),
            signal=zero(),
            noise=zero(),
            weight=zero(),
        )

    def update(
        updates: optax.Updates,
        state: NoiseScaleState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NoiseScaleState]:
        workers = bound_axis_size(axis_name, "noise_scale")
        means, inner_state = mean.update(updates, state.inner, params, **extra_args)
        state = state._replace(inner=inner_state)
        if workers == 1:
            return means, state
        norms = (
            jax.lax.pmean(core.vary(_squared_norm(updates), axis_name), axis_name),
            _squared_norm(means),
        )
        _check_equal(norms[1], axis_name)
        estimates = two_batches(*norms, small=batch_size, large=workers * batch_size)
        return means, _averaged(state, *estimates, decay)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def _averaged(
    state: NoiseScaleState, signal: jax.Array, noise: jax.Array, decay: jax.typing.ArrayLike
) -> NoiseScaleState:
    """The state with one more step in its averages, if the step is finite."""
    finite = jnp.isfinite(signal) & jnp.isfinite(noise)
    decay = jnp.asarray(decay, jnp.float32)
    blend = lambda old, new: jnp.where(finite, decay * old + (1 - decay) * new, old)
    return state._replace(
        count=jnp.where(finite, optax.safe_increment(state.count), state.count),
        signal=blend(state.signal, signal),
        noise=blend(state.noise, noise),
        weight=blend(state.weight, 1.0),
    )


def _mean(axis_name: str) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: jax.lax.pmean(updates, axis_name))


def _squared_norm(tree: optax.Updates) -> jax.Array:
    """Of all leaves together, in float32: [] ."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return sum(squares, start=jnp.zeros((), jnp.float32))


def _check_equal(norm: jax.Array, axis_name: str) -> None:
    """Raises ``ValueError`` where JAX's types do not know the mean to be equal on all workers."""
    if axis_name in core.varying_axes(norm):
        raise ValueError(
            "inner must give the mean, equal on all workers; what it gives may differ along "
            f"axis_name={axis_name!r}"
        )


def read_noise_scale(state: Any) -> NoiseEstimate:
    """The estimate that a state holds, corrected for averages that began at zero.

    Args:
      state: a ``NoiseScaleState``, or any tree with one in it, such as the state of a chain; as
        ``init`` and ``update`` give it, or of all workers, who have the same.

    Raises:
      ValueError: if there is none in the tree, or more than one.
    """
    is_ours = lambda x: isinstance(x, NoiseScaleState)
    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if len(found) != 1:
        raise ValueError(f"state must hold one NoiseScaleState, got {len(found)}")
    first = lambda x: float(jax.device_get(x).ravel()[0])
    count, weight = int(first(found[0].count)), first(found[0].weight)
    if not count:
        return NoiseEstimate(math.nan, math.nan, math.nan, 0, "no_estimate")
    signal, noise = first(found[0].signal) / weight, first(found[0].noise) / weight
    status = _status(signal, noise)
    scale = noise / signal if status == "ok" else math.nan
    return NoiseEstimate(scale, signal, noise, count, status)


def _status(signal: float, noise: float) -> str:
    if signal <= 0:
        return "negative_signal"
    return "ok" if noise > 0 else "negative_noise"
