"""Reads the text of an optimised program: what runs, on what shapes, and how often.

XLA prints the program it has compiled as HLO text, on every backend in the same grammar::

    HloModule jit_f, is_scheduled=true, num_partitions=8
    %body (p: (s32[], f32[8])) -> (s32[], f32[8]) { ... }
    ENTRY %main (x: f32[8]) -> f32[] {
      %x = f32[8]{0} parameter(0), metadata={op_name="x"}
      ROOT %r = f32[] reduce(%x, %zero), dimensions={0}, to_apply=%add
    }

``parse`` makes objects of the lines without interpreting them; ``executions`` follows loops,
conditionals and calls from the entry. Shapes are those of one device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from jaxopt_suite.parallel.loops import trip_count


class Shape(NamedTuple):
    """An array type, such as ``bf16[8,128]{1,0:T(8,128)(2,1)S(1)}``."""

    dtype: str
    dims: tuple[int, ...]
    layout: str  # as printed, with its braces; empty if there is none

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, without the padding that tiles add; whole bytes."""
        return -(-self.size * _bits(self.dtype) // 8)

    @property
    def memory_space(self) -> int:
        """0: the device's main memory; TPUs use others (1 is on the chip), and 5 is the host's."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found[1]) if found else 0


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; tuples are flattened
    operands: tuple[str, ...]  # names of instructions of the same computation
    called: tuple[str, ...]  # names of computations, in the order printed
    arguments: str  # what stands between the parentheses, raw: a literal, a parameter's number
    attributes: str  # what stands behind them, raw
    op_name: str  # from the metadata: the JAX name stack; empty if there is none
    is_root: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the result, all parts of a tuple together."""
        return sum(shape.nbytes for shape in self.shapes)

    def attribute(self, key: str) -> str | None:
        """The raw value of ``key=value`` where the value has no spaces; None if absent."""
        found = re.search(rf"(?:^|, ){key}=([^\s,{{]+|\{{[^}}]*\}})", self.attributes)
        return found[1] if found else None

    def computation(self, role: str) -> str | None:
        """The computation called as ``role``: ``body``, ``condition``, ``calls``, ``to_apply``."""
        name = self.attribute(role)
        return None if name is None else name.removeprefix("%")


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program: its instructions, operands before their users."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> Mapping[str, Instruction]:
        """The instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        """The instruction whose value is the result."""
        return next(i for i in self.instructions if i.is_root)

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Instruction, ...]]:
        """Who takes the value of an instruction as an operand, by name; each user once."""
        found: dict[str, list[Instruction]] = {i.name: [] for i in self.instructions}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return {name: tuple(users) for name, users in found.items()}

    @functools.cached_property
    def parameters(self) -> tuple[Instruction, ...]:
        """The parameters in the order of their numbers."""
        found = (i for i in self.instructions if i.opcode == "parameter")
        return tuple(sorted(found, key=lambda i: int(i.arguments)))


class Alias(NamedTuple):
    """Part of the entry's result that takes the buffer of part of a parameter."""

    output: tuple[int, ...]  # path into the result; () for a result that is no tuple
    parameter: int
    parameter_index: tuple[int, ...]
    kind: str  # "may-alias" or "must-alias"


@dataclasses.dataclass(frozen=True)
class Module:
    """A program, as one device of ``num_partitions`` runs it."""

    name: str
    entry: str
    computations: Mapping[str, Computation]  # in the order printed: mostly callees first
    num_partitions: int
    is_scheduled: bool
    input_output_alias: tuple[Alias, ...]

    @functools.cached_property
    def callers(self) -> Mapping[str, tuple[tuple[str, Instruction], ...]]:
        """Who calls a computation: the computations and their instructions, by its name."""
        found: dict[str, list[tuple[str, Instruction]]] = {name: [] for name in self.computations}
        for computation in self.computations.values():
            for instruction in computation.instructions:
                for callee in instruction.called:
                    found[callee].append((computation.name, instruction))
        return {name: tuple(callers) for name, callers in found.items()}


@dataclasses.dataclass(frozen=True)
class Times:
    """How often something runs in one execution of the program."""

    count: int
    exact: bool  # False: inside a loop whose number of trips is unknown, counted as one trip
    branch: tuple[str, str] | None  # outermost conditional, its branch; counted as taken


_HEADER = re.compile(r"HloModule ([\w.\-]+)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+)(?: \(.*)? \{\s*$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY_AND_OPCODE = re.compile(r"(\S+) ([a-z][\w\-]*)\(")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?")
_PARENTHESIS = re.compile(r"[()]")
_COMMENT = re.compile(r"/\*.*?\*/")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|select|scatter|branch_computations|true_computation"
    r"|false_computation|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_RUNS_CALLED = ("fusion", "call", "async", "custom-call", "conditional")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_ALIAS = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}, ([\w\-]+)\)")


def parse(text: str) -> Module:
    """Reads optimised HLO text, as ``compiled.as_text()`` gives it.

    Args:
      text: of one module, from any backend.

    Raises:
      ValueError: if the text is not that of an HLO module, or a line of it cannot be read.
    """
    if not isinstance(text, str):
        raise TypeError(f"expected HLO text, got {type(text).__name__}")
    header, _, rest = text.lstrip().partition("\n")
    found = _HEADER.match(header)
    if not found:
        raise ValueError(
            f"expected optimised HLO text, which begins with 'HloModule'; got {header[:60]!r}"
            + (" (StableHLO: compile it first)" if header.startswith("module") else "")
        )
    shapes_of = functools.lru_cache(maxsize=None)(_shapes)
    computations, entry = {}, None
    for name, is_entry, lines in _blocks(rest):
        computations[name] = Computation(name, tuple(_instruction(x, shapes_of) for x in lines))
        entry = name if is_entry else entry
    if entry is None:
        raise ValueError(f"HLO module {found[1]} has no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", header)
    return Module(
        name=found[1],
        entry=entry,
        computations=computations,
        num_partitions=int(partitions[1]) if partitions else 1,
        is_scheduled="is_scheduled=true" in header,
        input_output_alias=tuple(
            Alias(_ints(output), int(number), _ints(index), kind)
            for output, number, index, kind in _ALIAS.findall(header)
        ),
    )


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Name, whether it is the entry, and lines of each computation."""
    head: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if head is None:
            head, lines = _COMPUTATION.match(line), []
        elif line.startswith("}"):
            yield head[2], bool(head[1]), lines
            head = None
        elif lines and not _INSTRUCTION.match(line):
            lines[-1] += line  # a literal over several lines
        elif line.strip():
            lines.append(line)


def _instruction(line: str, shapes_of: Callable[[str], tuple[Shape, ...]]) -> Instruction:
    head = _INSTRUCTION.match(line)
    if head is None:
        raise ValueError(f"not an HLO instruction: {line.strip()[:80]!r}")
    at = head.end()
    if line.startswith("(", at):
        end = _closing(line, at) + 1
        kind, opcode = line[at:end], _OPCODE.match(line, end)
    else:
        opcode = _ARRAY_AND_OPCODE.match(line, at)
        kind = opcode[1] if opcode else ""
    if opcode is None:
        raise ValueError(f"not an HLO instruction: {line.strip()[:80]!r}")
    close = _closing(line, opcode.end() - 1)
    name, arguments, attributes = opcode.groups()[-1], line[opcode.end() : close], line[close + 1 :]
    structure, _, metadata = attributes.partition("metadata={")
    op_name = _OP_NAME.search(metadata)
    return Instruction(
        name=head[2],
        opcode=name,
        shapes=shapes_of(kind),
        operands=() if name in ("constant", "parameter") else _operands(arguments),
        called=tuple(
            called.strip().removeprefix("%")
            for group in _CALLED.findall(structure)
            for called in group.strip("{}").split(",")
            if called.strip()
        ),
        arguments=arguments,
        attributes=attributes.removeprefix(", "),
        op_name=op_name[1] if op_name else "",
        is_root=bool(head[1]),
    )


def _closing(line: str, opening: int) -> int:
    """Where the parenthesis closes that opens at ``opening``."""
    depth = 0
    for found in _PARENTHESIS.finditer(line, opening):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"parentheses do not close in {line.strip()[:80]!r}")


def _operands(arguments: str) -> tuple[str, ...]:
    if "%" in arguments:
        return tuple(_OPERAND.findall(arguments))
    # Printed without signs: a name each, or a type and a name.
    names = _SHAPE.sub("", _COMMENT.sub("", arguments)).replace("(", "").replace(")", "")
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(d.lstrip("<=")) for d in dims.split(",") if d), layout)
        for dtype, dims, layout in _SHAPE.findall(_COMMENT.sub("", text))
    )


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


@functools.cache
def _bits(dtype: str) -> int:
    """Bits an element takes: the first number in the name, with the exceptions."""
    exceptions = {"pred": 8, "token": 0, "opaque": 0}
    found = re.search(r"\d+", dtype)
    if dtype not in exceptions and found is None:
        raise ValueError(f"unknown element type {dtype!r}")
    return exceptions[dtype] if found is None else int(found[0])


def executions(module: Module) -> Mapping[str, Times]:
    """How often each computation runs in one execution of the program.

    The entry runs once, the body of a loop as often as the loop turns, each branch of a conditional
    as often as the conditional (labelled), and a fusion or call as often as its caller. What is
    applied element by element (the function of a reduction, sort or scatter) is left out, and so is
    what nothing calls.

    Returns:
      By computation name. A loop whose trips cannot be read from the text counts as one trip and
      makes everything in it inexact.
    """
    times = {module.entry: Times(1, True, None)}
    for name in _callers_first(module):
        caller = times[name]
        for callee, trips, branch in _calls(module, name):
            before = times.get(callee, Times(0, True, None))
            times[callee] = Times(
                count=before.count + caller.count * (1 if trips is None else trips),
                exact=before.exact and caller.exact and trips is not None,
                branch=before.branch or caller.branch or branch,
            )
    return times


def _calls(module: Module, name: str) -> Iterator[tuple[str, int | None, tuple[str, str] | None]]:
    """What a computation runs: callee, times for each time of its own, of what it is a branch."""
    for instruction in module.computations[name].instructions:
        opcode, called = instruction.opcode, instruction.called
        if opcode == "while":
            trips = trip_count(module, name, instruction)
            tests = None if trips is None else trips + 1
            yield instruction.computation("body") or "", trips, None
            yield instruction.computation("condition") or "", tests, None
        elif opcode.removesuffix("-start") in _RUNS_CALLED:
            of = instruction.name if opcode == "conditional" else None
            yield from ((callee, 1, (of, callee) if of else None) for callee in called)


def _callers_first(module: Module) -> list[str]:
    """The computations that run, each before those that it calls."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        for callee, _, _ in _calls(module, name):
            if callee not in done:
                visit(callee)
        done[name] = None

    visit(module.entry)
    return list(reversed(done))
