"""AdamW with moments of 8 bits: block-wise scales and the dynamic code book."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxopt_suite import core, kernels
from jaxopt_suite.optimizers import _common, _shards


class ScaleByAdam8bitState(NamedTuple):
    """State of ``scale_by_adam_8bit``: for an m-by-n matrix 2mn + 8 m ceil(n/B) bytes."""

    count: jax.Array  # type: ignore[assignment]  # int32 []: updates so far
    mu: optax.Updates  # uint8, shapes of params: codes; float32 where a leaf is kept so
    mu_scales: optax.Updates  # float32 [..., ceil(n / B)]; None where a leaf is kept in float32
    nu: optax.Updates  # as mu
    nu_scales: optax.Updates  # as mu_scales


def scale_by_adam_8bit(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    block: int = 256,
    min_size: int = 4096,
    impl: kernels.Impl = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's rule, whose moments are kept in 8 bits between the steps.

    With gradient $g_t$ and moments $\hat m, \hat v$ decoded from their codes,

    $$m_t = \beta_1 \hat m_{t-1} + (1-\beta_1) g_t, \quad
    v_t = \beta_2 \hat v_{t-1} + (1-\beta_2) g_t^2, \quad
    u_t = \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}.$$

    The step is taken with $m_t, v_t$ as they are; then each is encoded. B entries in a row along
    the last dimension are a block, whose scale is its largest magnitude, and a code says which of
    256 numbers in [-1, 1] (for v in [0, 1]) is nearest to the entry over the scale. These, the
    dynamic code book, are dense near 1 and lie over seven decades, signed down to 5.5e-7, unsigned
    to 3.25e-7; relative to an entry, the error is least where the moments are largest.

    **Where it departs from Adam.** A v below 1.6e-7 of the largest of its block becomes 0, and
    such a coordinate's next step sees no more than (1 - b2) g² under the root: it is up to
    $1/\sqrt{1-\beta_2}$ times too long, 32 for the default. The smaller the blocks, and the more
    alike the gradients in one, the rarer. A gradient that is not finite, or whose square is not,
    sets its coordinate's moments to 0 and its step too.

    Leaves of fewer than ``min_size`` entries, and those of which codes and scales would not be
    fewer bytes (rows of one entry), are kept in float32, with the same rule.

    Memory: 2mn + 8 m ceil(n/B) bytes for an m-by-n matrix, 2.03 an entry for long rows, where Adam
    in float32 has 8. Wire: nothing. On a mesh codes lie as the parameters do, and a scale belongs
    to a row: how parameters are split changes no code. Where parts of a row are not whole blocks,
    XLA moves what is missing of them; nothing is moved where every device has whole blocks.

    The authors train with layer norms behind embeddings, or keep the moments of embeddings in 32
    bits: ``optax.partition`` with ``optax.adamw`` for them does that.

    Departures from the official code (bitsandbytes-foundation/bitsandbytes): blocks do not run on
    from one row into the next, which is the same where B divides n; of two codes equally near the
    one nearer to zero is taken (theirs the lower; in CUDA one of the sign of m); an entry of a
    block of zeros has scale 0 (theirs 1); an infinite square is treated as an infinite gradient.
    ``docs/fidelity.md`` has the measurement.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, at least 0.
      block: B, at least 1; a multiple of 128 for the kernels, 128 or 256 on GPUs.
      min_size: entries from which on a leaf is kept in 8 bits, at least 0.
      impl: ``"auto"``, ``"xla"``, or by the kernels of ``kernels.adam8_update``: ``"pallas"`` for
        TPUs and NVIDIA GPUs, ``"interpret"`` on a CPU. On a mesh they need ``param_specs=`` in the
        update, which ``make_train_step`` gives, and take the leaves of which devices have whole
        blocks.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; updates keep their dtype, arithmetic is in
      float32.

    Raises:
      ValueError, TypeError: for an argument out of range; at ``init``, for a leaf that is not real
        floating point.

    References:
      Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", ICLR
      2022, arXiv:2110.02861.
    """
    _common.check_adam_arguments(b1=b1, b2=b2, eps=eps)
    core.check_int("min_size", min_size, low=0)
    kernels.check_adam8(block, impl)

    def init(params: optax.Params) -> ScaleByAdam8bitState:
        core.check_real_floating(params, "adam_8bit")

        def zeros(p: Any) -> tuple[Any, ...]:
            shape = jnp.shape(p)
            if in_8_bits(shape, block, min_size):
                return kernels.adam8_zeros(shape, block=block)
            plain = lambda: jnp.zeros(shape, core.accumulator_dtype(p))
            return plain(), None, plain(), None

        count = jnp.zeros((), jnp.int32)
        return ScaleByAdam8bitState(count, *core.map_unzip(zeros, 4, params))

    def update(
        updates: optax.Updates,
        state: ScaleByAdam8bitState,
        params: optax.Params | None = None,
        *,
        param_specs: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdam8bitState]:
        del params, extra_args  # the rule reads gradients only
        count = optax.safe_increment(state.count)
        corrections = _common.bias_correction(b1, count), _common.bias_correction(b2, count)
        numbers = kernels.adam8_numbers(b1, b2, eps, corrections)
        update_leaf = functools.partial(_adam_8bit, numbers=numbers, block=block, impl=impl)

        def leaf(g: jax.Array, mu: Any, mu_scales: Any, nu: Any, nu_scales: Any, spec: Any) -> Any:
            moments = kernels.Moments8(mu, mu_scales, nu, nu_scales)
            if mu_scales is None:
                step, mu, nu = _adam(g, mu, nu, b1, b2, eps, corrections)
                return step, mu, None, nu, None
            step, moments = update_leaf(g, moments, spec=spec)
            return step, *moments

        by_kernel = kernels.resolve("adam8_update", impl) != "xla"
        specs = _specs(updates, param_specs if by_kernel else None)
        updates, *moments = core.map_unzip(leaf, 5, updates, *state[1:], specs)
        return updates, ScaleByAdam8bitState(count, *moments)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def in_8_bits(shape: tuple[int, ...], block: int, min_size: int) -> bool:
    """Whether a leaf's moments are kept in 8 bits: it is large, and that saves memory."""
    size = math.prod(shape)
    if not shape or size == 0 or size < min_size:
        return False
    return 2 * size + 8 * scale_count(shape, block) < 8 * size


def scale_count(shape: tuple[int, ...], block: int) -> int:
    """Blocks of a leaf of one dimension or more."""
    return math.prod(shape[:-1]) * -(-shape[-1] // block)


def elements_8bit(m: int, n: int, *, block: int = 256, min_size: int = 4096, **_: Any) -> int:
    """Codes and scales, or float32 numbers, of an m-by-n matrix."""
    scales = scale_count((m, n), block) if in_8_bits((m, n), block, min_size) else 0
    return 2 * m * n + 2 * scales


def bytes_8bit(m: int, n: int, *, block: int = 256, min_size: int = 4096, **_: Any) -> int:
    """What they take."""
    if in_8_bits((m, n), block, min_size):
        return 2 * m * n + 8 * scale_count((m, n), block)
    return 8 * m * n


def _adam(
    g: jax.Array, mu: jax.Array, nu: jax.Array, b1: Any, b2: Any, eps: Any, corrections: Any
) -> tuple[jax.Array, ...]:
    """The rule on moments in float32."""
    wide = g.astype(nu.dtype)
    mu = _common.update_mean(mu, wide, b1)
    nu = _common.update_mean(nu, jnp.square(wide), b2)
    counts = jnp.isfinite(nu)
    mu, nu = jnp.where(counts, mu, 0), jnp.where(counts, nu, 0)
    c1, c2 = (c.astype(nu.dtype) for c in corrections)
    step = _common.divide_by_root(mu / c1, nu, c2, eps=eps, eps_root=0.0, eps_mode="corrected")
    return jnp.where(counts, step, 0).astype(g.dtype), mu, nu


def _adam_8bit(
    g: jax.Array,
    moments: kernels.Moments8,
    *,
    numbers: jax.Array,
    block: int,
    impl: kernels.Impl,
    spec: PartitionSpec | None,  # for the kernel: XLA splits its own programs
) -> tuple[jax.Array, kernels.Moments8]:
    """The rule on moments in 8 bits; the kernel on what each device has of them."""
    whole = functools.partial(kernels.adam8_update, block=block)
    axes = _shards.free_axes()
    if spec is None or not axes:
        return whole(g, moments, numbers, impl=impl)
    across = _shards.axes_of(PartitionSpec(*spec[g.ndim - 1 :]))
    parts = math.prod(axes.get(axis, 1) for axis in across)
    if parts > 1 and g.shape[-1] % (parts * block):  # a device has pieces of blocks
        return whole(g, moments, numbers, impl="xla")
    layouts: Any = (spec, kernels.Moments8(*[spec] * 4))  # type: ignore[arg-type]
    return _shards.run_on_shards(
        lambda own, numbers: whole(own[0], own[1], numbers, impl=impl),
        ((g, moments), numbers),
        (layouts, PartitionSpec()),
        like=0,
        axes=tuple(axes),
    )


def _specs(updates: optax.Updates, param_specs: Any) -> Any:
    """A PartitionSpec for each leaf, or None for each."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(updates)
    if param_specs is None:
        return treedef.unflatten([None] * len(leaves))
    return treedef.unflatten(_shards.aligned_specs([path for path, _ in leaves], param_specs))


def adamw_8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: _common.Mask = None,
    *,
    block: int = 256,
    min_size: int = 4096,
    impl: kernels.Impl = "auto",
) -> optax.GradientTransformationExtraArgs:
    """AdamW with moments of 8 bits: a quarter of its state.

    Args:
      learning_rate: step size, at least 0, or a schedule of the step count; AdamW's will do.
      b1: see ``scale_by_adam_8bit``, as all arguments not described here.
      b2: see ``scale_by_adam_8bit``.
      eps: see ``scale_by_adam_8bit``.
      weight_decay: decoupled, multiplied by the learning rate; 1e-4 as in optax (the official
        default is 1e-2).
      mask: tree of bools, or a function of the parameters returning one: which leaves decay.
      block: see ``scale_by_adam_8bit``.
      min_size: see ``scale_by_adam_8bit``.
      impl: see ``scale_by_adam_8bit``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_suite.optimizers import adamw_8bit
      >>> params = {"w": jnp.ones((64, 256)), "b": jnp.ones(256)}
      >>> rule = adamw_8bit(1e-3).init(params)[0]
      >>> rule.mu["w"].dtype, rule.mu_scales["w"].shape, rule.mu["b"].dtype
      (dtype('uint8'), (64, 1), dtype('float32'))

    References:
      Dettmers, Lewis, Shleifer, Zettlemoyer, "8-bit Optimizers via Block-wise Quantization", ICLR
      2022, arXiv:2110.02861.
    """
    rule = scale_by_adam_8bit(b1, b2, eps, block=block, min_size=min_size, impl=impl)
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)
