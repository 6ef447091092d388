"""Seals: a directory with a manifest of every file in it, so that any changed byte shows."""

import hashlib
import json
import pathlib
from typing import Any

from jaxopt_suite.core.files import fsync, write_atomically

MANIFEST = "manifest.json"


def _files(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Every file below the directory but the manifest, by its relative path."""
    found = (p for p in sorted(directory.rglob("*")) if p.is_symlink() or not p.is_dir())
    files = {path.relative_to(directory).as_posix(): path for path in found}
    files.pop(MANIFEST, None)
    return files


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _render(step: int, files: Any) -> bytes:
    """The manifest's only valid bytes, so that a change of any one of them shows."""
    body = {"files": files, "step": step}
    seal = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "seal": seal}, indent=1).encode()


def seal(step: int, directory: pathlib.Path) -> None:
    """Writes the manifest, once every other file and folder is on the disk.

    Raises:
      OSError: if the files cannot be read or the manifest not written.
    """
    files = _files(directory)
    for path in [*files.values(), *(p for p in directory.rglob("*") if p.is_dir())]:
        fsync(path)
    entries = {name: [path.stat().st_size, _digest(path)] for name, path in files.items()}
    write_atomically(directory / MANIFEST, _render(step, entries))


def fault(step: int, directory: pathlib.Path) -> str | None:
    """What is wrong with a sealed directory, or None if it is to the last byte what was sealed."""
    try:
        return _difference(step, directory)
    except FileNotFoundError as error:
        return f"{error.filename} is missing: its save was interrupted, or the file deleted"
    except OSError as error:
        return f"it cannot be read: {error}"


def _difference(step: int, directory: pathlib.Path) -> str | None:
    text = (directory / MANIFEST).read_bytes()
    try:
        entries = json.loads(text)["files"]
        sealed = text == _render(step, entries)
    except (ValueError, TypeError, KeyError):
        sealed = False
    if not sealed:
        return f"{MANIFEST} is damaged or belongs to another step"
    files = _files(directory)
    if odd := sorted(files.keys() ^ entries.keys()):
        return f"{odd[0]} is {'not in the manifest' if odd[0] in files else 'missing'}"
    for name, (size, digest) in entries.items():
        if (found := files[name].stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
        if _digest(files[name]) != digest:
            return f"{name} does not have the bytes that were written (SHA-256 differs)"
    return None
