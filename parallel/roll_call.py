"""The roll that processes call before they start together: who is here, and of how many.

Process 0 listens at the coordinator's address. Each of the others connects and says, in one line of
JSON, which process it is and of how many; when all are here, or something is wrong, process 0
answers each with one line: null, or what is wrong.
"""

import contextlib
import json
import socket
import time

LOOPBACK = {"localhost": "127.0.0.1", "127.0.0.1": "127.0.0.1"}
"""Names of this machine for itself, and where to listen so that no other machine can connect."""

_LONGEST_LINE = 4096  # bytes; ours have about 100
_PATIENCE = 2.0  # seconds for a line from somebody who is connected
_RETRY = 0.1  # seconds


def free_port() -> int:
    """A port of this machine that nobody listens on now, for a coordinator on ``localhost``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def split_address(address: str) -> tuple[str, int]:
    """Host, without brackets, and port.

    Raises:
      ValueError: if the address has another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(
            f"coordinator_address must be HOST:PORT with a port in [1, 65535], got {address!r}"
        )
    return host.strip("[]"), int(port)


def call_roll(address: str, count: int, index: int, *, timeout: float) -> None:
    """Returns once all processes are here.

    Args:
      address: ``HOST:PORT`` of process 0.
      count: how many processes there are, at least 2.
      index: which of them this is.
      timeout: seconds within which all must have come.

    Raises:
      RuntimeError: on every process that came, with what is wrong.
    """
    deadline = time.monotonic() + timeout
    if index == 0:
        fault = _Roll(count, deadline, timeout).call(address)
    else:
        fault = _answer(address, count, index, deadline, timeout)
    if fault is not None:
        raise RuntimeError(fault)


class _Roll:
    """What process 0 knows of the others."""

    def __init__(self, count: int, deadline: float, timeout: float) -> None:
        self._count = count
        self._deadline = deadline
        self._timeout = timeout
        self._present: dict[int, socket.socket] = {}

    def call(self, address: str) -> str | None:
        """Waits for the others, and tells them the outcome; what is wrong, or None."""
        try:
            listener = _listen(address)
        except OSError as error:
            return (
                f"process 0 cannot listen at {address}: {error.strerror}; is there another process "
                "with process_id=0, or another program at this port?"
            )
        with contextlib.ExitStack() as connections:
            # Closed first: whoever is told to go on finds JAX's coordinator here, not this.
            with listener:
                fault = self._wait(listener, connections)
            for connection in self._present.values():
                _send(connection, fault)
            for connection in self._present.values():
                _receive(connection)  # until it is closed over there
        return fault

    def _wait(self, listener: socket.socket, connections: contextlib.ExitStack) -> str | None:
        while len(self._present) < self._count - 1:
            listener.settimeout(max(0.001, self._deadline - time.monotonic()))
            try:
                connection = connections.enter_context(listener.accept()[0])
            except TimeoutError:
                return self._absent()
            if fault := self._note(connection):
                _send(connection, fault)
                return fault
        return None

    def _note(self, connection: socket.socket) -> str | None:
        """Enters a process that has connected; what is wrong with it, or None."""
        claim = _receive(connection)
        if not isinstance(claim, dict) or claim.keys() != {"num_processes", "process_id"}:
            return None  # no process of ours: whatever looks for open ports
        index, count = claim["process_id"], claim["num_processes"]
        if not isinstance(index, int) or index < 1:
            return None
        if count != self._count:
            return (
                f"process {index} was started with num_processes={count}, and process 0 with "
                f"num_processes={self._count}; give all the same number"
            )
        if index in self._present:
            return (
                f"two processes were started with process_id={index}; give each its own, "
                f"0 to {self._count - 1}"
            )
        self._present[index] = connection
        return None

    def _absent(self) -> str:
        missing = sorted(set(range(1, self._count)) - self._present.keys())
        shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        return (
            f"{len(missing)} of num_processes={self._count} did not come within "
            f"{self._timeout:g} s: process_id {shown}"
        )


def _answer(address: str, count: int, index: int, deadline: float, timeout: float) -> str | None:
    """Tells process 0 who this is, and waits for its word; what is wrong, or None."""
    nobody = (
        f"process {index} of {count} found no process 0 at {address} within {timeout:g} s; is it "
        "running, and is the address the one it was given?"
    )
    connection = _connect(address, deadline)
    if connection is None:
        return nobody
    with connection:
        _send(connection, {"num_processes": count, "process_id": index})
        # Process 0 gives up at its own deadline, which may be a little later, and says why.
        outcome = _receive(connection, patience=deadline + _PATIENCE - time.monotonic())
    if outcome is None or isinstance(outcome, str):
        return outcome
    return (
        f"what listens at {address} is no process 0 that waits for process {index}: another "
        "program, or a run that has begun already"
    )


def _listen(address: str) -> socket.socket:
    host, port = split_address(address)
    if host in LOOPBACK:
        return socket.create_server((LOOPBACK[host], port))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both)


def _connect(address: str, deadline: float) -> socket.socket | None:
    """A connection to process 0 as soon as it listens; None if it does not before the deadline."""
    host, port = split_address(address)
    while (left := deadline - time.monotonic()) > 0:
        try:
            return socket.create_connection((LOOPBACK.get(host, host), port), timeout=left)
        except OSError:  # refused, unreachable, not resolved: it may come yet
            time.sleep(min(_RETRY, left))
    return None


def _send(connection: socket.socket, message: object) -> None:
    with contextlib.suppress(OSError):  # it has gone; what it would have read it cannot use
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, patience: float = _PATIENCE) -> object:
    """The message of the other side, or False if none comes that is one of ours."""
    connection.settimeout(max(0.001, patience))
    try:
        with connection.makefile("rb") as lines:
            return json.loads(lines.readline(_LONGEST_LINE))
    except (OSError, ValueError):
        return False
