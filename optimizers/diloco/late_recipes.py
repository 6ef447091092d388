"""Outer updates that are a round late, with AdamW inside."""

import jax
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers.diloco.co2 import co2, relative_movement
from jaxopt_suite.optimizers.diloco.diloco import Cadence, Restart
from jaxopt_suite.optimizers.diloco.eager import eager_diloco
from jaxopt_suite.optimizers.diloco.recipes import Mean, adamw_float32, mean_link


def eager_diloco_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    mask: _common.Mask = None,
    *,
    axis_name: str,
    sync_every: Cadence = 50,
    outer_learning_rate: jax.typing.ArrayLike = 0.4,
    outer_momentum: jax.typing.ArrayLike = 0.8,
    mean: Mean = "float32",
    rejoin: Restart = "keep",
) -> optax.GradientTransformationExtraArgs:
    """``eager_diloco`` with AdamW inside and Nesterov's momentum outside.

    Args:
      learning_rate: as in ``diloco_adamw``, as all arguments not described here.
      b1: see ``diloco_adamw``.
      b2: see ``diloco_adamw``.
      eps: see ``diloco_adamw``.
      weight_decay: see ``diloco_adamw``.
      mask: see ``diloco_adamw``.
      axis_name: see ``diloco_adamw``.
      sync_every: see ``diloco_adamw``.
      outer_learning_rate: at least 0.
      outer_momentum: in [0, 1). Less than DiLoCo's, as the mean is a round late.
      mean: see ``diloco_adamw``.
      rejoin: as in ``diloco``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    References:
      As in ``eager_diloco``.
    """
    core.check_number("outer_learning_rate", outer_learning_rate, low=0.0)
    core.check_number("outer_momentum", outer_momentum, low=0.0, high=1.0, high_open=True)
    return eager_diloco(
        adamw_float32(learning_rate, b1, b2, eps, weight_decay, mask),
        optax.sgd(outer_learning_rate, outer_momentum, nesterov=True),
        sync_every=sync_every,
        axis_name=axis_name,
        mean=mean_link(axis_name, mean),
        rejoin=rejoin,
    )


def co2_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    mask: _common.Mask = None,
    *,
    axis_name: str,
    sync_every: Cadence = 50,
    outer_learning_rate: jax.typing.ArrayLike = 1.0,
    outer_momentum: jax.typing.ArrayLike = 0.2,
    penalised: bool = True,
    clip: float | None = None,
    mean: Mean = "float32",
    rejoin: Restart = "keep",
) -> optax.GradientTransformationExtraArgs:
    """``co2`` with AdamW inside; its momentum is measured in units of the parameters.

    Args:
      learning_rate: as in ``diloco_adamw``, as all arguments not described here.
      b1: see ``diloco_adamw``.
      b2: see ``diloco_adamw``.
      eps: see ``diloco_adamw``.
      weight_decay: see ``diloco_adamw``.
      mask: see ``diloco_adamw``.
      axis_name: see ``diloco_adamw``.
      sync_every: see ``diloco_adamw``.
      outer_learning_rate: at least 0.
      outer_momentum: heavy-ball, in [0, 1).
      penalised: whether what arrives is divided by ``relative_movement``.
      clip: as in ``co2``, for an inner rate of 1.
      mean: see ``diloco_adamw``.
      rejoin: as in ``diloco``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    References:
      As in ``co2``.
    """
    core.check_number("outer_learning_rate", outer_learning_rate, low=0.0)
    core.check_number("outer_momentum", outer_momentum, low=0.0, high=1.0, high_open=True)
    return co2(
        adamw_float32(learning_rate, b1, b2, eps, weight_decay, mask),
        sync_every=sync_every,
        axis_name=axis_name,
        learning_rate=outer_learning_rate,
        momentum=outer_momentum,
        penalty=relative_movement if penalised else None,
        clip=clip,
        mean=mean_link(axis_name, mean),
        rejoin=rejoin,
    )
