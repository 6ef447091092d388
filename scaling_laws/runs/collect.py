"""Rows of files into columns: one pass, eight bytes a number, every row that is left out noted."""

import array
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxopt_suite.scaling_laws.runs import columns as names
from jaxopt_suite.scaling_laws.runs.repeats import repeated_rows
from jaxopt_suite.scaling_laws.runs.sources import Damaged, Row, Source
from jaxopt_suite.scaling_laws.runs.table import Dropped, Origins

_REMEMBERED = 1000  # bad rows that an error carries; the others are counted

Cells = dict[str, float | str]


class _Column(NamedTuple):
    """How one of our columns is read from a row."""

    name: str
    source: str
    read: Callable[[Any], float | str]
    required: bool


class _Position(NamedTuple):
    """Where in a run a row stands, and where it was read."""

    step: float
    where: str


class Collector:
    """Takes sources one by one; ``finish`` gives what they hold.

    Attributes:
      bad: rows that cannot be used; where they end in an error, the first thousand of them.
      bad_count: how many there are.
      excluded: rows that are left out by a rule and are no mistake.
      sources: for each of our columns, its name in the files.
    """

    def __init__(
        self, asked: Mapping[str, str], text: frozenset[str], *, final: bool, keep_all_bad: bool
    ) -> None:
        """Makes an empty one.

        Args:
          asked: what the caller says about columns.
          text: names of further columns that hold text.
          final: whether of each run only the last row is wanted.
          keep_all_bad: whether every bad row is to be remembered.
        """
        self._asked, self._text, self._final = asked, text, final
        self._most = math.inf if keep_all_bad else _REMEMBERED
        self.bad: list[Dropped] = []
        self.bad_count = 0
        self.excluded: list[Dropped] = []
        self.sources: dict[str, str] = {}
        self._first_file: dict[str, str] = {}  # that has the column
        self._cells: dict[str, Any] = {}  # arrays of float64, lists of str
        self._files: list[str] = []
        self._file, self._line = array.array("i"), array.array("q")
        self._last: dict[str, int] = {}  # of each run: the row that holds its last record
        self._spoiled: dict[str, _Position] = {}  # of each run: its last record without a number

    def __len__(self) -> int:
        return len(self._line)

    def add(self, source: Source) -> None:
        """Reads a source to its end.

        Raises:
          ValueError: if a column that was asked for is not there, or may be one or another.
        """
        self._files.append(source.name)
        known: dict[tuple[str, ...], list[_Column]] = {}
        keys: dict[str, None] = {"file": None}
        for row in source.rows():
            if isinstance(row, Damaged):
                self._bad(row.line, row.reason, row.value)
                continue
            key = tuple(row.values)
            if key not in known:
                keys |= dict.fromkeys(key)
                known[key] = self._columns(source, key)
            self._row(row, known[key])
        missing = [name for name, key in self._asked.items() if key not in keys]
        if missing and len(keys) > 1:
            self._unknown(source.name, missing[0], keys)

    def _unknown(self, file: str, name: str, keys: Iterable[str]) -> None:
        listed = ", ".join(repr(key) for key in keys if key != "file")
        raise ValueError(
            f"columns: {name}={self._asked[name]!r} is no column of {file}, which has {listed}"
        )

    def _columns(self, source: Source, keys: tuple[str, ...]) -> list[_Column]:
        asked = {**source.defaults, **self._asked}
        try:
            found = names.resolve((*keys, "file"), asked)
        except ValueError as error:
            raise ValueError(f"{source.name}: {error}") from None
        for name, key in found.items():
            self._settle(name, key, source.name)
        return [
            _Column(
                name,
                key,
                names.reader(name, self._text, as_text=source.as_text and key in keys),
                name in names.NEEDED or name in self._asked,
            )
            for name, key in found.items()
        ]

    def _settle(self, name: str, key: str, file: str) -> None:
        """Notes which key a column is, which for what is measured must be one in all files."""
        former = self.sources.setdefault(name, key)
        first = self._first_file.setdefault(name, file)
        if former != key and name in names.MEASURED:
            raise ValueError(
                f"column {name} is {former!r} in {first} and {key!r} in {file}: say which, as in "
                f"columns={{{name!r}: {former!r}}}, or load them separately"
            )

    def _row(self, row: Row, columns: list[_Column]) -> None:
        cells, reason, value = self._read(row, columns)
        if row.excluded:
            self.excluded.append(Dropped(self._where(row.line), row.excluded))
            self._spoil(cells, row.line)
        elif "step" in cells and not any(column.name == "loss" for column in columns):
            pass  # a record of a log that says nothing about the loss
        elif cells.get("step") == 0.0 and _untrained(row, columns):
            self.excluded.append(Dropped(self._where(row.line), "before the first step (D is 0)"))
        elif reason:
            self._bad(row.line, reason, value)
            self._spoil(cells, row.line)
        elif self._final and "step" in cells and "run_id" in cells:
            self._keep_last(cells, row.line)
        else:
            self._append(cells, row.line)

    def _read(self, row: Row, columns: list[_Column]) -> tuple[Cells, str, str]:
        """The values of a row, and what is wrong with the first that is unusable."""
        cells: Cells = {}
        reason = value = ""
        for column in columns:
            raw = self._files[-1] if column.source == "file" else row.values[column.source]
            try:
                cells[column.name] = column.read(raw)
            except names.Unusable as problem:
                if column.required or not isinstance(problem, names.Missing):
                    label = column.name
                    if column.source != label:
                        label = f"{label} ({column.source!r})"
                    reason, value = reason or f"{label} {problem}", value or ascii(raw)[:60]
        return cells, reason, value

    def _keep_last(self, cells: Cells, line: int) -> None:
        """Puts the row in the place of its run's, if it is a later one."""
        run, step = str(cells["run_id"]), float(cells["step"])
        at = self._last.setdefault(run, len(self))
        if at == len(self):
            self._append(cells, line)
            return
        steps = self._cells["step"]
        if step == steps[at]:
            where = f"{self._files[self._file[at]]}:{self._line[at]}"
            self._bad(line, f"step {step:g} of run {run!r} is at {where} already", "")
        elif step > float(steps[at]):
            self._file[at], self._line[at] = len(self._files) - 1, line
            for name in {**self._cells, **cells}:
                column = self._column(name)
                column[at] = cells.get(name, _absent(column))

    def _append(self, cells: Cells, line: int) -> None:
        for name in cells:
            self._column(name)
        for name, column in self._cells.items():
            column.append(cells.get(name, _absent(column)))
        self._file.append(len(self._files) - 1)
        self._line.append(line)

    def _column(self, name: str) -> Any:
        """The values of a column so far; rows before its first one have none."""
        if name not in self._cells:
            text = name in names.TEXT or name in self._text
            empty: Any = [] if text else array.array("d")
            empty.extend([_absent(empty)] * len(self))
            self._cells[name] = empty
        return self._cells[name]

    def _spoil(self, cells: Cells, line: int) -> None:
        """An unusable record later than a run's last good one leaves no final loss."""
        if self._final and "step" in cells and "run_id" in cells:
            run, step = str(cells["run_id"]), float(cells["step"])
            if run not in self._spoiled or step > self._spoiled[run].step:
                self._spoiled[run] = _Position(step, self._where(line))

    def _where(self, line: int) -> str:
        return f"{self._files[-1]}:{line}"

    def _bad(self, line: int, reason: str, value: str) -> None:
        self._note_bad(Dropped(self._where(line), reason, value))

    def _note_bad(self, dropped: Dropped) -> None:
        self.bad_count += 1
        if len(self.bad) < self._most:
            self.bad.append(dropped)

    def finish(self) -> tuple[dict[str, np.ndarray], Origins]:
        """The columns, float64 or object ``[rows]``, and where the rows were read."""
        where = Origins(self._files, np.asarray(self._file), np.asarray(self._line))
        columns = {
            name: np.array(values, object) if isinstance(values, list) else np.asarray(values)
            for name, values in self._cells.items()
        }
        keep = self._complete(columns, where) & ~self._without_end(columns, where)
        columns, where = _rows(columns, where, keep)
        once = np.ones(len(where), bool)
        for row, earlier in repeated_rows(columns, final=self._final):
            self._note_bad(Dropped(where[row], f"repeats {where[earlier]}"))
            once[row] = False
        return _rows(columns, where, once)

    def _complete(self, columns: Mapping[str, np.ndarray], where: Origins) -> np.ndarray:
        """Rows that lack no value they need, bool ``[rows]``; the others are bad."""
        complete = np.ones(len(where), bool)
        for name in sorted(names.NEEDED & columns.keys()):
            values = columns[name]
            missing = values == "" if values.dtype == object else np.isnan(values)
            for row in np.flatnonzero(missing & complete).tolist():
                self._note_bad(Dropped(where[row], f"{name} is missing"))
            complete &= ~missing
        return complete

    def _without_end(self, columns: Mapping[str, np.ndarray], where: Origins) -> np.ndarray:
        """Rows of runs whose last record is unusable, bool ``[rows]``."""
        found = np.zeros(len(where), bool)
        for run, spoiled in self._spoiled.items():
            at = self._last.get(run)
            if at is not None and spoiled.step >= columns["step"][at]:
                reason = f"run {run!r} ends with an unusable record, {spoiled.where}"
                self.excluded.append(Dropped(where[at], reason))
                found[at] = True
        return found


def _untrained(row: Row, columns: list[_Column]) -> bool:
    """Whether no token has been seen yet: there is no law for that, and no mistake either."""
    tokens = [row.values.get(column.source) for column in columns if column.name == "D"]
    return bool(tokens) and str(tokens[0]) in ("0", "0.0")


def _rows(
    columns: dict[str, np.ndarray], where: Origins, keep: np.ndarray
) -> tuple[dict[str, np.ndarray], Origins]:
    """Those that are kept; all of them without a copy."""
    if keep.all():
        return columns, where
    return {name: values[keep] for name, values in columns.items()}, where.take(keep)


def _absent(column: Any) -> float | str:
    return math.nan if isinstance(column, array.array) else ""
