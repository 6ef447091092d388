"""Values as JSON has them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """The same in dicts, lists, texts and numbers: arrays as lists, what is not finite as ``None``.

    Args:
      value: mappings, lists, tuples, NumPy arrays and scalars, nested in any way; anything else is
        given back as it is.
    """
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
