"""Subset-norm: one adaptive step size for each subset of coordinates."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers import _common

Accumulator = Literal["adam", "rmsprop", "adagrad"]
ACCUMULATORS = ("adam", "rmsprop", "adagrad")
Subset = str | int
_DEFAULT_B2 = 0.999


class ScaleBySubsetNormState(NamedTuple):
    """State of ``scale_by_subset_norm``: one number a subset, and the numerator's own state."""

    count: jax.Array  # type: ignore[assignment]  # int32 []: updates so far
    nu: (
        optax.Updates
    )  # float32: [..., m, 1] or [..., 1, n], or [subsets, 1]; shape of p if no matrix
    momentum: optax.OptState  # state of the transformation that makes the numerator


def scale_by_subset_norm(
    b2: jax.typing.ArrayLike | None = None,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    accumulator: Accumulator = "adam",
    subset: Subset = "heuristic",
    momentum: optax.GradientTransformation | None = None,
    matrix_mask: _common.MatrixMask = None,
    eps_mode: _common.EpsMode = "corrected",
) -> optax.GradientTransformationExtraArgs:
    r"""Divides updates by the root of an accumulated *sum* of squares, shared over each subset.

    The $d = mn$ coordinates of a matrix are split into subsets $\Psi_1, \dots, \Psi_c$. With
    gradient $g_t$ and numerator $N_t$ (the gradient, or what ``momentum`` makes of it):

    $$s_{t,i} = \sum_{j \in \Psi_i} g_{t,j}^2, \qquad
    u_{t,j} = N_{t,j} / (\sqrt{\hat v_{t,i}} + \epsilon) \quad (j \in \Psi_i),$$

    where $v$ (float32, ``[c]``) accumulates by ``accumulator``: ``"adam"``
    $v_t = \beta_2 v_{t-1} + (1-\beta_2) s_t$, $\hat v_t = v_t / (1-\beta_2^t)$; ``"rmsprop"`` the
    same with $\hat v_t = v_t$; ``"adagrad"`` $\hat v_t = v_t = v_{t-1} + s_t$.

    Because $s$ is a sum and not a mean, steps are smaller than Adam's by about the root of the
    subset size, and learning rates about ten times Adam's are usual.

    Subsets (``subset``):

    - ``"heuristic"``: the larger dimension keeps its own step sizes: $v$ is ``[m, 1]`` if m > n,
      else ``[1, n]`` (a square matrix keeps its last axis, the output axis of a Flax kernel; the
      official code keeps the first, which is the output axis in PyTorch). Leading axes are a stack
      of matrices.
    - an int k > 0: the leaf, flattened row-major, in runs of k; the last run may be shorter. (The
      official code takes the largest divisor of d up to k instead, which is 1, that is Adam, for a
      prime d.)
    - an int -q < 0: runs of k = floor(sqrt(d) / q). ``"sqrt"`` is -2, the official code's default.

    Leaves that are not matrices keep a step size for each coordinate.

    Memory, elements for an m-by-n matrix, b = max(m, n): b for the heuristic, ceil(mn / k) for
    runs of k, plus the numerator's state. Wire: nothing; if a leaf is sharded along a summed axis,
    XLA adds an all-reduce of the sums. The heuristic keeps every axis and shards well, runs do not.

    Args:
      b2: decay of the accumulator, in [0, 1); ``None`` is 0.999. Refused for ``"adagrad"``.
      eps: added to the root, at least 0.
      accumulator: ``"adam"``, ``"rmsprop"`` or ``"adagrad"``.
      subset: ``"heuristic"``, ``"sqrt"``, or an int that is not 0.
      momentum: makes the numerator from the gradient, for example ``optax.ema(0.9)`` (Adam's) or
        ``scale_by_subspace_momentum(...)``; ``None`` uses the gradient itself. It is given float32.
      matrix_mask: function of the parameters returning a tree of bools: which leaves are (stacks
        of) matrices. ``None``: all of two or more axes.
      eps_mode: for ``"adam"``, whether ``eps`` is added to the bias-corrected root
        (``"corrected"``) or to the root before correction (``"uncorrected"``, the official code).

    Returns:
      An ``optax.GradientTransformationExtraArgs``; updates keep their dtype.

    Raises:
      ValueError, TypeError: for an argument out of range, or one that the accumulator has no use
        for; at ``init``, for a leaf that is not real floating point or a mask that does not fit.

    References:
      Nguyen, Nguyen, "Lean and Mean Adaptive Optimization via Subset-Norm and Subspace-Momentum
      with Convergence Guarantees", ICML 2025, arXiv:2411.07120. Official code: timmytonga/sn-sm.
    """
    _check_arguments(b2, eps, accumulator, subset, eps_mode)
    decay = _DEFAULT_B2 if b2 is None else b2
    numerator = optax.with_extra_args_support(optax.identity() if momentum is None else momentum)

    def init(params: optax.Params) -> ScaleBySubsetNormState:
        core.check_real_floating(params, "subset_norm")
        leaves, treedef = jax.tree.flatten(params)
        flags = _common.matrix_flags(params, matrix_mask, "subset_norm")
        nu = [
            jnp.zeros(nu_shape(jnp.shape(p), subset if matrix else None), core.accumulator_dtype(p))
            for p, matrix in zip(leaves, flags, strict=True)
        ]
        return ScaleBySubsetNormState(
            count=jnp.zeros((), jnp.int32),
            nu=treedef.unflatten(nu),
            momentum=numerator.init(params),
        )

    def accumulate(nu: jax.Array, sums: jax.Array) -> jax.Array:
        return nu + sums if accumulator == "adagrad" else _common.update_mean(nu, sums, decay)

    def update(
        updates: optax.Updates,
        state: ScaleBySubsetNormState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySubsetNormState]:
        count = optax.safe_increment(state.count)
        corrected = accumulator == "adam"
        correction = _common.bias_correction(decay, count) if corrected else jnp.ones(())
        wide = jax.tree.map(lambda g: g.astype(core.accumulator_dtype(g)), updates)
        numerators, momentum_state = numerator.update(wide, state.momentum, params, **extra_args)
        flags = _common.matrix_flags(updates, matrix_mask, "subset_norm")

        def leaf(g: jax.Array, n: jax.Array, nu: jax.Array, matrix: bool) -> tuple[Any, Any]:
            kind = subset if matrix else None
            g32 = g.astype(nu.dtype)
            nu = accumulate(
                nu, jnp.sum(jnp.square(_grouped(g32, kind)), _axis(g.shape, kind), keepdims=True)
            )
            step = _common.divide_by_root(
                _grouped(n, kind), nu, correction, eps=eps, eps_root=0.0, eps_mode=eps_mode
            )
            return _ungrouped(step, g.shape, kind).astype(g.dtype), nu

        flag_tree = jax.tree.unflatten(jax.tree.structure(updates), flags)
        steps, nu = core.map_unzip(leaf, 2, updates, numerators, state.nu, flag_tree)
        return steps, ScaleBySubsetNormState(count, nu, momentum_state)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def _check_arguments(b2: Any, eps: Any, accumulator: str, subset: Subset, eps_mode: str) -> None:
    core.check_choice("accumulator", accumulator, ACCUMULATORS)
    _common.check_adam_arguments(b2=b2, eps=eps, eps_mode=eps_mode)
    if accumulator == "adagrad" and b2 is not None:
        raise ValueError(f"accumulator='adagrad' sums without decay and takes no b2, got b2={b2!r}")
    if accumulator != "adam" and eps_mode != "corrected":
        raise ValueError(
            f"eps_mode={eps_mode!r} is about bias correction, "
            f"which accumulator={accumulator!r} does not have"
        )
    if isinstance(subset, str):
        core.check_choice("subset", subset, ("heuristic", "sqrt"))
    elif subset == 0:
        raise ValueError("subset must be 'heuristic', 'sqrt' or an int that is not 0, got 0")
    else:
        core.check_int("subset", subset, low=-(2**31))


def _run_length(shape: tuple[int, ...], subset: Subset) -> int:
    """The length k of a subset of a leaf of ``shape``, when subsets are runs of the flat leaf."""
    size = math.prod(shape)
    divisor = 2 if subset == "sqrt" else -int(subset)
    k = math.isqrt(size // divisor**2) if divisor > 0 else int(subset)
    return max(1, min(k, size))


# How a leaf's coordinates lie when they are summed. `kind` is the `subset` argument for a matrix
# and None for any other leaf, whose subsets are its single coordinates.


def _axis(shape: tuple[int, ...], kind: Subset | None) -> tuple[int, ...]:
    """The axes that are summed over, in the layout of ``_grouped``."""
    if kind is None:
        return ()
    if kind == "heuristic":
        return (-1,) if shape[-2] > shape[-1] else (-2,)
    return (-1,)


def nu_shape(shape: tuple[int, ...], kind: Subset | None) -> tuple[int, ...]:
    """Shape of the accumulator of a leaf: ``kind`` is ``subset`` for a matrix, else ``None``."""
    if kind is None:
        return shape
    if kind == "heuristic":
        summed = len(shape) + _axis(shape, kind)[0]
        return (*shape[:summed], 1, *shape[summed + 1 :])
    return (-(-math.prod(shape) // _run_length(shape, kind)), 1)


def _grouped(x: jax.Array, kind: Subset | None) -> jax.Array:
    """The leaf as it is, or ``[subsets, k]`` padded with zeros, which no sum notices."""
    if kind is None or kind == "heuristic":
        return x
    k = _run_length(x.shape, kind)
    return jnp.pad(x.ravel(), (0, -x.size % k)).reshape(-1, k)


def _ungrouped(x: jax.Array, shape: tuple[int, ...], kind: Subset | None) -> jax.Array:
    if kind is None or kind == "heuristic":
        return x
    return x.ravel()[: math.prod(shape)].reshape(shape)


def adam_sn(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _common.Mask = None,
    *,
    subset: Subset = "heuristic",
    matrix_mask: _common.MatrixMask = None,
    eps_mode: _common.EpsMode = "corrected",
) -> optax.GradientTransformationExtraArgs:
    """Adam with subset-norm step sizes: mn + b elements of state for an m-by-n matrix.

    Numerator: Adam's bias-corrected first moment. The official code applies weight decay after the
    step, to the new parameters; here, as everywhere in optax, it is added to the update and sees
    the old ones (a difference of order learning rate squared).

    Args:
      learning_rate: step size, at least 0, or a schedule; start from ten times that of AdamW.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the subset sums, in [0, 1).
      eps: see ``scale_by_subset_norm``.
      mu_dtype: dtype of the first moment; ``None`` is float32.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: which leaves decay: a tree of bools or a function of the parameters returning one.
      subset: see ``scale_by_subset_norm``.
      matrix_mask: see ``scale_by_subset_norm``; the paper does best with linear layers only.
      eps_mode: see ``scale_by_subset_norm``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    References:
      Nguyen, Nguyen, "Lean and Mean Adaptive Optimization via Subset-Norm and Subspace-Momentum
      with Convergence Guarantees", ICML 2025, arXiv:2411.07120.
    """
    _common.check_adam_arguments(b1=b1)
    rule = scale_by_subset_norm(
        b2,
        eps,
        momentum=_common.ema(b1, mu_dtype=mu_dtype, debias=True),
        subset=subset,
        matrix_mask=matrix_mask,
        eps_mode=eps_mode,
    )
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)


def rmsprop_sn(
    learning_rate: optax.ScalarOrSchedule,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _common.Mask = None,
    *,
    subset: Subset = "heuristic",
    matrix_mask: _common.MatrixMask = None,
) -> optax.GradientTransformationExtraArgs:
    """RMSProp with subset-norm step sizes, no momentum: b elements of state for an m-by-n matrix.

    Without bias correction, as in the official code, so the first steps are up to
    ``1 / sqrt(1 - b2)`` times too long: warm the learning rate up.

    Args:
      learning_rate: step size, at least 0, or a schedule.
      b2: decay of the subset sums, in [0, 1).
      eps: see ``scale_by_subset_norm``, as all arguments not described here.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: which leaves decay.
      subset: see ``scale_by_subset_norm``.
      matrix_mask: see ``scale_by_subset_norm``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    References:
      Nguyen, Nguyen, ICML 2025, arXiv:2411.07120.
    """
    rule = scale_by_subset_norm(
        b2, eps, accumulator="rmsprop", subset=subset, matrix_mask=matrix_mask
    )
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)


def adagrad_sn(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike | None = None,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _common.Mask = None,
    *,
    subset: Subset = "heuristic",
    matrix_mask: _common.MatrixMask = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaGrad with subset-norm step sizes: b elements of state for an m-by-n matrix, mn + b with
    b1.

    Args:
      learning_rate: step size, at least 0, or a schedule.
      b1: decay of an uncorrected mean of gradients used as numerator, in [0, 1); ``None``, the
        paper's method, uses the gradient. The official code's preset has 0.9.
      eps: see ``scale_by_subset_norm``, as all arguments not described here.
      mu_dtype: dtype of that mean; ``None`` is float32. Refused without ``b1``.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: which leaves decay.
      subset: see ``scale_by_subset_norm``.
      matrix_mask: see ``scale_by_subset_norm``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    References:
      Nguyen, Nguyen, ICML 2025, arXiv:2411.07120.
    """
    _common.check_adam_arguments(b1=b1)
    if b1 is None and mu_dtype is not None:
        raise ValueError(f"mu_dtype={mu_dtype!r} needs b1: without it no mean is stored")
    rule = scale_by_subset_norm(
        None,
        eps,
        accumulator="adagrad",
        momentum=None if b1 is None else _common.ema(b1, mu_dtype=mu_dtype, debias=False),
        subset=subset,
        matrix_mask=matrix_mask,
    )
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)
