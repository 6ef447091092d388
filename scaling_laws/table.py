"""The columns a fit reads from runs: numbers of one length, one convention, and enough of them."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxopt_suite.scaling_laws.law import Law
from jaxopt_suite.scaling_laws.refusals import MixedRuns, NotSeparable, TooFewRuns

# Columns that say how the others were counted or measured; a fit needs one value of each.
CONVENTIONS = ("N_rule", "flop_rule", "loss_kind", "tokenizer", "schedule", "decay_finished")
ALLOWANCES = ("few_runs", "collinear", "mixed")
ON_A_LINE = 0.01  # nats: root mean square distance of the inputs' logarithms from a plane


@dataclasses.dataclass(frozen=True)
class Table:
    """Runs as a fit sees them.

    Attributes:
      inputs: float64 ``[n]`` each, by column name.
      observed: float64 ``[n]``, the law's output column.
      weights: float64 ``[n]``.
      conventions: the one value of each column of ``CONVENTIONS`` that is there.
    """

    inputs: dict[str, np.ndarray]
    observed: np.ndarray
    weights: np.ndarray
    conventions: dict[str, str]

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.observed)

    @property
    def used(self) -> int:
        """Number of runs with a weight."""
        return int(np.count_nonzero(self.weights))

    @property
    def digest(self) -> str:
        """SHA-256 of names and numbers in order, to tell whether two fits saw the same runs."""
        found = hashlib.sha256()
        for name, column in [*sorted(self.inputs.items()), ("", self.observed), ("", self.weights)]:
            found.update(name.encode() + np.ascontiguousarray(column, "<f8").tobytes())
        return found.hexdigest()


def columns_of(runs: Any) -> Mapping[str, Any]:
    """The columns of runs: a mapping, a data frame, or an object whose ``columns`` is a mapping.

    Raises:
      TypeError: if it is none of these.
    """
    if isinstance(runs, Mapping):
        return runs
    if isinstance(getattr(runs, "columns", None), Mapping):
        return runs.columns
    if hasattr(runs, "keys") and hasattr(runs, "__getitem__"):  # a pandas data frame
        return {str(name): runs[name] for name in runs.keys()}  # noqa: SIM118
    raise TypeError(
        "runs must be a mapping from column names to arrays, or have one as `columns`, "
        f"got {type(runs).__name__}"
    )


def column(columns: Mapping[str, Any], name: str) -> np.ndarray:
    """One column as float64 ``[n]``.

    Raises:
      ValueError: if it is not there, is no list of numbers, or has one that is not finite.
    """
    if name not in columns:
        raise ValueError(f"runs have no column {name!r}; there are: {', '.join(map(str, columns))}")
    values = np.asarray(columns[name])
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise ValueError(
            f"column {name!r} must be a list of numbers, got {values.dtype} of shape {values.shape}"
        )
    values = values.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(
            f"column {name!r} must be finite, got {values[bad[0]]} in row {bad[0]} "
            f"and {bad.size} such rows in all"
        )
    return values


def read(
    law: Law,
    runs: Any,
    *,
    weights: Any = None,
    space: str = "log",
    free: int | None = None,
    allow: Sequence[str] = (),
) -> Table:
    """The columns of ``runs`` that ``law`` needs.

    Args:
      law: says which columns.
      runs: see ``columns_of``.
      weights: ``None``, a column's name, or numbers ``[n]`` not below 0.
      space: of the residuals; logarithms need positive outputs.
      free: number of parameters that are fitted; all of the law's by default.
      allow: checks to leave out, from ``ALLOWANCES``.

    Raises:
      ValueError: for a column that is missing, of another length, or illegal somewhere.
      FitRefused: ``TooFewRuns``, ``NotSeparable`` or ``MixedRuns``.
    """
    for name in allow:
        if name not in ALLOWANCES:
            raise ValueError(f"allow may name {', '.join(ALLOWANCES)}, got {name!r}")
    columns = columns_of(runs)
    observed = column(columns, law.output)
    inputs = {name: column(columns, name) for name in law.inputs}
    powers = {name for p in law.parameters for name in p.of}
    positive = powers | ({law.output} if space == "log" else set())
    for name, values in {**inputs, law.output: observed}.items():
        if len(values) != len(observed):
            raise ValueError(
                f"column {name!r} has {len(values)} rows, {law.output!r} {len(observed)}"
            )
        if name in positive and not (values > 0).all():
            raise ValueError(f"column {name!r} must be positive, got {values.min()}")
    table = Table(inputs, observed, _weights(weights, columns, len(observed)), {})
    _check_count(law, table, len(law.names) if free is None else free, allow)
    if "collinear" not in allow:
        _check_separable(law, table, powers)
    return dataclasses.replace(table, conventions=_conventions(columns, "mixed" in allow))


def _weights(weights: Any, columns: Mapping[str, Any], n: int) -> np.ndarray:
    if weights is None:
        return np.ones(n)
    if isinstance(weights, str):
        weights = column(columns, weights)
    weights = np.asarray(weights, np.float64)
    if weights.shape != (n,) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise ValueError(
            f"weights must be {n} finite numbers not below 0, got shape {weights.shape}"
            + (f", smallest {np.min(weights)}" if weights.size else "")
        )
    return weights


def _check_count(law: Law, table: Table, free: int, allow: Sequence[str]) -> None:
    needed = free if "few_runs" in allow else free + 2
    if table.used < needed:
        raise TooFewRuns(
            f"{law.name} with {free} parameters needs at least {needed} runs, got {table.used}"
            + ("" if "few_runs" in allow else "; allow=('few_runs',) takes as few as parameters")
        )


def _check_separable(law: Law, table: Table, powers: set[str]) -> None:
    if not powers:
        return
    names = sorted(powers)
    logs = np.log(np.stack([table.inputs[name] for name in names], axis=1))
    logs = (logs - logs.mean(0))[table.weights > 0]
    width = np.linalg.svd(logs, compute_uv=False)[-1] / np.sqrt(len(logs))
    if len(logs) < len(names) or width < ON_A_LINE:
        what = " and ".join(names)
        raise NotSeparable(
            f"{what} of these runs "
            + ("do not vary" if len(names) == 1 else "lie on one line in logarithms")
            + f" (spread across it {width:.2g} nats, least {ON_A_LINE}): the exponents of "
            f"{law.name} cannot be told apart; allow=('collinear',) fits all the same"
        )


def _conventions(columns: Mapping[str, Any], mixed: bool) -> dict[str, str]:
    found = {}
    for name in CONVENTIONS:
        if name not in columns:
            continue
        values = sorted({str(value) for value in columns[name]})
        if len(values) > 1 and not mixed:
            raise MixedRuns(
                f"runs must have one {name}, got {', '.join(values)}; "
                "allow=('mixed',) fits them together"
            )
        found[name] = ", ".join(values)
    return found
