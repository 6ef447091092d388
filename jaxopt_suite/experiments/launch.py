"""One command run as several processes on this machine, to try out what a cluster would do."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any

from jaxopt_suite.core.checks import check_int
from jaxopt_suite.parallel.roll_call import free_port

_POLL = 0.05  # seconds
_TAIL = 20  # lines of a failed process's output
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def launch(
    arguments: Sequence[str],
    *,
    processes: int,
    devices_per_process: int,
    program: Sequence[str] = (sys.executable, "-m", "jaxopt_suite.cli.main"),
    grace: float = 10.0,
) -> int:
    """Runs one command as several processes on the CPU of this machine; no other can reach them.

    What process 0 writes is seen as it comes; what another writes, only if it is the first to fail
    and process 0 does not end with the same status.
    SIGINT and SIGTERM are passed on to all. When one fails, the others have ``grace`` to end, and
    are then killed: they could wait for it for ever.

    Args:
      arguments: the words after ``jaxopt-suite``. Each process is given, after them,
        ``--coordinator``, ``--num-processes`` and ``--process-id``.
      processes: how many, at least 1.
      devices_per_process: CPU devices of each.
      program: the words before them.
      grace: seconds.

    Returns:
      The exit status: 0 if all ended with 0, else that of the first that did not, which for one
      ended by a signal is 128 plus its number.
    """
    check_int("processes", processes)
    check_int("devices_per_process", devices_per_process)
    command = [*program, *arguments, "--coordinator", f"localhost:{free_port()}"]
    command += ["--num-processes", str(processes)]
    with contextlib.ExitStack() as stack:
        children = [
            stack.enter_context(_child(command, index, devices_per_process))
            for index in range(processes)
        ]
        stack.enter_context(_passing_signals_to(children))
        failed = _first_failure(children)
        if failed is None:
            return 0
        killed = _end(children, grace)
        if children[0] in killed or children[0].status != failed.status:
            failed.explain()  # else process 0 has said the same
        return failed.status


class _Child:
    """One of the processes."""

    def __init__(self, index: int, process: subprocess.Popen[bytes], output: IO[bytes] | None):
        self.index = index
        self.process = process
        self._output = output  # None: it writes where this process does

    @property
    def status(self) -> int:
        code = self.process.returncode
        return 128 - code if code < 0 else code

    def explain(self) -> None:
        """Shows the end of what it wrote, unless that was seen."""
        if self._output is None:
            return
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").splitlines()
        for line in [*lines[-_TAIL:], f"ended with status {self.status}"]:
            print(f"[process {self.index}] {line}", file=sys.stderr)


@contextlib.contextmanager
def _child(command: Sequence[str], index: int, devices: int) -> Iterator[_Child]:
    """A process, which is dead at the end."""
    with contextlib.ExitStack() as stack:
        output = None if index == 0 else stack.enter_context(tempfile.TemporaryFile())
        process = subprocess.Popen(
            [*command, "--process-id", str(index)],
            env=_environment(devices),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            # A group of its own: an interruption from the keyboard reaches it once, through us.
            start_new_session=True,
        )
        try:
            yield _Child(index, process, output)
        finally:
            process.kill()  # JAX turns SIGTERM into a note
            process.wait()


def _environment(devices: int) -> dict[str, str]:
    """That of this process, for so many CPU devices and nothing else."""
    environment = dict(os.environ)
    flags = environment.get("XLA_FLAGS", "")
    environment["XLA_FLAGS"] = re.sub(r"--xla_force_host_platform_device_count=\S*", "", flags)
    environment["JAX_PLATFORMS"] = "cpu"
    environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    return environment


@contextlib.contextmanager
def _passing_signals_to(children: Sequence[_Child]) -> Iterator[None]:
    def pass_on(signum: int, frame: Any) -> None:
        del frame
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(signum)

    earlier = {signum: signal.signal(signum, pass_on) for signum in _SIGNALS}
    try:
        yield
    finally:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)


def _first_failure(children: Sequence[_Child]) -> _Child | None:
    """Waits until a process fails, or all have ended well."""
    running = list(children)
    while running:
        for child in running:
            if child.process.poll():
                return child
        running = [child for child in running if child.process.returncode is None]
        time.sleep(_POLL)
    return None


def _end(children: Sequence[_Child], grace: float) -> list[_Child]:
    """Waits for all, and kills those that do not end in time: these are returned."""
    deadline = time.monotonic() + grace
    killed = []
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
            killed.append(child)
    return killed
