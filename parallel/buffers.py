"""When every array of a scheduled program begins and ends to need memory, and what shares a buffer.

The program is read in the order in which it runs, loops and branches included, each once. An array
lives from the instruction that makes it to the last one that reads it. Arrays are joined to one
buffer where XLA must use one: what a loop carries, a slice updated in place, an argument donated to
a result, a view. Where an elementwise result has the shape of an operand that nobody reads any more
it takes that one's place, and a donated argument that waits for its new value is lent to arrays of
its size, as XLA arranges too.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from jaxopt_suite.parallel.hlo import Computation, Instruction, Module, Shape

# The result is (part of) an operand, seen as it is or in another shape.
_VIEWS = frozenset({"bitcast", "tuple", "get-tuple-element", "optimization-barrier"})
# Each element of the result needs that element of an operand only.
_ELEMENTWISE = frozenset(
    {
        *("abs", "add", "and", "cbrt", "ceil", "clamp", "compare", "convert", "copy", "cosine"),
        *("divide", "exponential", "exponential-minus-one", "floor", "is-finite", "log"),
        *("log-plus-one", "logistic", "maximum", "minimum", "multiply", "negate", "not", "or"),
        *("power", "rsqrt", "select", "sign", "sine", "sqrt", "subtract", "tanh", "xor"),
        *("all-reduce", "all-reduce-start"),
    }
)
_IN_A_FUSION = _ELEMENTWISE | {"parameter", "constant", "broadcast", "tuple", "bitcast", "fusion"}

_Alias = tuple[int, int, int]  # array of the result, operand, array of the operand


@dataclasses.dataclass
class Buffer:
    """Memory that one array needs, or several one after the other.

    Attributes:
      start: the first moment at which it is needed: an index into the timeline.
      end: the last one.
      nbytes: with the padding of the layout.
      shape: of the first array.
      makers: the instructions that write it.
      sources: numbers of the entry's parameters that its content depends on.
    """

    start: int
    end: int
    nbytes: int
    shape: Shape
    makers: list[Instruction]
    sources: frozenset[int]


def padded_bytes(shape: Shape) -> int:
    """Bytes of an array in its layout: a tile ``T(8,128)`` fills the last two dimensions up."""
    found = re.match(r"\{([\d,]*)(?::.*?T\(([\d,]+)\))?", shape.layout)
    if not (found and found[2]):
        return shape.nbytes
    order = [int(axis) for axis in found[1].split(",") if axis]
    dims = [shape.dims[axis] for axis in reversed(order)]
    tile = [int(size) for size in found[2].split(",")]
    dims = [1] * (len(tile) - len(dims)) + dims
    kept, tiled = dims[: len(dims) - len(tile)], dims[len(dims) - len(tile) :]
    filled = (-(-size // step) * step for size, step in zip(tiled, tile, strict=True))
    return shape._replace(dims=(*kept, *filled)).nbytes


class Timeline:
    """The buffers of a scheduled program.

    Attributes:
      instructions: in the order in which they run; the entry's root comes once more at the end.

    Args:
      module: the program.

    Raises:
      ValueError: if the program is not scheduled.
    """

    def __init__(self, module: Module) -> None:
        if not module.is_scheduled:
            raise ValueError(f"{module.name} is not scheduled: give a compiled program's text")
        self.instructions: list[Instruction] = []
        self._module = module
        self._nodes: list[Buffer] = []
        self._joined: list[int] = []  # for every node another one of its buffer; itself if first
        self._reuse: list[tuple[int, int, int]] = []  # time, result, operand
        entry = module.computations[module.entry]
        arguments = [self._new(p, frozenset({int(p.arguments)})) for p in entry.parameters]
        results = self._run(entry, arguments)
        self._finish(entry, arguments, results)

    def buffers(self) -> list[Buffer]:
        """Every buffer that is not empty, in any memory space."""
        firsts = (node for index, node in enumerate(self._nodes) if self._joined[index] == index)
        return [node for node in firsts if node.nbytes]

    def _new(self, instruction: Instruction, sources: frozenset[int]) -> list[int]:
        """A node for each array that ``instruction`` makes, at the present moment."""
        first, time = len(self._nodes), max(len(self.instructions) - 1, 0)
        for shape in instruction.shapes:
            # Constants lie with the program.
            nbytes = 0 if instruction.opcode == "constant" else padded_bytes(shape)
            self._nodes.append(Buffer(time, time, nbytes, shape, [instruction], sources))
            self._joined.append(len(self._joined))
        return list(range(first, len(self._nodes)))

    def _buffer(self, node: int) -> Buffer:
        return self._nodes[self._first(node)]

    def _first(self, node: int) -> int:
        while self._joined[node] != node:
            self._joined[node] = node = self._joined[self._joined[node]]
        return node

    def _join(self, a: int, b: int) -> None:
        a, b = self._first(a), self._first(b)
        if a == b:
            return
        one, other = self._nodes[a], self._nodes[b]
        one.start, one.end = min(one.start, other.start), max(one.end, other.end)
        one.nbytes = max(one.nbytes, other.nbytes)
        one.makers += other.makers
        one.sources |= other.sources
        self._joined[b] = a

    def _touch(self, nodes: Iterable[int]) -> None:
        now = len(self.instructions) - 1
        for node in nodes:
            self._buffer(node).end = max(self._buffer(node).end, now)

    def _run(self, computation: Computation, arguments: Sequence[Sequence[int]]) -> list[int]:
        """The nodes of the result; ``arguments`` are those of the parameters."""
        values: dict[str, Sequence[int]] = {}
        for parameter, nodes in zip(computation.parameters, arguments, strict=True):
            values[parameter.name] = nodes
        for instruction in computation.instructions:
            if instruction.opcode != "parameter":
                operands = [list(values[name]) for name in instruction.operands]
                values[instruction.name] = self._result(computation, instruction, operands)
        return list(values[computation.root.name])

    def _result(
        self, computation: Computation, instruction: Instruction, operands: list[list[int]]
    ) -> list[int]:
        inputs = [node for nodes in operands for node in nodes]
        shared: list[int] | None = None
        if instruction.opcode in ("while", "call", "conditional"):
            shared = self._call(instruction, operands)
        elif instruction.opcode in _VIEWS:
            shared = _viewed(computation, instruction, inputs)
        elif instruction.opcode.endswith("-done"):
            shared = _completed(instruction, operands[0])
        self.instructions.append(instruction)
        self._touch(inputs)
        if shared is not None:
            self._touch(shared)
            return shared
        made = self._new(instruction, frozenset().union(*(self._buffer(n).sources for n in inputs)))
        for output, operand, index in _aliases(self._module, instruction, operands):
            self._join(operands[operand][index], made[output])
        if _is_elementwise(self._module, instruction):
            now = len(self.instructions) - 1
            self._reuse += [(now, result, operand) for result in made for operand in inputs]
        return made

    def _call(self, instruction: Instruction, operands: list[list[int]]) -> list[int]:
        """Runs what a control-flow instruction calls, which works in its caller's buffers."""
        computations = self._module.computations
        if instruction.opcode == "call":
            return self._run(computations[instruction.called[0]], operands)
        if instruction.opcode == "while":
            carry = operands[0]
            self._run(computations[instruction.computation("condition") or ""], [carry])
            turned = self._run(computations[instruction.computation("body") or ""], [carry])
            for before, after in zip(carry, turned, strict=True):
                self._join(before, after)
            return carry
        branches = zip(instruction.called, operands[1:], strict=True)
        first, *others = [self._run(computations[name], [given]) for name, given in branches]
        for other in others:
            for a, b in zip(first, other, strict=True):
                self._join(a, b)
        return first

    def _finish(self, entry: Computation, arguments: list[list[int]], results: list[int]) -> None:
        """Keeps arguments and results to the end, donated ones in one place; then reuses."""
        last_reads = [[self._buffer(node).end for node in nodes] for nodes in arguments]
        self.instructions.append(entry.root)
        self._touch(results)
        self._touch(node for nodes in arguments for node in nodes)
        idle = []
        for alias in self._module.input_output_alias:
            argument = arguments[alias.parameter][0]
            result = results[alias.output[0] if alias.output else 0]
            value = self._buffer(result)
            # What an elementwise instruction reads may lie where it writes.
            lent = value.start - (not _is_elementwise(self._module, value.makers[0]))
            idle.append((last_reads[alias.parameter][0], lent, argument))
            self._join(argument, result)
        for time, made, read in self._reuse:
            new, old = self._buffer(made), self._buffer(read)
            if new is not old and new.shape == old.shape and new.start == time == old.end:
                self._join(read, made)
        self._fill(idle)

    def _fill(self, idle: list[tuple[int, int, int]]) -> None:
        """Puts arrays into donated arguments of their size, between last read and first write."""
        waiting: dict[int, list[Buffer]] = {}
        for buffer in sorted(self.buffers(), key=lambda buffer: buffer.start):
            waiting.setdefault(buffer.nbytes, []).append(buffer)
        for read, until, argument in idle:
            free = read
            for buffer in list(waiting.get(self._buffer(argument).nbytes, ())):
                if free < buffer.start and buffer.end <= until and not buffer.shape.memory_space:
                    waiting[buffer.nbytes].remove(buffer)
                    free, buffer.nbytes = buffer.end, 0


def _viewed(computation: Computation, instruction: Instruction, inputs: list[int]) -> list[int]:
    if instruction.opcode != "get-tuple-element":
        return inputs
    index = int(instruction.attribute("index") or 0)
    source = computation.by_name[instruction.operands[0]]
    if source.opcode == "tuple":  # whose elements may be tuples
        index = sum(len(computation.by_name[name].shapes) for name in source.operands[:index])
    return inputs[index : index + len(instruction.shapes)]


def _completed(instruction: Instruction, started: list[int]) -> list[int]:
    """The result of ``X-done`` among what ``X-start`` gave."""
    count = len(instruction.shapes)
    if instruction.opcode in ("copy-done", "all-reduce-done") or len(started) == count:
        return started[:count]
    return started[count : 2 * count]  # (operands, results, context), as many of each


def _aliases(
    module: Module, instruction: Instruction, operands: list[list[int]]
) -> Iterable[_Alias]:
    """What ``instruction`` must do in place."""
    opcode = instruction.opcode
    if opcode == "dynamic-update-slice":
        return [(0, 0, 0)]
    if opcode == "copy-start":  # (copy, original, context)
        return [(1, 0, 0)]
    if opcode.endswith("-start"):  # (operands, results, context), or the results alone
        arrays = [(o, i) for o, nodes in enumerate(operands) for i in range(len(nodes))]
        tuples = len(instruction.shapes) > len(arrays)
        return [(k, *array) for k, array in enumerate(arrays)] if tuples else []
    if opcode in ("fusion", "custom-call"):
        declared = _declared(instruction)
        return declared or (_updated_slices(module, instruction) if opcode == "fusion" else [])
    return []


_ALIASING = re.compile(r"\{(\d*)\}: \((\d+), \{(\d*)\}")
_TPU_ALIASING = re.compile(r'"aliasing_operands":\{"lists":\[(.*?)\]\}')


def _declared(instruction: Instruction) -> list[_Alias]:
    """What the program says itself, in one of two notations."""
    text = instruction.attributes
    _, _, pairs = text.partition("output_to_operand_aliasing=")
    found = [
        (int(out or 0), int(operand), int(index or 0))
        for out, operand, index in _ALIASING.findall(pairs.partition(")}")[0])
    ]
    tpu = _TPU_ALIASING.search(text)
    for group in re.findall(r'"indices":\[([^\]]*)\]', tpu[1]) if tpu else ():
        indices = [int(number) for number in re.findall(r"\d+", group)]  # operands, then results
        count = len(instruction.operands)
        read = [index for index in indices if index < count]
        found += [(index - count, read[0], 0) for index in indices if index >= count and read]
    return found


def _updated_slices(module: Module, fusion: Instruction) -> list[_Alias]:
    """The operands of a fusion that it only updates a slice of."""
    body = module.computations[fusion.called[0]]

    def unwrapped(instruction: Instruction) -> Instruction:
        while instruction.opcode == "bitcast":
            instruction = body.by_name[instruction.operands[0]]
        return instruction

    root = body.root
    results = [body.by_name[n] for n in root.operands] if root.opcode == "tuple" else [root]
    found = []
    for output, result in enumerate(map(unwrapped, results)):
        if result.opcode == "dynamic-update-slice":
            source = unwrapped(body.by_name[result.operands[0]])
            if source.opcode == "parameter":
                found.append((output, int(source.arguments), 0))
    return found


def _is_elementwise(module: Module, instruction: Instruction) -> bool:
    if instruction.opcode != "fusion":
        return instruction.opcode in _ELEMENTWISE
    body = module.computations[instruction.called[0]]
    return all(inner.opcode in _IN_A_FUSION for inner in body.instructions)
