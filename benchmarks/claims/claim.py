"""What a claim is and what measuring it gives."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

Verdict = Literal["holds", "holds in part", "does not hold"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was measured.

    Attributes:
      figure: our figure, in words and numbers.
      verdict: whether it came out as claimed.
      numbers: everything behind the figure, as JSON has it.
    """

    figure: str
    verdict: Verdict
    numbers: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim and how to measure it.

    Attributes:
      name: as on the command line.
      claim: what is said.
      source: who says it.
      how: how it is measured here, and what would make it hold.
      measure: ``quick -> outcome``; quick is a matter of seconds and proves little.
      immediate: whether the full measurement takes seconds too, so that there is no quick one.
    """

    name: str
    claim: str
    source: str
    how: str
    measure: Callable[[bool], Outcome]
    immediate: bool = False


def verdict(*conditions: bool) -> Verdict:
    """Whether all, some or none of the conditions hold."""
    if all(conditions):
        return "holds"
    return "holds in part" if any(conditions) else "does not hold"
