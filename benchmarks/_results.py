"""Rows of measurements: where and when they were made, and the files that hold them."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable
from typing import Any

import jax

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import environment

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def stamp(command: str, *, packages: tuple[str, ...] = ("jax", "optax")) -> dict[str, Any]:
    """What every row says of its making: command, date, our commit, hardware, versions.

    Args:
      command: the command that makes the row again, without paths of this machine.
      packages: distributions whose versions matter.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in packages}
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "our_commit": git_commit(ROOT) or "not committed",
        "hardware": hardware(),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions,
    }


def git_commit(folder: pathlib.Path) -> str | None:
    """The commit checked out in ``folder``, with ``-dirty`` if tracked files differ from it.

    Measurements themselves (``benchmarks/results``) and the pages made of them do not count as a
    difference: the row about to be written must not make the next one dirty.

    Returns:
      40 hex digits, possibly with the suffix; ``None`` where there is no commit.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changed = _git(
        folder,
        *("status", "--porcelain", "--untracked-files=no", "--", "."),
        *(":!benchmarks/results", ":!docs"),
    )
    return f"{commit}-dirty" if changed else commit


def _git(folder: pathlib.Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise UserError("git says which commit was measured, and it is not installed") from error
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> str:
    """One line: processor, cores, memory, system, and JAX's device."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    device = jax.devices()[0]
    return (
        f"{environment.processor()}, {cores} cores, {gib:.0f} GiB, {platform.system()}; "
        f"JAX on {device.platform} ({device.device_kind})"
    )


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ``UserError`` for the first unknown name, with the list of those there are."""
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"no {kind} {name!r}; there are: {', '.join(known)}")


def load(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a results file, oldest first; none if there is no file yet.

    Raises:
      UserError: if it is not a JSON list of objects.
    """
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: must be a JSON list of objects")
    return rows


def append(path: pathlib.Path, row: dict[str, Any]) -> None:
    """Adds a row to a results file; a reader sees the file without it or with it."""
    text = json.dumps([*load(path), row], indent=1, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text + "\n")
    unfinished.replace(path)


def latest(rows: list[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """The last row for each value of ``key``, in the order in which the values first appear."""
    return {row[key]: row for row in rows}
