"""What several transformations share: exact bias correction, Adam's division, a recipe's tail."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_suite import core

EpsMode = Literal["corrected", "uncorrected"]
EPS_MODES = ("corrected", "uncorrected")
Mask = Any | Callable[[optax.Params], Any] | None
MatrixMask = Callable[[optax.Params], Any] | None


def bias_correction(decay: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
    """``1 - decay**count`` for ``count >= 1``, to full float precision.

    The power form loses up to five digits in float32 when ``decay`` is near one (``1 - 0.999`` is
    off by 1.3e-5); ``-expm1(count * log(decay))`` with the logarithm taken in float64 is off by
    1e-7.
    """
    if isinstance(decay, jax.Array):
        log = jnp.log(decay)
    else:
        with np.errstate(divide="ignore"):  # decay 0: log is -inf and the correction is exactly 1
            log = jnp.asarray(np.log(np.asarray(decay, np.float64)), jnp.result_type(float))
    return -jnp.expm1(count.astype(log.dtype) * log)


def update_mean(mean: jax.Array, value: jax.Array, decay: jax.typing.ArrayLike) -> jax.Array:
    """``decay * mean + (1 - decay) * value`` in the dtype of ``value``."""
    one_minus = jnp.asarray(1.0 - decay, value.dtype)
    return jnp.asarray(decay, value.dtype) * mean.astype(value.dtype) + one_minus * value


def divide_by_root(
    numerator: jax.Array,  # [...]
    nu: jax.Array,  # broadcasts against the numerator
    correction: jax.Array,  # []: the second moment's bias correction
    *,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike,
    eps_mode: EpsMode,
) -> jax.Array:
    """The numerator over the root of the bias-corrected second moment."""
    eps = jnp.asarray(eps, nu.dtype)
    eps_root = jnp.asarray(eps_root, nu.dtype)
    correction = correction.astype(nu.dtype)
    if eps_mode == "corrected":
        return numerator / (jnp.sqrt(nu / correction + eps_root) + eps)
    return numerator * jnp.sqrt(correction) / (jnp.sqrt(nu + eps_root) + eps)


def check_adam_arguments(**arguments: Any) -> None:
    """Checks those of Adam's arguments that are given, under the names optax gives them."""
    for name in ("b1", "b2"):
        if arguments.get(name) is not None:
            core.check_number(name, arguments[name], low=0.0, high=1.0, high_open=True)
    for name in ("eps", "eps_root"):
        if name in arguments:
            core.check_number(name, arguments[name], low=0.0)
    if "eps_mode" in arguments:
        core.check_choice("eps_mode", arguments["eps_mode"], EPS_MODES)


def with_decay_and_rate(
    rule: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: optax.ScalarOrSchedule,
    mask: Mask,
) -> optax.GradientTransformationExtraArgs:
    """A raw rule made a recipe: decoupled weight decay, then minus the learning rate."""
    core.check_learning_rate(learning_rate)
    if not callable(weight_decay):
        core.check_number("weight_decay", weight_decay, low=0.0)
    return optax.chain(
        rule,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def matrix_flags(tree: Any, matrix_mask: MatrixMask, who: str) -> list[bool]:
    """For each leaf of ``tree`` in order, whether it is to be treated as (a stack of) matrices.

    An empty leaf never is: it has no directions and no sums.

    Args:
      tree: parameters or updates.
      matrix_mask: maps ``tree`` to a tree of bools; ``None`` takes every leaf of two or more axes.
      who: the transformation's name, for messages.

    Raises:
      ValueError: if the mask has another structure, or marks a leaf of fewer than two axes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    if matrix_mask is None:
        return [len(jnp.shape(leaf)) >= 2 and math.prod(jnp.shape(leaf)) > 0 for _, leaf in leaves]
    mask = matrix_mask(tree)
    if jax.tree.structure(mask) != jax.tree.structure(tree):
        raise ValueError(
            f"{who}: matrix_mask must return a tree of bools with the structure of the parameters "
            f"{jax.tree.structure(tree)}, got {jax.tree.structure(mask)}"
        )
    flags = []
    for (path, leaf), flag in zip(leaves, jax.tree.leaves(mask), strict=True):
        if flag and len(jnp.shape(leaf)) < 2:
            raise ValueError(
                f"{who}: matrix_mask marks {jax.tree_util.keystr(path)} of shape "
                f"{jnp.shape(leaf)}; only leaves of two or more axes can be matrices"
            )
        flags.append(bool(flag) and math.prod(jnp.shape(leaf)) > 0)
    return flags


class EmaState(NamedTuple):
    """State of ``ema``."""

    count: jax.Array  # type: ignore[assignment]  # int32 []: updates so far
    mu: optax.Updates  # mu_dtype (float32), shapes of params


def ema(
    decay: jax.typing.ArrayLike, *, mu_dtype: Any = None, debias: bool
) -> optax.GradientTransformation:
    """Running mean of updates. Unlike ``optax.ema``: float32 mean, exact correction."""

    def init(params: optax.Params) -> EmaState:
        zeros = lambda p: jnp.zeros_like(p, core.accumulator_dtype(p, mu_dtype))
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(zeros, params))

    def update(
        updates: optax.Updates, state: EmaState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, EmaState]:
        del params
        count = optax.safe_increment(state.count)
        correction = bias_correction(decay, count) if debias else jnp.ones(())

        def leaf(g: jax.Array, mu: jax.Array) -> tuple[jax.Array, jax.Array]:
            mean = update_mean(mu, g.astype(core.accumulator_dtype(g)), decay)
            return (mean / correction.astype(mean.dtype)).astype(g.dtype), mean.astype(mu.dtype)

        updates, mu = core.map_unzip(leaf, 2, updates, state.mu)
        return updates, EmaState(count, mu)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
