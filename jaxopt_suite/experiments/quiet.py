"""What orbax says on stderr about a failure that is raised anyway, and how not to hear it."""

import logging
import sys
from collections.abc import Callable
from typing import Any


def quiet_orbax() -> Callable[[], None]:
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
