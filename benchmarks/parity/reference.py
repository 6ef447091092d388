"""The official code: is a folder a clone of it, which one, and its import by location."""

import contextlib
import importlib.util
import io
import pathlib
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import _results
from benchmarks.parity.compare import Method
from jaxopt_suite.core.errors import UserError

_GITHUB = re.compile(r"github\.com[:/]([\w.-]+/[\w.-]+?)(?:\.git)?/?$")


def check(method: Method, path: pathlib.Path) -> str:
    """Checks that ``path`` is a clone of the method's official repository.

    Returns:
      The commit that is checked out.

    Raises:
      UserError: if there is no such folder, or it lacks the files or the git history.
    """
    if not path.is_dir():
        raise UserError(f"--reference {path}: no such folder")
    missing = [name for name in method.marks if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"--reference {path}: not a clone of {method.repository}: it has no {missing[0]}"
        )
    own_root = _results._git(path, "rev-parse", "--show-toplevel")
    commit = _results.git_commit(path)
    if commit is None or own_root is None or pathlib.Path(own_root) != path.resolve():
        raise UserError(
            f"--reference {path}: not the root of a git clone, so its commit is unknown: "
            f"git clone https://github.com/{method.repository}"
        )
    return commit


def repository(method: Method, path: pathlib.Path, given: str | None) -> str:
    """``owner/name``: as given, else of the clone's remote on GitHub, else the known one."""
    if given is not None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
            raise UserError(f"--repository must be owner/name, got {given!r}")
        return given
    found = _GITHUB.search(_results._git(path, "remote", "get-url", "origin") or "")
    return found.group(1) if found else method.repository


def load(method: Method, path: pathlib.Path) -> Any:
    """Imports the official module from its file.

    Raises:
      UserError: if a package it needs is not installed.
    """
    missing = [name for name in method.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"the official code of {method.name} needs {', '.join(missing)}: "
            f"python -m pip install {' '.join(missing)}"
        )
    file = path / method.module
    spec = importlib.util.spec_from_file_location(f"official_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"--reference {path}: cannot import {method.module}")
    module = importlib.util.module_from_spec(spec)
    with _importing_from(path), _standing_in(method.stand_ins), quiet():
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _standing_in(names: Mapping[str, Sequence[str]]) -> Iterator[None]:
    """Empty modules with empty classes, which go again; what else is imported meanwhile stays."""
    for name, classes in names.items():
        sys.modules[name] = types.ModuleType(name)
        for each in classes:
            setattr(sys.modules[name], each, type(each, (), {}))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


@contextlib.contextmanager
def _importing_from(path: pathlib.Path) -> Iterator[None]:
    """The clone first on the path, for its imports of its own files; leaves no bytecode in it."""
    writes_nothing = sys.dont_write_bytecode
    sys.path.insert(0, str(path))
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.path.remove(str(path))
        sys.dont_write_bytecode = writes_nothing


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallows what the official code prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
