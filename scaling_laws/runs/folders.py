"""What lies in a folder: our own runs, event files, or tables."""

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from jaxopt_suite.scaling_laws.runs import events
from jaxopt_suite.scaling_laws.runs.sources import (
    TABLES,
    Damaged,
    Row,
    Rows,
    Source,
    json_lines,
    open_table,
)

_CONFIG, _METRICS = "config.json", "metrics.jsonl"
_FINITE = ("loss", "val_loss", "grad_norm")  # of a run that has not diverged
_FF_MATRICES = 3  # of the gated feed-forward layer that all our models have

_OUR_COLUMNS = {
    "run_id": "run_id",
    "N": "n_params",
    "D": "tokens",
    "loss": "val_loss",
    "lr": "learning_rate",  # of the configuration; each record has its own "lr"
}


def open_path(path: pathlib.Path, *, n_rule: str | None) -> list[Source]:
    """The sources under a path, in the order of their names.

    In a folder, however deep: our own run folders if there are any, else event files, else tables.

    Args:
      path: a file or a folder.
      n_rule: how ``N`` is wanted, which our own runs have as ``"total"`` and as sizes.

    Raises:
      FileNotFoundError: if there is no such path.
      ValueError: if there is nothing to read, or the file is of another kind.
    """
    if path.is_dir():
        return _in_folder(path, n_rule)
    if not path.exists():
        raise FileNotFoundError(f"path {str(path)!r} does not exist")
    if path.match(events.PATTERN):
        return [_event_source(path, path.parent.name)]
    if path.suffix.lower() not in TABLES:
        raise ValueError(
            f"path must be a folder, a TensorBoard event file or end in {', '.join(TABLES)}, got "
            f"{str(path)!r}"
        )
    return [open_table(path)]


def _in_folder(folder: pathlib.Path, n_rule: str | None) -> list[Source]:
    runs, written, tables = [], [], []
    for path in _walk(folder):
        if path.is_dir():
            runs.append(path)
        elif path.match(events.PATTERN):
            written.append(path)
        elif path.suffix.lower() in TABLES:
            tables.append(path)
    if runs:
        return [_run_source(path, _name(path, folder), n_rule) for path in runs]
    if written:
        return [_event_source(path, _name(path.parent, folder)) for path in written]
    if tables:
        return [open_table(path) for path in tables]
    raise ValueError(
        f"folder {str(folder)!r} has no runs: no folder with {_CONFIG} and {_METRICS}, no "
        f"{events.PATTERN}, no file that ends in {', '.join(TABLES)}"
    )


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Run folders and all files that are in none, in the order of their names."""
    for where, folders, files in os.walk(folder):
        here = pathlib.Path(where)
        if _CONFIG in files and _METRICS in files:
            folders.clear()
            yield here
            continue
        folders.sort()
        yield from (here / name for name in sorted(files))


def _name(path: pathlib.Path, folder: pathlib.Path) -> str:
    relative = path.relative_to(folder).as_posix()
    return folder.resolve().name if relative == "." else relative


def _event_source(path: pathlib.Path, run_id: str) -> Source:
    return Source(str(path), lambda: events.event_rows(path, run_id))


def _run_source(path: pathlib.Path, run_id: str, n_rule: str | None) -> Source:
    """One of our runs. Of the two ways to have N, the count of all parameters or the sizes."""
    counted = n_rule in (None, "total")
    defaults = {name: key for name, key in _OUR_COLUMNS.items() if counted or name != "N"}
    return Source(
        str(path / _METRICS),
        lambda: _run_rows(path, run_id, counted=counted),
        defaults=defaults,
        conventions={"N_rule": "total"} if counted else {},
    )


def _run_rows(path: pathlib.Path, run_id: str, *, counted: bool) -> Rows:
    """The records of a run, each with what its configuration says."""
    facts = _facts(path / _CONFIG) | {"run_id": run_id}
    if not counted:
        facts.pop("n_params", None)
    steps = facts.get("steps")
    for row in json_lines(path / _METRICS):
        if isinstance(row, Damaged):
            # A run that was killed while it wrote goes on from there: no mistake of anybody's.
            yield Row(row.line, {"run_id": run_id}, row.reason) if row.torn else row
            continue
        record = row.values
        finished = {"decay_finished": record.get("step") == steps}
        yield Row(row.line, {**facts, **record, **finished}, _diverged(record))


def _diverged(record: Mapping[str, Any]) -> str:
    values = {key: record[key] for key in _FINITE if isinstance(record.get(key), float)}
    bad = [f"{key} is {value:g}" for key, value in values.items() if not math.isfinite(value)]
    return f"diverged at step {record.get('step')}: {', '.join(bad)}" if bad else ""


def _facts(path: pathlib.Path) -> dict[str, Any]:
    """The configuration of a run, and its model's sizes beside the rest.

    Raises:
      ValueError: if it is not a JSON object.
    """
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {ascii(config)[:60]}")
    sizes = config.pop("model", None)
    if isinstance(sizes, dict):
        config |= sizes | {"ff_matrices": _FF_MATRICES}
    if "batch_size" in config and "seq_len" in config:
        config["batch_tokens"] = config["batch_size"] * config["seq_len"]
    return config
