"""What a contract check found: one result a point, and the table people read."""

import dataclasses
import enum
import textwrap


class Status(enum.Enum):
    """How a point of the contract came out."""

    PASSED = "passed"
    FAILED = "FAILED"
    NOT_APPLICABLE = "n/a"


@dataclasses.dataclass(frozen=True)
class Failure:
    """The smallest case found on which a point does not hold."""

    case: str  # the case's name, such as "scalar, bfloat16"
    tree: str  # its shapes and dtypes, such as "{'w': float32[3,4]}"; "" at construction
    expected: str
    found: str

    def __str__(self) -> str:
        where = f"on {self.case}: {self.tree}" if self.tree else f"at {self.case}"
        return f"{where}\nexpected {self.expected}\nfound    {self.found}"


@dataclasses.dataclass(frozen=True)
class PointResult:
    """One point of the contract on one transformation."""

    name: str
    statement: str  # what the point demands, in one line
    status: Status
    seconds: float
    failure: Failure | None = None  # only with Status.FAILED
    reason: str = ""  # only with Status.NOT_APPLICABLE

    def __str__(self) -> str:
        line = f"{self.status.value:<6}  {self.name:<26}  {self.statement}"
        detail = str(self.failure) if self.failure else self.reason
        return line + ("\n" + textwrap.indent(detail, " " * 8) if detail else "")


@dataclasses.dataclass(frozen=True)
class ContractReport:
    """Every point checked on one transformation, in the order of the contract.

    ``report["masked"]`` is one point's result; ``passed``, ``failed``, ``not_applicable`` select.
    """

    name: str
    results: tuple[PointResult, ...]

    def __getitem__(self, name: str) -> PointResult:
        return {result.name: result for result in self.results}[name]

    def __str__(self) -> str:
        counts = ", ".join(f"{len(self._having(s))} {s.value.lower()}" for s in Status)
        seconds = sum(result.seconds for result in self.results)
        head = f"contract of {self.name}: {counts} ({seconds:.1f} s)"
        return "\n".join([head, *map(str, self.results)])

    @property
    def ok(self) -> bool:
        """Whether no point failed."""
        return not self.failed

    @property
    def passed(self) -> dict[str, PointResult]:
        """The points that hold, by name."""
        return self._having(Status.PASSED)

    @property
    def failed(self) -> dict[str, PointResult]:
        """The points that do not hold, by name."""
        return self._having(Status.FAILED)

    @property
    def not_applicable(self) -> dict[str, PointResult]:
        """The points that say nothing about this transformation, by name; each has a reason."""
        return self._having(Status.NOT_APPLICABLE)

    def raise_if_failed(self) -> None:
        """Raises ``AssertionError`` with the failed points, if there are any."""
        if self.failed:
            failures = "\n".join(map(str, self.failed.values()))
            raise AssertionError(f"{self.name} breaks {len(self.failed)} points:\n{failures}")

    def _having(self, status: Status) -> dict[str, PointResult]:
        return {result.name: result for result in self.results if result.status is status}
