"""Files of rows, one after the other: JSON lines, CSV, Parquet, and frames in memory.

Each reader goes through its file once and holds one row of it (Parquet: one batch of rows).
"""

import codecs
import csv
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class Row(NamedTuple):
    """One row as a file has it."""

    line: int  # counted from 1; in Parquet files and frames from 0
    values: Mapping[str, Any]
    excluded: str = ""  # why the reader leaves it out, if it does


class Damaged(NamedTuple):
    """A line that is no row."""

    line: int
    reason: str
    value: str = ""
    torn: bool = False  # whether it is the last one and was not written to its end


Rows = Iterator[Row | Damaged]


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, or one of our run folders, that can be read row by row.

    Attributes:
      name: as ``where`` shows it.
      rows: goes through it.
      as_text: whether all values are text.
      defaults: for our columns, their names in it, where the reader knows them.
      conventions: what the reader knows about them, by the names of ``columns.RULES``.
    """

    name: str
    rows: Callable[[], Rows]
    as_text: bool = False
    defaults: Mapping[str, str] = dataclasses.field(default_factory=dict)
    conventions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def json_lines(path: pathlib.Path) -> Rows:
    """One JSON object a line; blank lines are passed over.

    ``{"loss": null, "nonfinite": {"loss": "nan"}}`` is our logs' way to write a NaN.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                torn = not line.endswith(b"\n")
                yield Damaged(number, _broken(line, error), ascii(line[:60]), torn)
                continue
            if not isinstance(record, dict):
                yield Damaged(number, f"not a JSON object: {ascii(record)[:60]}", ascii(line[:60]))
                continue
            yield Row(number, _with_nonfinite(record))


def _broken(line: bytes, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if not line.endswith(b"\n"):
        return f"cut short: no end of line after {ascii(line[-30:])[1:]}"
    return f"not JSON: {error}"


def _with_nonfinite(record: dict[str, Any]) -> dict[str, Any]:
    named = record.get("nonfinite")
    if isinstance(named, dict):
        for key, text in named.items():
            if record.get(key) is None and text in ("nan", "inf", "-inf"):
                record[key] = float(text)
    return record


def csv_rows(path: pathlib.Path, delimiter: str) -> Rows:
    """A header, then rows; the line of a row is the one where it ends."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Damaged(reader.line_num, f"not CSV: {error}")
                continue
            if not fields:
                continue
            if header is None:
                header = [name.strip() for name in fields]
                _check_header(path, header)
            elif len(fields) != len(header):
                counts = f"{len(fields)} fields where the header has {len(header)}"
                yield Damaged(reader.line_num, counts, ascii(delimiter.join(fields)[:60]))
            else:
                yield Row(reader.line_num, dict(zip(header, fields, strict=True)))


def _check_header(path: pathlib.Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"{path}:1: column {twice[0]!r} is there twice")


def parquet_rows(path: pathlib.Path) -> Rows:
    """Rows of a Parquet file, read in batches; columns of lists and structures are passed over."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    with file:
        names = [
            field.name for field in file.schema_arrow if not pyarrow.types.is_nested(field.type)
        ]
        number = 0
        for batch in file.iter_batches(batch_size=8192, columns=names):
            columns = [column.to_pylist() for column in batch.columns]
            for values in zip(*columns, strict=True):
                yield Row(number, dict(zip(names, values, strict=True)))
                number += 1


def frame_rows(columns: Mapping[str, Any]) -> Rows:
    """Rows of a data frame or of a mapping of arrays."""
    names = list(columns)
    arrays = [_array(columns[name]) for name in names]
    for name, array in zip(names, arrays, strict=True):
        if array.shape != arrays[0].shape or array.ndim != 1:
            raise ValueError(
                f"columns must be one-dimensional and of one length, got {array.shape} for "
                f"{name!r} and {arrays[0].shape} for {names[0]!r}"
            )
    for number in range(len(arrays[0]) if arrays else 0):
        yield Row(number, {name: x[number] for name, x in zip(names, arrays, strict=True)})


def _array(values: Any) -> np.ndarray:
    """A column of a frame; what pandas takes for missing is None where NumPy has no NaN."""
    if hasattr(values, "isna") and not isinstance(values.dtype, np.dtype):
        array = np.array(values, dtype=object)
        array[np.asarray(values.isna(), bool)] = None
        return array
    return np.asarray(values)


def open_table(path: pathlib.Path) -> Source:
    """The source for a file, by its ending, which is one of ``TABLES``."""
    ending = path.suffix.lower()
    if ending in (".jsonl", ".ndjson"):
        return Source(str(path), lambda: json_lines(path))
    if ending == ".parquet":
        return Source(str(path), lambda: parquet_rows(path))
    delimiter = "\t" if ending == ".tsv" else ","
    return Source(str(path), lambda: csv_rows(path, delimiter), as_text=True)


TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
