"""DiLoCo with AdamW inside and Nesterov's momentum outside, as papers train language models."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers.compression import feedback
from jaxopt_suite.optimizers.compression.compressor import Compressor
from jaxopt_suite.optimizers.compression.mean import compressed_mean
from jaxopt_suite.optimizers.compression.quantize import int4, int8
from jaxopt_suite.optimizers.diloco.diloco import Cadence, Restart, diloco
from jaxopt_suite.optimizers.diloco.fragments import Order
from jaxopt_suite.optimizers.diloco.outer import mean_over_workers
from jaxopt_suite.optimizers.diloco.streaming import streaming_diloco
from jaxopt_suite.optimizers.grams import scale_by_grams

Mean = Literal["float32", "int8", "int4"]
_COMPRESSORS: dict[str, Callable[[], Compressor]] = {
    "int8": int8,
    "int4": functools.partial(int4, block=128),
}


def diloco_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    mask: _common.Mask = None,
    *,
    axis_name: str,
    sync_every: Cadence = 50,
    outer_learning_rate: jax.typing.ArrayLike = 0.7,
    outer_momentum: jax.typing.ArrayLike | None = 0.9,
    mean: Mean = "float32",
    rejoin: Restart = "keep",
) -> optax.GradientTransformationExtraArgs:
    """``diloco`` with AdamW inside; with an outer rate of 1 and no momentum, local AdamW.

    Args:
      learning_rate: of the inner optimizer, at least 0, or a schedule of the count of inner steps.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, at least 0.
      weight_decay: decoupled, multiplied by the learning rate; of the inner optimizer only.
      mask: tree of bools, or a function of the parameters returning one: which leaves decay.
      axis_name: the workers' axis, of ``parallel.run_workers`` or ``make_train_step``.
      sync_every: as in ``diloco``.
      outer_learning_rate: at least 0.
      outer_momentum: Nesterov's, in [0, 1); None: plain SGD, which keeps no state.
      mean: how pseudo-gradients travel: ``"float32"``; ``"int8"`` or ``"int4"``, with scales for
        256 or 128 entries, without error feedback, leaves of fewer than 1024 elements as they are.
      rejoin: as in ``diloco``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    References:
      As in ``diloco``. In eight bits: Jaghouar et al., "INTELLECT-1 Technical Report", 2024,
      arXiv:2412.01152.
    """
    return diloco(
        adamw_float32(learning_rate, b1, b2, eps, weight_decay, mask),
        outer_sgd(mean_link(axis_name, mean), outer_learning_rate, outer_momentum),
        sync_every=sync_every,
        axis_name=axis_name,
        rejoin=rejoin,
    )


def streaming_diloco_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    mask: _common.Mask = None,
    *,
    axis_name: str,
    sync_every: int = 50,
    outer_learning_rate: jax.typing.ArrayLike = 0.4,
    outer_momentum: jax.typing.ArrayLike | None = 0.9,
    mean: Mean = "int4",
    fragments: int | None = None,
    order: Order = "strided",
    delay: int = 1,
    mixing: jax.typing.ArrayLike = 0.0,
    rejoin: Restart = "keep",
) -> optax.GradientTransformationExtraArgs:
    """``streaming_diloco`` with AdamW inside; outer rate, delay and four bits are the paper's.

    Args:
      learning_rate: as in ``diloco_adamw``, as all arguments not described here.
      b1: see ``diloco_adamw``.
      b2: see ``diloco_adamw``.
      eps: see ``diloco_adamw``.
      weight_decay: see ``diloco_adamw``.
      mask: see ``diloco_adamw``.
      axis_name: see ``diloco_adamw``.
      sync_every: as in ``streaming_diloco``.
      outer_learning_rate: see ``diloco_adamw``.
      outer_momentum: see ``diloco_adamw``.
      mean: see ``diloco_adamw``.
      fragments: as in ``streaming_diloco``.
      order: as in ``streaming_diloco``.
      delay: as in ``streaming_diloco``.
      mixing: as in ``streaming_diloco``.
      rejoin: as in ``diloco``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    References:
      As in ``streaming_diloco``.
    """
    return streaming_diloco(
        adamw_float32(learning_rate, b1, b2, eps, weight_decay, mask),
        outer_sgd(mean_link(axis_name, mean), outer_learning_rate, outer_momentum),
        sync_every=sync_every,
        axis_name=axis_name,
        fragments=fragments,
        order=order,
        delay=delay,
        mixing=mixing,
        rejoin=rejoin,
    )


def adamw_float32(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    weight_decay: optax.ScalarOrSchedule,
    mask: _common.Mask,
) -> optax.GradientTransformation:
    """The inner AdamW of all recipes here, with moments in float32."""
    rule = scale_by_grams(b1, b2, eps, kappa=1.0)  # which is Adam
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)


def outer_sgd(
    mean: optax.GradientTransformation, learning_rate: Any, momentum: Any
) -> optax.GradientTransformation:
    """The outer chain of recipes: a mean over workers, then SGD with Nesterov's momentum.

    Args:
      mean: the link that communicates.
      learning_rate: at least 0.
      momentum: in [0, 1); None: plain SGD, which keeps no state.
    """
    core.check_number("outer_learning_rate", learning_rate, low=0.0)
    if momentum is not None:
        core.check_number("outer_momentum", momentum, low=0.0, high=1.0, high_open=True)
    return optax.chain(mean, optax.sgd(learning_rate, momentum, nesterov=momentum is not None))


def mean_link(axis_name: str, mean: str) -> optax.GradientTransformation:
    """The mean over workers as recipes name it: in float32, or compressed without feedback."""
    core.check_choice("mean", mean, ("float32", *_COMPRESSORS))
    if mean == "float32":
        return mean_over_workers(axis_name)
    compressor = _COMPRESSORS[mean]()
    return compressed_mean(compressor, feedback=feedback.none(), axis_name=axis_name)
