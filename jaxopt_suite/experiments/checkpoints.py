"""Checkpoints that are written in the background and never restored unless every byte is right.

orbax writes the arrays. It has no end-to-end checksum, takes an empty directory for a checkpoint
and ignores a second save of a step, so the rest is ours. A step is a directory named by its
number::

    300/state/          the arrays, as orbax wrote them
    300/contents.json   the caller's host data; path, shape and dtype of every leaf of the state
    300/manifest.json   size and SHA-256 of every other file, sealed by a digest of its own

It is written as ``300.partial``, and gets its name when all of it, manifest last, is on the disk.

Several processes write one checkpoint together, each its part of the arrays, into a folder that all
of them see; process 0 does the rest. Every call is then one that all of them make.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxopt_suite.core.checks import check_int
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.core.files import fsync, write_atomically
from jaxopt_suite.experiments import leaves, manifest
from jaxopt_suite.experiments.peers import Peers
from jaxopt_suite.experiments.quiet import quiet_orbax
from jaxopt_suite.experiments.votes import Rejected, Votes

_CONTENTS = "contents.json"
_STATE = "state"
_PARTIAL = ".partial"
_VOTES = ".votes-"  # and the step; no name of a step, so that restore passes over it
_TIMEOUT = 1200  # seconds that a process waits in the background for the others; as in orbax
_METADATA_BYTES = 4096  # per array, generously (measured: 1400), and per file
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
      workers: how many it was saved with, where ``restore`` was told which leaves are theirs.
    """

    step: int
    state: Any
    host: dict[str, Any]
    workers: int | None = None


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
        """
        check_int("keep", keep)
        self._path = pathlib.Path(path).absolute()
        self._keep = keep
        self._intact: set[int] = set()  # steps this object wrote or verified
        self._peers = Peers.of_this_run()
        self._votes = Votes(self._path, self._peers, timeout=_TIMEOUT)  # on the save under way
        self._pending: tuple[int, concurrent.futures.Future[str | None]] | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._unquiet = quiet_orbax()
        self._failed = False
        # Uncompressed, so that the space a save needs is known before it starts; the mantissas of
        # trained weights hardly compress anyway.
        processes = ocp.options.MultiprocessingOptions(
            # Named, so that orbax meets at barriers with a time limit instead of on the devices.
            active_processes=set(range(self._peers.count)) if self._peers.count > 1 else None,
            barrier_sync_key_prefix=str(self._path),
        )
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=processes),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_TIMEOUT, barrier_sync_fn=self._meet
            ),
            multiprocessing_options=processes,
        )

    def save(self, step: int, state: Any, host: Mapping[str, Any]) -> None:
        """Starts saving; returns once the arrays are copied to the host, so they may be donated.

        The previous save is waited for first.

        Args:
          step: the step's number, not negative.
          state: a pytree of ``jax.Array``, of any numeric dtype and shape; with several processes,
            each over devices of all of them.
          host: a dict that JSON gives back unchanged, e.g. the position of the data iterator.

        Raises:
          ValueError: if the step is saved already and intact, or the state has no elements.
          TypeError: if a leaf is no array, or ``host`` does not survive JSON.
          UserError: if the files cannot be written, now or in the previous save.
        """
        check_int("step", step, low=0)
        self.wait()
        rows, arrays = leaves.describe(state, across_processes=self._peers.count > 1)
        contents = leaves.contents(rows, host)
        partial = self._path / f"{step}{_PARTIAL}"
        self._peers.from_first(lambda: self._begin(step, partial, arrays.values(), contents))
        self._votes = Votes(self._path / f"{_VOTES}{step}", self._peers, timeout=_TIMEOUT)
        self._refuse_unshared(partial)
        failure = self._start(partial, arrays)
        self._pending = (step, self._background.submit(self._finish, step, partial, failure))
        if self._peers.any(failure):
            self.wait()  # raises

    def restore(self, abstract_state: Any, *, of_workers: Any = None) -> Restored | None:
        """Restores the newest intact checkpoint.

        Checkpoints that are incomplete or damaged are skipped, each with a
        ``DamagedCheckpointWarning`` that names its path and what is wrong.

        Args:
          abstract_state: a pytree of ``jax.ShapeDtypeStruct``. A leaf with a sharding is restored
            onto it, whatever mesh and however many processes it was saved from; one without comes
            back on the default device (of each process).
          of_workers: a tree of bools like the state: whether the first axis of a leaf is that of
            workers, of whom there may have been more or fewer. Those who remain get what was
            theirs, and those who are new get zeros; ``joining`` gives them a beginning. None: no
            leaf's is.

        Returns:
          The checkpoint, or None if there is no intact one.

        Raises:
          UserError: if the state has other leaves, shapes or dtypes than the checkpoint; or as
            ``wait`` does.
        """
        self.wait()
        for step, name in self._peers.from_first(self._newest_first):
            directory = self._path / name
            share = {"index": self._peers.index, "count": self._peers.count}
            faults = self._peers.gather(_fault(step, directory, **share))
            fault = next(filter(None, faults), None)
            if fault is None:
                self._intact.add(step)
                return self._load(step, directory, abstract_state, of_workers)
            message = f"skipped the checkpoint {directory}: {fault}"
            warnings.warn(message, DamagedCheckpointWarning, stacklevel=2)
        return None

    def steps(self) -> list[int]:
        """The finished steps, ascending. Their bytes are verified by ``restore``, not here."""
        self.wait()
        return self._peers.from_first(self._finished)

    def wait(self) -> None:
        """Waits until nothing is under way.

        Raises:
          UserError: if the last save failed, once, with the operating system's reason. Earlier
            checkpoints are untouched by that.
        """
        self._settle(self._peers)

    def close(self) -> None:
        """Waits, and ends the background thread. Raises as ``wait`` does; may be called twice."""
        self._close(self._peers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # An error may be this process's alone: then the others do not come to talk about the save.
        self._close(self._peers if kind is None else Peers())

    def _close(self, peers: Peers) -> None:
        try:
            self._settle(peers)
        finally:
            self._background.shutdown()
            self._orbax.close()
            if not self._failed:  # else abandoned writes still report, whenever they are collected
                self._unquiet()

    def _settle(self, peers: Peers) -> None:
        """Waits for the save under way; raises on all of ``peers`` if it failed on one."""
        if self._pending is None:
            return
        (step, finish), self._pending = self._pending, None
        reasons = peers.gather(finish.result())
        if self._peers.index == 0:
            shutil.rmtree(self._path / f"{_VOTES}{step}", ignore_errors=True)
        if all(reason is None for reason in reasons):
            return
        self._failed = True
        own = [
            f"process {index}: {reason}" if peers.count > 1 else reason
            for index, reason in enumerate(reasons)
            if reason
        ]
        raise self._failure(step, "; ".join(own) or "another process could not write its part")

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

    def _newest_first(self) -> list[tuple[int, str]]:
        return sorted(((step, path.name) for step, path in self._entries()), reverse=True)

    def _finished(self) -> list[int]:
        return sorted(
            step
            for step, directory in self._entries()
            if directory.name == str(step) and (directory / manifest.MANIFEST).is_file()
        )

    def _refuse_existing(self, step: int) -> None:
        directory = self._path / str(step)
        if directory.exists() and _fault(step, directory) is None:
            raise ValueError(f"step {step} is saved already, in {directory}")

    def _begin(
        self, step: int, partial: pathlib.Path, arrays: Collection[jax.Array], contents: bytes
    ) -> None:
        """Makes what is not the arrays; on process 0 alone."""
        self._refuse_existing(step)
        try:
            self._prepare(step, partial, arrays)
            write_atomically(partial / _CONTENTS, contents)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise self._failure(step, error) from error

    def _prepare(self, step: int, partial: pathlib.Path, arrays: Collection[jax.Array]) -> None:
        """Makes the directory to write in, where an interrupted save of the step may have left one.

        A disk without room for all of it is refused here: orbax would find out halfway.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        for leftover in [*self._path.glob(f"{step}.*"), *self._path.glob(f"{_VOTES}*")]:
            _remove(leftover)
        needed = sum(x.nbytes + _METADATA_BYTES for x in arrays) + 64 * _METADATA_BYTES
        free = shutil.disk_usage(self._path).free
        if needed > free:
            reason = f"{os.strerror(errno.ENOSPC)}, {needed} bytes needed and {free} free"
            raise OSError(errno.ENOSPC, reason)
        partial.mkdir()
        if self._peers.count > 1:
            (self._path / f"{_VOTES}{step}").mkdir()

    def _refuse_unshared(self, partial: pathlib.Path) -> None:
        sees = self._peers.gather(partial.is_dir())
        if not all(sees):
            raise UserError(
                f"process {sees.index(False)} does not see {partial}, which process 0 has made: "
                "checkpoints need a folder that all processes share"
            )

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """A barrier of orbax's, in its background thread; also says that all is well so far."""
        del key, timeout_ms
        self._votes.cast()

    def _start(self, partial: pathlib.Path, arrays: Mapping[str, jax.Array]) -> str | None:
        """Has orbax copy the arrays and begin to write them; the reason if that failed."""
        try:
            self._orbax.save(partial / _STATE, args=ocp.args.PyTreeSave(dict(arrays)))
        except OSError as error:
            return str(error)
        return None

    def _finish(self, step: int, partial: pathlib.Path, failure: str | None) -> str | None:
        """In the background: waits for orbax, seals the step, names it, deletes what is too old.

        Returns:
          None if that went well, the reason if not, empty if another process knows it. Not the
          exception: its traceback would keep alive the writes that orbax has abandoned.
        """
        try:
            if failure is not None:
                raise OSError(failure)
            self._orbax.wait_until_finished()  # all have written; process 0 has put it together
            share = {"index": self._peers.index, "count": self._peers.count}
            shares = self._votes.cast(manifest.entries(partial, **share), last=True)
            if self._peers.index == 0:
                self._publish(step, partial, shares)
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as error:
            return self._abandon(partial, error)  # TensorStore's are ValueErrors
        return None

    def _publish(self, step: int, partial: pathlib.Path, shares: list[dict[str, Any]]) -> None:
        """Gives the step its name, when every process has said what it read of the files."""
        manifest.seal(step, partial, dict(collections.ChainMap(*shares)))
        directory = self._path / str(step)
        if directory.exists():
            _remove(directory)  # damaged: save() has refused an intact one
        partial.rename(directory)
        fsync(self._path)
        self._intact.add(step)
        self._prune()

    def _abandon(self, partial: pathlib.Path, error: Exception) -> str:
        with contextlib.suppress(OSError):
            self._votes.withdraw()
        if self._peers.index == 0:
            shutil.rmtree(partial, ignore_errors=True)
        return "" if isinstance(error, Rejected) else str(error)

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

    def _load(
        self, step: int, directory: pathlib.Path, abstract_state: Any, of_workers: Any
    ) -> Restored:
        contents = json.loads((directory / _CONTENTS).read_bytes())
        paths, treedef = jax.tree_util.tree_flatten_with_path(abstract_state)
        wanted = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
        marks = [False] * len(wanted) if of_workers is None else jax.tree.leaves(of_workers)
        own = {path for path, mark in zip(wanted, marks, strict=True) if mark}
        leaves.refuse_difference(directory, contents["leaves"], wanted, own)
        position = {path: str(i) for i, (path, _, _) in enumerate(contents["leaves"])}
        names = {path: position[path] for path, leaf in wanted.items() if math.prod(leaf.shape)}
        restore_args = {
            name: leaves.restore_args(wanted[path], of_workers=path in own)
            for path, name in names.items()
        }
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        arrays = self._orbax.restore(directory / _STATE, args=args)
        placed = [
            leaves.place(arrays[names[path]], leaf) if path in names else leaves.empty(leaf)
            for path, leaf in wanted.items()
        ]
        return Restored(
            step=step,
            state=jax.tree.unflatten(treedef, placed),
            host=contents["host"],
            workers=leaves.count_workers(contents["leaves"], own),
        )


def _fault(step: int, directory: pathlib.Path, *, index: int = 0, count: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None; with a ``count``, as far as this process reads."""
    if directory.name != str(step):
        return "its save was interrupted"
    return manifest.fault(step, directory, index=index, count=count)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
