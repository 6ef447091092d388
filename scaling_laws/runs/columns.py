"""The columns a table of runs may have: their names, what files call them, how values are read."""

import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

# What a law is fitted to: never missing where there is such a column.
MEASURED = frozenset(("N", "D", "U", "C", "loss"))
# Where rows have them at all, every row must.
NEEDED = MEASURED | {"run_id", "step"}
POSITIVE = MEASURED | {
    "loss_se",
    "lr",
    "steps",
    "batch_tokens",
    "seq_len",
    "width",
    "depth",
    "vocab",
    "heads",
    "head_size",
    "ff_width",
    "ff_matrices",
}
SHAPE = ("width", "depth", "vocab", "seq_len", "heads", "head_size", "ff_width", "ff_matrices")
# Not columns of the result: every row has the same.
RULES = types.MappingProxyType(
    {"N_rule": "n_rule", "flop_rule": "flop_rule", "loss_kind": "loss_kind"}
)
TEXT = frozenset(("run_id", "optimizer", "schedule", "family", "group", *RULES))
FLAGS = frozenset(("decay_finished",))

# What files call them; only names that leave no doubt.
_ALIASES = types.MappingProxyType(
    {
        "N": ("params", "n_params"),
        "D": ("tokens", "n_tokens"),
        "C": ("flops", "flop"),
        "loss": ("val_loss",),
        "lr": ("learning_rate", "lr_peak"),
        "optimizer": ("optimiser",),
        "width": ("d_model",),
        "depth": ("n_layers",),
        "heads": ("n_heads",),
        "ff_width": ("d_ff",),
        "vocab": ("vocab_size",),
    }
)
_PLAIN = ("step", "seed")
KNOWN: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        name: (name, *_ALIASES.get(name, ()))
        for name in (
            "run_id",
            "N",
            "D",
            "U",
            "C",
            "loss",
            *sorted(TEXT | POSITIVE | FLAGS),
            *_PLAIN,
        )
    }
)

_TRUE = types.MappingProxyType({"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0})


class Unusable(Exception):
    """A value that a column cannot hold; the message says what is wrong with it."""


class Missing(Unusable):
    """No value."""


def parse_columns(columns: Any) -> dict[str, str]:
    """Reads ``columns=``: a mapping, or text such as ``"N=params,loss=val/loss"``.

    Returns:
      For each of our columns, its name in the files.

    Raises:
      TypeError, ValueError: if it is neither.
    """
    if columns is None:
        return {}
    if isinstance(columns, str):
        pairs = [item.partition("=") for item in columns.split(",")]
        for name, equals, source in pairs:
            if not (name.strip() and equals and source.strip()):
                raise ValueError(
                    "columns must be a mapping or text such as 'N=params,loss=val/loss', got "
                    f"{columns!r}"
                )
        names = [name.strip() for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"columns must name each column once, got {columns!r}")
        return {name.strip(): source.strip() for name, _, source in pairs}
    if not isinstance(columns, Mapping):
        raise TypeError(f"columns must be a mapping, text or None, got {type(columns).__name__}")
    for name, source in columns.items():
        if not (isinstance(name, str) and isinstance(source, str)):
            raise TypeError(f"columns must map names to names, got {name!r}: {source!r}")
    return dict(columns)


def resolve(keys: Iterable[str], asked: Mapping[str, str]) -> dict[str, str]:
    """Which of our columns a row with these keys has, and under which key.

    Args:
      keys: of the row.
      asked: what the caller, or the reader of that file, has said; it goes before what is known.

    Raises:
      ValueError: if a column may be one key or another.
    """
    keys = frozenset(keys)
    found = {name: source for name, source in asked.items() if source in keys}
    taken = frozenset(asked.values())
    for name, names in KNOWN.items():
        candidates = [source for source in names if source in keys and source not in taken]
        if name in asked or not candidates:
            continue
        if len(candidates) > 1:
            listed = " or ".join(map(repr, candidates))
            raise ValueError(
                f"column {name} may be {listed}: say which, as in columns={{{name!r}: "
                f"{candidates[0]!r}}}"
            )
        found[name] = candidates[0]
    return found


def reader(name: str, text: frozenset[str], *, as_text: bool) -> Callable[[Any], float | str]:
    """The function that reads a value of a column, and raises ``Unusable``.

    Args:
      name: of the column.
      text: names of further columns that hold text.
      as_text: whether all values come as text, as from a CSV file.
    """
    if name in TEXT or name in text:
        return _read_text
    if name in FLAGS:
        return _read_flag
    positive = name in POSITIVE
    return lambda value: _read_number(value, positive=positive, as_text=as_text)


def _read_number(value: Any, *, positive: bool, as_text: bool) -> float:
    if type(value) is not float:
        value = _as_float(value, as_text=as_text)
    if math.isnan(value):
        raise Missing("is nan")
    if math.isinf(value):
        raise Unusable(f"is {value:g}")
    if positive and value <= 0:
        raise Unusable(f"is {value:g}, not above 0")
    return value


def _as_float(value: Any, *, as_text: bool) -> float:
    if value is None or (as_text and not str(value).strip()):
        raise Missing("is missing")
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number and not (as_text and "_" not in str(value)):
        raise Unusable(f"is {_shown(value)}, not a number")
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        raise Unusable(f"is {_shown(value)}, not a number") from None


def _read_flag(value: Any) -> float:
    if value is None or value == "":
        raise Missing("is missing")
    found = _TRUE.get(str(value).strip().lower().removesuffix(".0"))
    if found is None:
        raise Unusable(f"is {_shown(value)}, not true or false")
    return found


def _read_text(value: Any) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise Missing("is missing")
    text = sys.intern(str(value))  # most texts are there in thousands of rows
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable(f"is {_shown(value)}, not UTF-8") from None
    return text


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
