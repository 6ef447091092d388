"""Stopping when asked to: the first SIGINT or SIGTERM is noted, a second acts as it always did."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclasses.dataclass
class StopRequest:
    """Filled in by the signal handler, read by the training loop after every step."""

    signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None


def signal_name(signum: int | None) -> str:
    """Name of a signal, such as SIGTERM."""
    return "no signal" if signum is None else signal.Signals(signum).name


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within it, the first SIGINT or SIGTERM asks for a stop instead of ending the process.

    The request puts the earlier handlers back, so a second signal is not held up by whatever the
    first is waiting for. A signal that was ignored stays ignored (as SIGINT is in a script's
    background jobs). Outside the main thread, where Python allows no handlers, no request comes.

    Yields:
      The request: false until a signal comes, then it has the signal's number.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def restore() -> None:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)

    def note(signum: int, frame: Any) -> None:
        del frame
        request.signum = signum
        restore()

    earlier = {
        signum: signal.getsignal(signum) or signal.SIG_DFL
        for signum in _SIGNALS
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    for signum in earlier:
        signal.signal(signum, note)
    try:
        yield request
    finally:
        restore()
