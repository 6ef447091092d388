"""Rows that are there twice."""

from collections.abc import Iterator, Mapping

import numpy as np


def repeated_rows(columns: Mapping[str, np.ndarray], *, final: bool) -> Iterator[tuple[int, int]]:
    """Pairs of a row and an earlier one that is the same run, or the same point of one.

    What makes a row is its ``run_id`` where there is one, with ``step`` in a curve; else all its
    values, NaN being equal to NaN.

    Args:
      columns: float64 or object ``[rows]``.
      final: whether a run has one row.

    Yields:
      Both as indices, the first occurrence as the earlier one.
    """
    names = sorted(columns)
    if "run_id" in columns and all(columns["run_id"]):
        names = ["run_id"] if final else [n for n in ("run_id", "step") if n in columns]
        if not final and "step" not in columns:
            names = sorted(columns)
    if not names or not len(columns[names[0]]):
        return
    hashes = _hashes([columns[name] for name in names])
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    first: dict[tuple[object, ...], int] = {}
    for position in _whole_groups(hashes[order], same):
        row = int(order[position])
        key = tuple(_plain(columns[name][row]) for name in names)
        earlier = first.setdefault(key, row)
        if earlier != row:
            yield row, earlier


def _hashes(values: list[np.ndarray]) -> np.ndarray:
    """A 64-bit hash of each row: equal rows have equal ones."""
    mixed = np.zeros(len(values[0]), np.uint64)
    for column in values:
        if column.dtype == object:
            bits = np.fromiter(map(hash, column), np.int64, len(column)).view(np.uint64)
        else:
            bits = (column + 0.0).view(
                np.uint64
            )  # -0 is 0; what is missing is one and the same NaN
        mixed = (mixed ^ bits) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _whole_groups(hashes: np.ndarray, same: np.ndarray) -> Iterator[int]:
    """Positions of all rows whose hash occurs more than once; ``same`` are those after another."""
    previous = -1
    for position in same:
        if position - 1 != previous:
            yield position - 1
        yield position
        previous = position


def _plain(value: object) -> object:
    return "nan" if value != value else value
