"""Starting as one of several processes, with an error for every way in which that goes wrong.

JAX's own start does not check that the processes agree: with unequal counts some wait, others go
on with part of the machine; and one that waits in vain is aborted with a stack trace, after twice
the time it was given. So the processes call a roll before they start JAX: process 0 listens where
JAX's coordinator will, each of the others tells it which one of how many it is, and all go on
together or end with the same message.
"""

import contextlib
import dataclasses
import math
import os
import sys
import threading
import time
from collections.abc import Iterator

import jax

from jaxopt_suite.core.checks import check_int, check_number
from jaxopt_suite.parallel import roll_call


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """This process among all of them.

    Attributes:
      process_index: which one, from 0.
      process_count: of how many.
      local_device_count: devices of this process.
      device_count: devices of all processes.
    """

    process_index: int
    process_count: int
    local_device_count: int
    device_count: int


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 60,
    local_device_count: int | None = None,
) -> ProcessInfo:
    """Makes this process one of several that compute together; call it before anything else of JAX.

    Args:
      coordinator_address: ``HOST:PORT`` at which process 0 can be reached. Give the first three
        arguments or none of them: then the variables of SLURM, Cloud TPU, GKE or Open MPI say.
      num_processes: how many processes there are.
      process_id: which of them this is, from 0.
      timeout: seconds within which all of them must have come.
      local_device_count: how many devices the CPU backend of this process shall have; None: as
        JAX's configuration says.

    Returns:
      What this process and all together have.

    Raises:
      ValueError: if an argument is not a legal one, only some of the first three are given, or
        none are and nothing says which process this is.
      RuntimeError: if a device was used before or this was called before; or if the processes do
        not all come in time, two are the same one, or they were started for different counts. Every
        process that came gets the same message. Only where the cluster's variables were used and
        the processes do not come, JAX leaves no exception to raise: then this process ends with
        status 1, the reason on stderr.
    """
    check_number("timeout", timeout, low=0, low_open=True)
    if local_device_count is not None:
        check_int("local_device_count", local_device_count)
    explicit = _check_arguments(coordinator_address, num_processes, process_id)
    _configure(local_device_count)
    deadline = time.monotonic() + timeout
    if explicit is None:
        _start_detected(timeout)
    else:
        address, count, index = explicit
        if count > 1:
            roll_call.call_roll(address, count, index, timeout=timeout)
        _start_explicit(address, count, index, deadline)
    return ProcessInfo(
        jax.process_index(), jax.process_count(), jax.local_device_count(), jax.device_count()
    )


def _check_arguments(
    address: str | None, count: int | None, index: int | None
) -> tuple[str, int, int] | None:
    """The three explicit arguments, or None if none is given."""
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if address is None or count is None or index is None:
        if len(missing) == len(given):
            return None
        raise ValueError(
            f"give coordinator_address, num_processes and process_id, or none of them; "
            f"{' and '.join(missing)} missing from {given}"
        )
    roll_call.split_address(address)
    check_int("num_processes", count)
    check_int("process_id", index, low=0)
    if index >= count:
        raise ValueError(
            f"process_id must be in [0, {count - 1}] with num_processes={count}, got {index}"
        )
    return address, count, index


def _configure(local_device_count: int | None) -> None:
    """Sets the number of CPU devices; raises if JAX runs already, which then refuses to change it.

    There is no public function that says whether it runs, hence the change where none is wanted.
    """
    if jax.distributed.is_initialized():
        raise RuntimeError(
            "initialize must be called once per process, and this is the second time"
        )
    before = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        jax.config.update("jax_num_cpu_devices", max(1, before + 1))
    except RuntimeError as error:
        raise RuntimeError(
            "initialize must be called before anything that uses a device (jax.devices(), "
            "jax.random.key, any computation), and JAX has started its backend already"
        ) from error
    wanted = before if local_device_count is None else local_device_count
    jax.config.update("jax_num_cpu_devices", wanted)


def _start_explicit(address: str, count: int, index: int, deadline: float) -> None:
    host, port = roll_call.split_address(address)
    here = roll_call.LOOPBACK.get(host)
    jax.distributed.initialize(
        address,
        count,
        index,
        initialization_timeout=max(1, math.ceil(deadline - time.monotonic())),
        # JAX's default is to listen to the whole network, even if told to be found on this machine.
        coordinator_bind_address=None if here is None else f"{here}:{port}",
    )


def _start_detected(timeout: float) -> None:
    with _ends_in_time(timeout):
        try:
            jax.distributed.initialize(initialization_timeout=max(1, math.ceil(timeout)))
        except ValueError as error:
            raise ValueError(
                "no variables of SLURM, Cloud TPU, GKE or Open MPI say which process this is "
                f"({error}); give coordinator_address, num_processes and process_id"
            ) from error


@contextlib.contextmanager
def _ends_in_time(timeout: float) -> Iterator[None]:
    """Ends this process, with the reason, if what is done within takes longer than ``timeout``."""

    def give_up() -> None:
        print(
            f"error: the processes that the cluster's variables speak of did not all come within "
            f"{timeout:g} s; see that each was started, and can reach the first one's machine",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the main thread waits inside JAX, which would abort with a stack trace

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
