"""Argument checks: each raises at construction, naming the argument, its value and what is legal.

Values that are not known yet (tracers, as under ``optax.inject_hyperparams`` inside ``jit``) pass:
they were checked when the transformation was first built.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def _concrete(name: str, value: Any) -> float | None:
    """The value as a Python float, or ``None`` if it is traced and cannot be known."""
    if isinstance(value, jax.core.Tracer):
        return None
    scalar = (
        isinstance(value, numbers.Real | jax.Array | np.ndarray) and getattr(value, "ndim", 0) == 0
    )
    if not scalar or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    return float(value)  # type: ignore[arg-type]


def check_number(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raises unless ``value`` is a finite number in the interval from ``low`` to ``high``.

    Args:
      name: the argument's name, for the message.
      value: a Python number, a scalar array, or a tracer (passes).
      low: smallest legal value.
      high: largest legal value.
      low_open: whether ``low`` itself is illegal.
      high_open: whether ``high`` itself is illegal.

    Raises:
      TypeError: if ``value`` is not a number.
      ValueError: if it is outside the interval, NaN or infinite.
    """
    number = _concrete(name, value)
    if number is None:
        return
    below = number <= low if low_open else number < low
    above = number >= high if high_open else number > high
    if below or above or not math.isfinite(number):
        left = "(" if low_open or low == -math.inf else "["
        right = ")" if high_open or high == math.inf else "]"
        raise ValueError(f"{name} must be in {left}{low:g}, {high:g}{right}, got {number!r}")


def check_int(name: str, value: Any, *, low: int = 1) -> None:
    """Raises unless ``value`` is a Python or NumPy integer not below ``low``.

    Raises:
      TypeError: if it is not an integer. A traced value is refused too: the integers of our
        transformations fix array shapes, so ``optax.inject_hyperparams`` needs them in
        ``static_args``.
      ValueError: if it is below ``low``.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        hint = ""
        if isinstance(value, jax.Array):
            hint = f"; it fixes shapes, so list {name!r} in static_args of optax.inject_hyperparams"
        raise TypeError(
            f"{name} must be an int, got {value!r} of type {type(value).__name__}{hint}"
        )
    if value < low:
        raise ValueError(f"{name} must be an int of at least {low}, got {value}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        legal = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {legal}, got {value!r}")


def check_learning_rate(value: Any) -> None:
    """Raises unless ``value`` is a schedule (any callable) or a finite number not below 0."""
    if not callable(value):
        check_number("learning_rate", value, low=0.0)


def check_real_floating(params: Any, who: str) -> None:
    """Raises ``TypeError`` naming the first leaf that is not a real floating array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            where = jax.tree_util.keystr(path) or "the only leaf"
            raise TypeError(
                f"{who} works on real floating-point parameters, got {dtype} at {where}; "
                "leave such leaves out with optax.masked or optax.partition"
            )
