"""Checkpoints that are written in the background and never restored unless every byte is right.

orbax writes the arrays. It has no end-to-end checksum, takes an empty directory for a checkpoint
and ignores a second save of a step, so the rest is ours. A step is a directory named by its
number::

    300/state/          the arrays, as orbax wrote them
    300/contents.json   the caller's host data; path, shape and dtype of every leaf of the state
    300/manifest.json   size and SHA-256 of every other file, sealed by a digest of its own

It is written as ``300.partial``, and gets its name when all of it, manifest last, is on the disk.
"""

import concurrent.futures
import dataclasses
import errno
import json
import logging
import math
import os
import pathlib
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxopt_suite.core.checks import check_int
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.core.files import fsync, write_atomically
from jaxopt_suite.experiments import manifest

_CONTENTS = "contents.json"
_STATE = "state"
_PARTIAL = ".partial"
_METADATA_BYTES = 4096  # per array, generously (measured: 1400), and per file
_Row = tuple[str, list[int], str]  # path, shape and dtype of a leaf
_STEP_NAME = re.compile(r"(0|[1-9][0-9]*)(\..*)?")


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint was skipped because it is incomplete or not what was written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What ``Checkpoints.restore`` found.

    Attributes:
      step: the step it was saved under.
      state: a pytree of arrays with the structure, shapes, dtypes and shardings asked for.
      host: the dict given to ``save``.
    """

    step: int
    state: Any
    host: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Use it as a context manager, or call ``close``: a save still under way when the interpreter
    exits without either is lost (and is skipped later, as any incomplete one).
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 3) -> None:
        """Opens a folder of checkpoints; it is created by the first save.

        Args:
          path: the folder.
          keep: how many of the newest intact checkpoints to keep, at least 1.

        Raises:
          NotImplementedError: if there is more than one JAX process.
        """
        check_int("keep", keep)
        if jax.process_count() > 1:
            raise NotImplementedError(
                f"checkpoints are written by one process, and this is one of {jax.process_count()}"
            )
        self._path = pathlib.Path(path).absolute()
        self._keep = keep
        self._intact: set[int] = set()  # steps this object wrote or verified
        self._pending: tuple[int, concurrent.futures.Future[str | None]] | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._unquiet = _quiet_orbax()
        self._failed = False
        # Uncompressed, so that the space a save needs is known before it starts; the mantissas of
        # trained weights hardly compress anyway.
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))

    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied to the host, so they may be donated.

        The previous save is waited for first.

        Args:
          step: the step's number, not negative.
          state: a pytree of ``jax.Array``, of any numeric dtype and shape.
          host: a dict that JSON gives back unchanged, e.g. the position of the data iterator.

        Raises:
          ValueError: if the step is saved already and intact, or the state has no elements.
          TypeError: if a leaf is no array, or ``host`` does not survive JSON.
          UserError: if the files cannot be written, now or in the previous save.
        """
        check_int("step", step, low=0)
        self.wait()
        self._refuse_existing(step)
        rows, arrays = _describe(state)
        contents = _contents(rows, host)
        partial = self._path / f"{step}{_PARTIAL}"
        try:
            self._prepare(step, partial, arrays.values())
            write_atomically(partial / _CONTENTS, contents)
            self._orbax.save(partial / _STATE, args=ocp.args.PyTreeSave(arrays))
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._failure(step, error) from error
        self._pending = (step, self._background.submit(self._finish, step, partial))

    def restore(self, abstract_state: Any) -> Restored | None:
        """Restores the newest intact checkpoint.

        Checkpoints that are incomplete or damaged are skipped, each with a
        ``DamagedCheckpointWarning`` that names its path and what is wrong.

        Args:
          abstract_state: a pytree of ``jax.ShapeDtypeStruct``. A leaf with a sharding is restored
            onto it, whatever it was saved from; one without comes back on the default device.

        Returns:
          The checkpoint, or None if there is no intact one.

        Raises:
          UserError: if the state has other leaves, shapes or dtypes than the checkpoint; or as
            ``wait`` does.
        """
        self.wait()
        for step, directory in sorted(self._entries(), reverse=True):
            fault = _fault(step, directory)
            if fault is None:
                self._intact.add(step)
                return self._load(step, directory, abstract_state)
            message = f"skipped the checkpoint {directory}: {fault}"
            warnings.warn(message, DamagedCheckpointWarning, stacklevel=2)
        return None

    def steps(self) -> list[int]:
        """The finished steps, ascending. Their bytes are verified by ``restore``, not here."""
        self.wait()
        return sorted(
            step
            for step, directory in self._entries()
            if directory.name == str(step) and (directory / manifest.MANIFEST).is_file()
        )

    def wait(self) -> None:
        """Waits until nothing is under way.

        Raises:
          UserError: if the last save failed, once, with the operating system's reason. Earlier
            checkpoints are untouched by that.
        """
        if self._pending is None:
            return
        (step, finish), self._pending = self._pending, None
        if reason := finish.result():
            self._failed = True
            raise self._failure(step, reason)

    def close(self) -> None:
        """Waits, and ends the background thread. Raises as ``wait`` does; may be called twice."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            self._orbax.close()
            if not self._failed:  # else abandoned writes still report, whenever they are collected
                self._unquiet()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _failure(self, step: int, reason: object) -> UserError:
        return UserError(f"could not save the checkpoint of step {step} in {self._path}: {reason}")

    def _entries(self) -> list[tuple[int, pathlib.Path]]:
        """Everything named like a step, finished or not: ``300``, ``300.partial``, ..."""
        try:
            found = [(_STEP_NAME.fullmatch(path.name), path) for path in self._path.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read the checkpoints in {self._path}: {error}") from error
        return [(int(match[1]), path) for match, path in found if match]

    def _refuse_existing(self, step: int) -> None:
        directory = self._path / str(step)
        if directory.exists() and _fault(step, directory) is None:
            raise ValueError(f"step {step} is saved already, in {directory}")

    def _prepare(self, step: int, partial: pathlib.Path, arrays: Collection[jax.Array]) -> None:
        """Makes the directory to write in, where an interrupted save of the step may have left one.

        A disk without room for all of it is refused here: orbax would find out halfway.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        for leftover in self._path.glob(f"{step}.*"):
            _remove(leftover)
        needed = sum(x.nbytes + _METADATA_BYTES for x in arrays) + 64 * _METADATA_BYTES
        free = shutil.disk_usage(self._path).free
        if needed > free:
            reason = f"{os.strerror(errno.ENOSPC)}, {needed} bytes needed and {free} free"
            raise OSError(errno.ENOSPC, reason)
        partial.mkdir()

    def _finish(self, step: int, partial: pathlib.Path) -> str | None:
        """In the background: waits for orbax, seals the step, names it, deletes what is too old.

        Returns:
          The reason if that failed. Not the exception: its traceback would keep alive the writes
          that orbax has abandoned.
        """
        try:
            self._orbax.wait_until_finished()
            manifest.seal(step, partial)
            directory = self._path / str(step)
            if directory.exists():
                _remove(directory)  # damaged: save() has refused an intact one
            partial.rename(directory)
            fsync(self._path)
            self._intact.add(step)
            self._prune()
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            shutil.rmtree(partial, ignore_errors=True)
            return str(error)
        return None

    def _prune(self) -> None:
        """Deletes all that is older than the oldest checkpoint to keep, damaged ones included."""
        entries = self._entries()
        self._intact &= {step for step, directory in entries if directory.name == str(step)}
        for step, directory in entries:
            if step not in self._intact and _fault(step, directory) is None:
                self._intact.add(step)
        if len(self._intact) < self._keep:
            return
        oldest = sorted(self._intact)[-self._keep]
        for step, directory in entries:
            if step < oldest:
                _remove(directory)

    def _load(self, step: int, directory: pathlib.Path, abstract_state: Any) -> Restored:
        contents = json.loads((directory / _CONTENTS).read_bytes())
        paths, treedef = jax.tree_util.tree_flatten_with_path(abstract_state)
        wanted = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
        _refuse_difference(directory, contents["leaves"], wanted)
        position = {path: str(i) for i, (path, _, _) in enumerate(contents["leaves"])}
        names = {path: position[path] for path, leaf in wanted.items() if math.prod(leaf.shape)}
        restore_args = {name: _restore_args(wanted[path]) for path, name in names.items()}
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        arrays = self._orbax.restore(directory / _STATE, args=args)
        leaves = [
            _place(arrays[names[path]] if path in names else np.zeros(leaf.shape, leaf.dtype), leaf)
            for path, leaf in wanted.items()
        ]
        return Restored(step, jax.tree.unflatten(treedef, leaves), contents["host"])


def _describe(state: Any) -> tuple[list[_Row], dict[str, jax.Array]]:
    """Path, shape and dtype of every leaf; and the leaves by position, without the empty ones.

    orbax refuses arrays without elements. It is given a flat dict, so that no container type of the
    state (named tuples, ``None``, ``optax.MaskedNode``) depends on its rules.
    """
    rows, arrays = [], {}
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state)):
        name = jax.tree_util.keystr(path)
        if not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"the state must hold numeric arrays, got {leaf!r} at {name}")
        rows.append((name, list(leaf.shape), leaf.dtype.name))
        if leaf.size:
            arrays[str(i)] = leaf
    if not arrays:
        raise ValueError(f"the state has no elements to save: {state!r}")
    return rows, arrays


def _contents(rows: list[_Row], host: Mapping[str, Any]) -> bytes:
    text = json.dumps({"host": dict(host), "leaves": rows})
    if json.loads(text)["host"] != dict(host):
        raise TypeError(f"host must be what JSON gives back (lists, string keys), got {host!r}")
    return text.encode()


def _refuse_difference(
    directory: pathlib.Path,
    saved: list[_Row],
    wanted: Mapping[str, Any],
) -> None:
    """Raises ``UserError`` naming the first leaf that differs."""
    have = {path: f"{dtype}{shape}" for path, shape, dtype in saved}
    want = {path: f"{leaf.dtype.name}{list(leaf.shape)}" for path, leaf in wanted.items()}
    for path in [*want, *have]:
        if have.get(path) != want.get(path):
            raise UserError(
                f"the checkpoint {directory} was written by another model or optimizer: {path} is "
                f"{have.get(path, 'absent')} there and {want.get(path, 'absent')} here"
            )


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if getattr(leaf, "sharding", None) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _place(array: Any, leaf: Any) -> jax.Array:
    """The array where ``leaf`` wants it; a copy, because JAX cannot donate memory NumPy owns."""
    if isinstance(array, jax.Array):
        return array
    sharding = getattr(leaf, "sharding", None)
    return jnp.array(array) if sharding is None else jax.device_put(array, sharding)


def _fault(step: int, directory: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if directory.name != str(step):
        return "its save was interrupted"
    return manifest.fault(step, directory)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _quiet_orbax() -> Callable[[], None]:
    """Keeps orbax's accounts of a failed write off stderr: the failure is raised, once, by us.

    orbax logs it several times over; asyncio then logs the other writes, which orbax has abandoned;
    and these report to an event loop that orbax has closed. Everything else passes.

    Returns:
      A function that undoes it.
    """
    loggers, previous = (
        (logging.getLogger("absl"), logging.getLogger("asyncio")),
        sys.unraisablehook,
    )

    def keep(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname and "orbax" not in record.getMessage()

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    def undo() -> None:
        for logger in loggers:
            logger.removeFilter(keep)
        if sys.unraisablehook is hook:
            sys.unraisablehook = previous

    for logger in loggers:
        logger.addFilter(keep)
    sys.unraisablehook = hook
    return undo
