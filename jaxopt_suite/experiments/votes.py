"""Consent, round by round, between processes that write one directory in the background."""

import json
import pathlib
from typing import Any

import orbax.checkpoint as ocp

from jaxopt_suite.core.files import write_atomically
from jaxopt_suite.experiments.peers import Peers


class Rejected(OSError):
    """Another process did not do its part; it knows why."""


class Votes:
    """The rounds of one task.

    In a round each process leaves a small file in a folder that they share, and waits for the
    others at a barrier of the coordination service: the devices may be busy with a training step,
    so there are no collectives. A process that did not do its part comes to the barrier without
    a file, which a full disk does not prevent, and ends the task for all.
    """

    def __init__(self, folder: pathlib.Path, peers: Peers, *, timeout: float) -> None:
        """Begins before the first round.

        Args:
          folder: exists if there is more than one process, and is empty.
          peers: who votes.
          timeout: seconds that a process waits for the others in each round.
        """
        self._folder = folder
        self._peers = peers
        self._milliseconds = int(timeout * 1000)
        self._round = 0
        self._open = True

    def cast(self, data: Any = None, *, last: bool = False) -> list[Any]:
        """Says that this process has done its part, and waits until all have.

        Args:
          data: what to tell the others; anything that survives JSON.
          last: whether no round follows, so that whoever fails later has nobody to tell.

        Returns:
          The data of every process, by its index.

        Raises:
          Rejected: if another process has withdrawn.
          OSError: if the vote cannot be written, or the others do not come in time.
        """
        if self._peers.count == 1:
            return [data]
        write_atomically(self._file(self._peers.index), json.dumps(data).encode())
        self._meet()
        try:
            votes = [json.loads(self._file(i).read_bytes()) for i in range(self._peers.count)]
        except FileNotFoundError as error:
            self._open = False
            raise Rejected(f"another process did not do its part: no {error.filename}") from error
        self._round += 1
        self._open = not last
        return votes

    def withdraw(self) -> None:
        """Says that this process cannot do its part, unless the task has ended already."""
        if self._peers.count == 1 or not self._open:
            return
        self._file(self._peers.index).unlink(missing_ok=True)
        self._meet()
        self._open = False

    def _file(self, index: int) -> pathlib.Path:
        return self._folder / f"{self._round}.{index}.json"

    def _meet(self) -> None:
        barrier = ocp.multihost.get_barrier_sync_fn()
        try:
            barrier(key=f"{self._folder}.{self._round}", timeout_ms=self._milliseconds)
        except RuntimeError as error:  # JAX's, for all that its coordination service says
            self._open = False
            raise TimeoutError(f"the other processes did not come: {error}") from error
