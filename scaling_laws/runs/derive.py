"""Columns that follow from others by a named rule; each is noted, none is guessed."""

from collections.abc import Mapping

import numpy as np

from jaxopt_suite.scaling_laws.conventions import FLOP_RULES, N_RULES, Shape
from jaxopt_suite.scaling_laws.runs.columns import SHAPE

Columns = dict[str, np.ndarray]


def shape_of(columns: Mapping[str, np.ndarray]) -> Shape:
    """The sizes that the columns give, float64 ``[runs]``; unknown where some run lacks one."""
    known = {name: columns[name] for name in SHAPE if name in columns}
    return Shape(**{name: x for name, x in known.items() if not np.isnan(x).any()})


def add_size(columns: Columns, rule: str | None, made: dict[str, str]) -> None:
    """Adds ``N`` by a rule of ``N_RULES`` where there is none.

    Raises:
      ValueError: if there is no such rule, or its sizes are not known.
    """
    if "N" not in columns and rule is not None:
        if rule not in N_RULES:
            raise ValueError(
                f"n_rule must be one of {', '.join(N_RULES)} where there is no N, got {rule!r}"
            )
        columns["N"] = np.asarray(N_RULES[rule].of(shape_of(columns)), np.float64)
        made["N"] = f"{rule} of {', '.join(N_RULES[rule].needs)}"


def add_flops(columns: Columns, rule: str | None, made: dict[str, str]) -> None:
    """Adds ``C`` where there is none, or ``D`` where C = 6ND gives it.

    Raises:
      ValueError: if there is no such rule, or what it needs is not known.
    """
    if rule is None:
        return
    if "C" not in columns:
        columns["C"] = _flops(columns, rule)
        made["C"] = "6 N D" if rule == "6ND" else f"{rule} per token, times D"
    elif "D" not in columns and rule == "6ND" and "N" in columns:
        columns["D"] = columns["C"] / (6 * columns["N"])
        made["D"] = "C / (6 N)"


def _flops(columns: Columns, rule: str) -> np.ndarray:
    if rule not in FLOP_RULES:
        raise ValueError(
            f"flops must be one of {', '.join(FLOP_RULES)} where there is no C, got {rule!r}"
        )
    if "D" not in columns:
        raise ValueError(f"C by the rule {rule!r} needs D, which the runs do not have")
    return FLOP_RULES[rule].of(shape_of(columns), n=columns.get("N")) * columns["D"]
