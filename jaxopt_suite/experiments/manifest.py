"""Seals: a directory with a manifest of every file in it, so that any changed byte shows.

The work of reading every byte can be shared: process ``index`` of ``count`` reads every
``count``-th file.
"""

import hashlib
import json
import pathlib
from typing import Any

from jaxopt_suite.core.files import fsync, write_atomically

MANIFEST = "manifest.json"
_Entries = dict[str, list[Any]]  # size and SHA-256 by relative path


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


def entries(directory: pathlib.Path, *, index: int = 0, count: int = 1) -> _Entries:
    """What the manifest will say of this process's share of the files, once they are on the disk.

    Raises:
      OSError: if they cannot be read.
    """
    share = list(_files(directory).items())[index::count]
    for _, path in share:
        fsync(path)
    return {name: [path.stat().st_size, _digest(path)] for name, path in share}


def seal(step: int, directory: pathlib.Path, files: _Entries) -> None:
    """Writes the manifest, once every folder is on the disk.

    Args:
      step: the step it is of.
      directory: what to seal.
      files: the entries of all its files, from all processes.

    Raises:
      OSError: if the manifest cannot be written, or an entry is missing.
    """
    if odd := sorted(files.keys() ^ _files(directory).keys()):
        raise OSError(f"the processes see different files in {directory}: {odd[0]}")
    for path in (p for p in directory.rglob("*") if p.is_dir()):
        fsync(path)
    write_atomically(directory / MANIFEST, _render(step, dict(sorted(files.items()))))


def fault(step: int, directory: pathlib.Path, *, index: int = 0, count: int = 1) -> str | None:
    """What is wrong with a sealed directory, or None if it is to the last byte what was sealed.

    With a ``count`` above 1 the bytes of this process's share are read, and the rest for its names.
    """
    try:
        return _difference(step, directory, index, count)
    except FileNotFoundError as error:
        return f"{error.filename} is missing: its save was interrupted, or the file deleted"
    except OSError as error:
        return f"it cannot be read: {error}"


def _difference(step: int, directory: pathlib.Path, index: int, count: int) -> str | None:
    text = (directory / MANIFEST).read_bytes()
    try:
        sealed_files = json.loads(text)["files"]
        sealed = text == _render(step, sealed_files)
    except (ValueError, TypeError, KeyError):
        sealed = False
    if not sealed:
        return f"{MANIFEST} is damaged or belongs to another step"
    files = _files(directory)
    if odd := sorted(files.keys() ^ sealed_files.keys()):
        return f"{odd[0]} is {'not in the manifest' if odd[0] in files else 'missing'}"
    for name in list(sealed_files)[index::count]:
        size, digest = sealed_files[name]
        if (found := files[name].stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
        if _digest(files[name]) != digest:
            return f"{name} does not have the bytes that were written (SHA-256 differs)"
    return None
