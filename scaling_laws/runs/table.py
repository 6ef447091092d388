"""A table of runs: columns, where each row was read, what was left out and how things count."""

import dataclasses
import hashlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

_SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A row that is not used.

    Attributes:
      where: ``"file:line"``.
      reason: in words.
      value: the offending value as it stands there; empty if the reason is not one value's.
    """

    where: str
    reason: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class BadRuns(ValueError):
    """Rows that cannot be used, where the user has not allowed to drop them.

    Attributes:
      count: how many there are.
      bad: the first thousand of them.
    """

    def __init__(self, bad: Sequence[Dropped], count: int) -> None:
        self.bad, self.count = tuple(bad), count
        more = f"\n  and {count - _SHOWN} more" if count > _SHOWN else ""
        rows = "1 row" if count == 1 else f"{count} rows"
        super().__init__(
            f"{rows} cannot be used:\n  "
            + "\n  ".join(map(str, bad[:_SHOWN]))
            + more
            + "\nCorrect the data, or give on_bad='drop' to go on without these rows"
        )


@dataclasses.dataclass(frozen=True)
class Conventions:
    """How the numbers of a table are counted; None: nobody said.

    Attributes:
      n_rule: how ``N`` is counted, a name of ``conventions.N_RULES`` or the user's own.
      flop_rule: how ``C`` is counted, a name of ``conventions.FLOP_RULES`` or the user's own.
      loss_kind: such as ``"train"`` or ``"val"``.
      sources: for each column that was read, its name in the files.
      derived: for each column that was computed, how.
    """

    n_rule: str | None = None
    flop_rule: str | None = None
    loss_kind: str | None = None
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)
    derived: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Origins(Sequence[str]):
    """Where each row was read, kept in twelve bytes a row: a sequence of ``"file:line"``."""

    def __init__(self, files: Sequence[str], file: np.ndarray, line: np.ndarray) -> None:
        """Makes the sequence.

        Args:
          files: names.
          file: int32 ``[rows]``, indices into ``files``.
          line: int64 ``[rows]``.
        """
        self.files = tuple(files)
        self._file, self._line = file, line

    def __len__(self) -> int:
        return len(self._file)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Origins": ...
    def __getitem__(self, index: int | slice) -> "str | Origins":
        if isinstance(index, slice):
            return self.take(index)
        return f"{self.files[self._file[index]]}:{self._line[index]}"

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def take(self, index: Any) -> "Origins":
        """Those of some rows: a slice, a mask or indices."""
        return Origins(self.files, self._file[index], self._line[index])


@dataclasses.dataclass(frozen=True, eq=False)
class Runs:
    """A table of runs; :func:`load_runs` makes it. Arrays are read-only.

    Attributes:
      columns: float64 ``[rows]``; text (``run_id``, ``optimizer``, ...) is object ``[rows]`` of
        str. A descriptive value that a row lacks is NaN or ``""``; ``N``, ``D``, ``U``, ``C`` and
        ``loss``, where they are columns, and every column that the caller named, are never missing.
      where: ``"file:line"`` of each row. Rows of Parquet files and frames count from 0, others from
        1.
      dropped: what was left out.
      conventions: how the numbers are counted.
    """

    columns: Mapping[str, np.ndarray]
    where: Origins
    dropped: tuple[Dropped, ...] = ()
    conventions: Conventions = dataclasses.field(default_factory=Conventions)

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if values.shape != (len(self.where),):
                raise ValueError(
                    f"column {name!r} must have shape {(len(self.where),)}, got {values.shape}"
                )
            values.flags.writeable = False
        object.__setattr__(self, "columns", types.MappingProxyType(dict(self.columns)))

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column.

        Raises:
          KeyError: if there is none of that name, with the list of those there are.
        """
        if name not in self.columns:
            raise KeyError(f"no column {name!r} in these runs; they have {', '.join(self.columns)}")
        return self.columns[name]

    def select(self, mask: Any, *, reason: str = "not selected") -> "Runs":
        """The rows where ``mask`` is true; the others are added to ``dropped``.

        Args:
          mask: bool ``[rows]``.
          reason: why the others are left out.

        Raises:
          TypeError: if the mask is not boolean.
          ValueError: if it has another length.
        """
        mask = np.asarray(mask)
        if mask.dtype != bool:
            raise TypeError(f"mask must be boolean, got {mask.dtype}")
        if mask.shape != (len(self),):
            raise ValueError(f"mask must have shape {(len(self),)}, got {mask.shape}")
        left = tuple(Dropped(where, reason) for where in self.where.take(~mask))
        return dataclasses.replace(
            self,
            columns={name: values[mask] for name, values in self.columns.items()},
            where=self.where.take(mask),
            dropped=self.dropped + left,
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the rows in use: columns by name, values in the order of the rows."""
        hashed = hashlib.sha256()
        for name in sorted(self.columns):
            values = self.columns[name]
            hashed.update(f"{name} {values.dtype.str} {len(values)}\n".encode())
            if values.dtype == object:
                for text in values:
                    hashed.update(f"{len(text)} {text}\n".encode())
            else:
                hashed.update(np.ascontiguousarray(values, "<f8").tobytes())
        return hashed.hexdigest()

    def to_frame(self) -> Any:
        """A ``pandas.DataFrame`` of the columns, and ``where``."""
        import pandas

        return pandas.DataFrame({**self.columns, "where": list(self.where)})

    def summary(self) -> str:
        """What is in the table and what is not, as text."""
        kept = "1 row" if len(self) == 1 else f"{len(self)} rows"
        lines = [f"{kept} from {len(self.where.files)} file(s); digest {self.digest[:16]}"]
        lines += [f"  {name}: {_range(values)}" for name, values in self.columns.items()]
        for name in ("n_rule", "flop_rule", "loss_kind"):
            lines.append(f"  {name}: {getattr(self.conventions, name) or 'not stated'}")
        lines += [f"  {name} = {how}" for name, how in self.conventions.derived.items()]
        if self.dropped:
            lines.append(f"left out: {len(self.dropped)}")
            lines += [f"  {each}" for each in self.dropped[:_SHOWN]]
            if len(self.dropped) > _SHOWN:
                lines.append(f"  and {len(self.dropped) - _SHOWN} more")
        return "\n".join(lines)


def _range(values: np.ndarray) -> str:
    if values.dtype == object:
        return f"{len(set(values))} different"
    known = values[~np.isnan(values)]
    if not known.size:
        return "none known"
    missing = f", {len(values) - known.size} missing" if known.size < len(values) else ""
    return f"{known.min():.6g} to {known.max():.6g}{missing}"
