"""Double precision for one computation, whatever the global setting is.

In float32 the objective of a typical fit is wrong in its sixth digit, more than the differences
that decide between coefficients.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_R = TypeVar("_R")


def in_double(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Runs ``function`` with 64-bit types switched on in this thread, and restores the setting.

    JAX keys its compiled programs by the setting, so those compiled inside are found again.
    """

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return wrapped
