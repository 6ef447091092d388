"""The processes of one run, and what they tell one another.

Every process runs the same program. Wherever it reads a disk, a clock or a signal they could see
different things and part ways, and the next collective would wait for ever; so there they agree.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxopt_suite.core.errors import UserError

_T = TypeVar("_T")
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UserError, ValueError, TypeError, OSError)
}
_SMALLEST = 256  # bytes of a message: the sizes are few, as each is compiled


@dataclasses.dataclass(frozen=True)
class Peers:
    """This process among those of its run.

    ``gather``, ``from_first`` and ``any`` are collectives: every process calls them, in the same
    order as everything else that it computes together with the others, and from the main thread.

    Attributes:
      index: which process this is, from 0.
      count: how many there are.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of_this_run(cls) -> "Peers":
        """As JAX was started; a backend is started for that, if there is none."""
        return cls(jax.process_index(), jax.process_count())

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, by its index; anything that survives JSON."""
        if self.count == 1:
            return [value]
        text = json.dumps(value).encode()
        longest = int(max(multihost_utils.process_allgather(np.asarray([len(text)], np.int32)))[0])
        room = max(_SMALLEST, 1 << (longest - 1).bit_length())
        padded = np.frombuffer(text.ljust(room), np.uint8)  # JSON allows blanks at its end
        return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]

    def from_first(self, make: Callable[[], _T]) -> _T:
        """What ``make`` returns or raises on process 0, returned or raised on all of them.

        Args:
          make: called on process 0 alone; its result must survive JSON.

        Raises:
          UserError, ValueError, TypeError, OSError: if ``make`` raises one, with its message; and
            RuntimeError on the others if it raises anything else.
        """
        if self.count == 1:
            return make()
        outcome: dict[str, Any] | None = None
        raised: Exception | None = None
        if self.index == 0:
            try:
                outcome = {"value": make()}
            except Exception as error:
                kinds = [name for name, kind in _KINDS.items() if isinstance(error, kind)]
                outcome = {"kind": [*kinds, "RuntimeError"][0], "error": str(error)}
                raised = error
        told = self.gather(outcome)[0]
        if raised is not None:
            raise raised
        if "error" in told:
            raise _KINDS.get(told["kind"], RuntimeError)(told["error"])
        return told["value"]

    def any(self, flag: object) -> bool:
        """Whether ``flag`` is true on one process at least."""
        return any(self.gather(bool(flag)))
