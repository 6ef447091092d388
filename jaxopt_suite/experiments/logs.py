"""The run folder: ``config.json``, ``metrics.jsonl`` and ``checkpoints/``, and the rules for each.

``metrics.jsonl`` holds one JSON object per line. A value that is not finite is stored as ``null``
and named under ``"nonfinite"``, as in ``{"step": 7, "loss": null, "nonfinite": {"loss": "nan"}}``,
so that no reader takes a diverged run for a number.

Of several processes only the first touches the folder; what it finds there, and what goes wrong,
it tells the others, so that all go on alike.
"""

import json
import math
import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.core.files import write_atomically
from jaxopt_suite.experiments.peers import Peers

_NONFINITE = "nonfinite"


class RunFolder:
    """One training run on disk; with several processes, each method is one that all of them call.

    Attributes:
      path: the folder.
      config_path: ``config.json``, what makes the run this run and no other.
      metrics_path: ``metrics.jsonl``, one record per line.
      checkpoints_path: ``checkpoints/``, for ``jaxopt_suite.experiments.checkpoints``.
    """

    def __init__(self, path: str | os.PathLike[str], peers: Peers | None = None) -> None:
        """Names a run's folder; nothing is made or read yet.

        Args:
          path: the folder.
          peers: the processes of the run; None: this one alone.
        """
        self._peers = Peers() if peers is None else peers
        self.path = pathlib.Path(path)
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints_path = self.path / "checkpoints"

    def create_or_open(self, config: Mapping[str, Any]) -> Literal["new", "existing"]:
        """Creates the folder (and its parents), or opens one that holds the same run.

        Args:
          config: JSON-able; every key is compared, so pass only what a continued run must share.

        Returns:
          ``"new"`` or ``"existing"``.

        Raises:
          UserError: if the folder holds another run (each differing key is named with both values)
            or files that are no run's, or cannot be written.
        """
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
        return self._peers.from_first(lambda: self._create_or_open(text))

    def _create_or_open(self, text: str) -> Literal["new", "existing"]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stored = self.config_path.read_text() if self.config_path.exists() else None
            if stored is None:
                self._refuse_foreign_files()
                write_atomically(self.config_path, text.encode())
            else:
                self._refuse_other_config(stored, json.loads(text))
            self.metrics_path.open("ab").close()  # an unwritable folder shows now, not hours later
        except OSError as error:
            raise UserError(f"cannot use {self.path} as a run folder: {error}") from error
        return "new" if stored is None else "existing"

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one record as one line, handed to the operating system before this returns.

        Args:
          record: ``"step"`` (an int) and any other keys. Values are numbers, strings, booleans,
            None or scalar arrays; a non-finite number is stored as the module's docstring says.

        Raises:
          TypeError: if a key is not a string or a value is not JSON-able.
          ValueError: if there is no integer ``"step"``, or a key is ``"nonfinite"``.
          UserError: if the file cannot be written, e.g. because the disk is full.
        """
        line = _encode(record)
        self._peers.from_first(lambda: self._append(line))

    def _append(self, line: bytes) -> None:
        try:
            if not self._ends_whole():
                self._rewrite(self._read())
            with self.metrics_path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise UserError(f"cannot write {self.metrics_path}: {error}") from error

    def read(self) -> list[dict[str, Any]]:
        """All records, in order; a last line torn by a crash is dropped with a warning.

        Raises:
          UserError: if any other line is corrupt (named by its number), or the file is unreadable.
        """
        return self._peers.from_first(self._read)

    def _read(self) -> list[dict[str, Any]]:
        try:
            lines = self.metrics_path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {self.metrics_path}: {error}") from error
        if not lines[-1]:
            lines.pop()
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(_decode(line))
            except ValueError as error:
                where = f"line {number} of {self.metrics_path}"
                if number < len(lines):
                    raise UserError(f"{where} is not a metrics record: {error}") from error
                warnings.warn(f"dropped {where}, cut short by a crash", stacklevel=2)
        return records

    def truncate_to(self, step: int) -> None:
        """Keeps the records up to and including ``step``, atomically.

        Raises:
          UserError: as ``read`` does, or if the file cannot be written.
        """
        self._peers.from_first(lambda: self._truncate_to(step))

    def _truncate_to(self, step: int) -> None:
        kept = [record for record in self._read() if record["step"] <= step]
        try:
            self._rewrite(kept)
        except OSError as error:
            raise UserError(f"cannot write {self.metrics_path}: {error}") from error

    def _rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        write_atomically(self.metrics_path, b"".join(map(_line, records)))

    def _ends_whole(self) -> bool:
        """Whether the next line can simply be appended: the file is empty or ends a line."""
        if not self.metrics_path.exists() or not self.metrics_path.stat().st_size:
            return True
        with self.metrics_path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _refuse_foreign_files(self) -> None:
        for path in (self.metrics_path, self.checkpoints_path):
            if path.exists():
                raise UserError(
                    f"{self.path} has {path.name} but no {self.config_path.name} that says which "
                    "run it belongs to; give another output folder"
                )

    def _refuse_other_config(self, stored: str, config: dict[str, Any]) -> None:
        try:
            old = json.loads(stored)
        except ValueError as error:
            raise UserError(f"{self.config_path} is not valid JSON: {error}") from error
        if not isinstance(old, dict):
            raise UserError(f"{self.config_path} must hold a JSON object, got {stored.strip()!r}")
        differing = [
            f"{key} is {_show(old, key)} there and {_show(config, key)} here"
            for key in {**config, **old}
            if _show(old, key) != _show(config, key)
        ]
        if differing:
            raise UserError(
                f"{self.path} holds another run: {'; '.join(differing)}; "
                "give the same settings to continue it, or another output folder"
            )


def _show(config: Mapping[str, Any], key: str) -> str:
    return json.dumps(config[key], sort_keys=True) if key in config else "absent"


def _plain(value: Any) -> Any:
    """A Python scalar for a scalar array; anything else unchanged."""
    return value.item() if getattr(value, "shape", None) == () else value


def _encode(record: Mapping[str, Any]) -> bytes:
    """One line of ``metrics.jsonl``."""
    for key in record:
        if not isinstance(key, str):
            raise TypeError(f"keys of a record must be strings, got {key!r}")
    if _NONFINITE in record:
        raise ValueError(f"the key {_NONFINITE!r} is written by the log itself; got {record!r}")
    values = {key: _plain(value) for key, value in record.items()}
    _check_step(values)
    nonfinite = {
        key: str(value)
        for key, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    values |= dict.fromkeys(nonfinite)
    return _line(values | {_NONFINITE: nonfinite} if nonfinite else values)


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any]:
    """The record of one line.

    Raises:
      ValueError: if the line is not a JSON object with an integer ``"step"`` and finite numbers.
    """
    record = json.loads(line.decode(), parse_constant=_refuse_constant)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {line[:80]!r}")
    _check_step(record)
    return record


def _check_step(record: Mapping[str, Any]) -> None:
    step = record.get("step")
    if isinstance(step, bool) or not isinstance(step, int):
        raise ValueError(f'a record needs an integer "step", got {step!r}')


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
