"""What a compiled program computes and moves on one device, read from its text.

The compiler's own ``cost_analysis`` counts the body of a loop once, counts nothing on GPUs, and
takes on-chip buffers for memory traffic; here loops count by their trips (``hlo.executions``).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxopt_suite.parallel import hlo

_CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul")
_NO_ARITHMETIC = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "MoveToDevice",
    "MoveToHost",
    "SliceId",
    "ZeroCrop",
    "annotate_device_placement",
)
_FACTORISATIONS = ("cholesky", "fft", "triangular-solve")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_WINDOW = re.compile(r"(\w+)=(\S+)")


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of one device in one execution of a program."""

    total: float  # of matrix products and convolutions, two for each multiply-add
    uncounted: Mapping[str, int]  # what else may compute much, by name: how often it runs
    exact: bool  # False: a loop of unknown length counted as one trip


def flops(module: hlo.Module) -> Flops:
    """Counts the matrix products and convolutions that a device does; elementwise work is left out.

    In convolutions only products with elements that exist count, not those with padding or with the
    holes of a dilated operand: TPU programs write batched matrix products as such convolutions.
    Each branch of a conditional counts as if it was taken.

    Returns:
      The total, and what is not in it: custom calls (kernels, library routines), factorisations and
      Fourier transforms.
    """
    times = hlo.executions(module)
    total, uncounted, exact = 0, dict[str, int](), True
    for name, runs in times.items():
        computation = module.computations[name]
        for instruction in computation.instructions:
            found = _operations(computation, instruction)
            if isinstance(found, str):
                uncounted[found] = uncounted.get(found, 0) + runs.count
            elif found:
                total += runs.count * found
                exact = exact and runs.exact
    return Flops(float(total), uncounted, exact)


def _operations(computation: hlo.Computation, instruction: hlo.Instruction) -> int | str:
    """Operations of one instruction, or its name if they cannot be told."""
    operands = [computation.by_name[name].shapes for name in instruction.operands]
    attributes = instruction.attributes
    if instruction.opcode == "dot":
        contracted = instruction.attribute("lhs_contracting_dims") or ""
        return _dot(instruction.shapes[0], operands[0][0], contracted)
    if instruction.opcode == "convolution":
        return _convolution(instruction, operands[0][0], operands[1][0])
    if instruction.opcode in _FACTORISATIONS:
        return instruction.opcode
    if instruction.opcode != "custom-call":
        return 0
    target = _TARGET.search(attributes)
    name = target[1] if target else "custom-call"
    contracted_by = _CONTRACTED.search(attributes)
    if name.startswith(_CUBLAS) and contracted_by:
        return _dot(instruction.shapes[0], operands[0][0], contracted_by[1])
    return 0 if name in _NO_ARITHMETIC else name


def _dot(result: hlo.Shape, left: hlo.Shape, contracted: str) -> int:
    """Two operations for each element of the result and each contracted index."""
    dims = (int(dim) for dim in re.findall(r"\d+", contracted))
    return 2 * result.size * math.prod(left.dims[dim] for dim in dims)


def _convolution(instruction: hlo.Instruction, left: hlo.Shape, right: hlo.Shape) -> int:
    """Two operations for each product of two elements that exist."""
    labels = re.split(r"_|->", instruction.attribute("dim_labels") or "")
    left_dim, right_dim, result_dim = (
        dict(zip(label, shape.dims, strict=True))
        for label, shape in zip(labels, (left, right, instruction.shapes[0]), strict=True)
    )
    features = left_dim["f"] // int(instruction.attribute("feature_group_count") or 1)
    batch = left_dim["b"] // int(instruction.attribute("batch_group_count") or 1)
    windows = _windows(instruction.attribute("window") or "")
    spatial = (
        _products(left_dim[at], result_dim[at], **window)
        for at, window in zip(sorted(set(labels[0]) - set("bf"), key=int), windows, strict=True)
    )
    return 2 * features * batch * right_dim["o"] * math.prod(spatial)


def _windows(text: str) -> Iterator[dict[str, int]]:
    """The window along each spatial dimension: ``{size=3x8 stride=1x7 pad=1_1x0_0}``."""
    given = {key: value.strip("{}").split("x") for key, value in _WINDOW.findall(text.strip("{}"))}
    for at, size in enumerate(given.get("size", ())):
        yield {
            "size": int(size),
            "stride": int(given["stride"][at]) if "stride" in given else 1,
            "before": int(given["pad"][at].split("_")[0]) if "pad" in given else 0,
            "holes": int(given["lhs_dilate"][at]) if "lhs_dilate" in given else 1,
            "spread": int(given["rhs_dilate"][at]) if "rhs_dilate" in given else 1,
        }


def _products(
    length: int, outputs: int, *, size: int, stride: int, before: int, holes: int, spread: int
) -> int:
    """How often an element of the window falls on one of the operand, over all outputs."""
    begins = np.arange(outputs) * stride - before
    found = 0
    for element in range(size):
        at, rest = np.divmod(begins + element * spread, holes)
        found += int(np.count_nonzero((rest == 0) & (at >= 0) & (at < length)))
    return found


_NO_TRAFFIC = (
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
)
_ENTERED = ("async", "call", "conditional", "while")
_VIEWS = ("AllocateBuffer", "ConcatBitcast")  # targets of custom calls that move nothing
_SLICES = ("dynamic-slice", "gather", "slice")
_CHAINED = "chain_id="  # a TPU collective in flight, printed in every fusion it runs beside
_HOST = 5


def hbm_bytes(module: hlo.Module) -> float:
    """Bytes that a device reads from and writes to its main memory in one execution.

    Each instruction reads its operands and writes its result, a fusion as a whole. A slice or
    gather reads what it returns, and an update in place writes what it updates, in a fusion too.
    Buffers that a TPU program keeps on the chip and buffers in host memory are not counted, and
    neither is the padding of tiles. Caches are not modelled. Each branch of a conditional counts as
    if it was taken, a loop of unknown length as one trip.
    """
    times = hlo.executions(module)
    counter = _Traffic(module)
    return float(sum(times[name].count * counter.of(name) for name in _entered(module, times)))


def _entered(module: hlo.Module, times: Mapping[str, hlo.Times]) -> list[str]:
    """The computations whose instructions run one by one, unlike those of a fusion."""
    entered = [module.entry]
    for name in entered:
        for instruction in module.computations[name].instructions:
            if instruction.opcode.removesuffix("-start") in _ENTERED:
                entered += [callee for callee in instruction.called if callee not in entered]
    return [name for name in entered if name in times]


class _Traffic:
    """Bytes by instruction; knows which memory spaces of the module are its main memory."""

    def __init__(self, module: hlo.Module) -> None:
        self.module = module
        entry = module.computations[module.entry].instructions
        # Only TPU layouts have tiles. On GPUs a memory space of its own is still main memory.
        self.is_tpu = any(":T(" in shape.layout for i in entry for shape in i.shapes)

    def of(self, name: str) -> int:
        """Of one run of a computation."""
        computation = self.module.computations[name]
        return sum(self._instruction(computation, i) for i in computation.instructions)

    def _instruction(self, at: hlo.Computation, i: hlo.Instruction) -> int:
        base = i.opcode.removesuffix("-start").removesuffix("-done").removesuffix("-update")
        is_view = any(f'target="{name}"' in i.attributes for name in _VIEWS)
        if base in _NO_TRAFFIC or base in _ENTERED or is_view or i.opcode.endswith("-update"):
            return 0
        if i.opcode == "fusion":
            return self._fusion(at, i)
        reads = sum(self._read(at, i, position) for position in range(len(i.operands)))
        if i.opcode.endswith("-start") or i.opcode in ("send", "recv"):
            return reads  # its -done writes
        return (0 if i.opcode.endswith("-done") else reads) + self._written(at, i)

    def _fusion(self, at: hlo.Computation, i: hlo.Instruction) -> int:
        body = self.module.computations[i.called[0]]
        reads = sum(
            self._used(body, parameter) if self._in_hbm(at.by_name[operand].shapes) else 0
            for operand, parameter in zip(i.operands, body.parameters, strict=True)
        )
        root = body.root
        if "AsyncCollectiveStart" in root.attributes:
            return reads  # the fusion that is its end writes
        parts = root.operands if root.opcode == "tuple" else (root.name,)
        if len(parts) != len(i.shapes):
            return reads + self._in_hbm(i.shapes)
        return reads + sum(
            self._made(body, body.by_name[part])
            for shape, part in zip(i.shapes, parts, strict=True)
            if self._in_hbm((shape,))
        )

    def _in_hbm(self, shapes: Sequence[hlo.Shape]) -> int:
        """Bytes of those arrays that lie in main memory."""
        return sum(
            shape.nbytes
            for shape in shapes
            if shape.memory_space == 0 or (not self.is_tpu and shape.memory_space != _HOST)
        )

    def _read(self, at: hlo.Computation, i: hlo.Instruction, position: int) -> int:
        """What an instruction outside of fusions reads of one operand."""
        operand = at.by_name[i.operands[position]]
        whole = self._in_hbm(operand.shapes)
        return min(whole, _part_read(at, i, position, whole))

    def _written(self, at: hlo.Computation, i: hlo.Instruction) -> int:
        is_cublas = any(f'target="{name}' in i.attributes for name in _CUBLAS)
        whole = self._in_hbm(i.shapes[:1] if is_cublas else i.shapes)  # the second is a workspace
        return min(whole, sum(s.nbytes for s in _updates(at, i))) if _updates(at, i) else whole

    def _used(self, body: hlo.Computation, value: hlo.Instruction) -> int:
        """What a fusion reads of a value: the slices it takes, or all of it."""
        total = 0
        for user in body.users[value.name]:
            for position, operand in enumerate(user.operands):
                if operand == value.name:
                    total += self._used_by(body, user, position, value.nbytes)
        return min(total, value.nbytes)

    def _used_by(
        self, body: hlo.Computation, user: hlo.Instruction, position: int, whole: int
    ) -> int:
        if user.opcode == "bitcast" or (user.opcode == "dynamic-update-slice" and position == 0):
            return self._used(body, user)  # the same buffer
        if user.opcode == "fusion":
            inner = self.module.computations[user.called[0]]
            return self._used(inner, inner.parameters[position])
        if user.opcode == "tuple" or "AsyncCollectiveDone" in user.attributes:
            return 0  # passed through
        if _CHAINED in user.attributes:
            return whole if _starts(body, user) else 0
        return _part_read(body, user, position, whole)

    def _made(self, body: hlo.Computation, value: hlo.Instruction) -> int:
        """What a fusion writes to make a value: what it updates, or all of it."""
        if value.opcode == "bitcast":
            return self._made(body, body.by_name[value.operands[0]])
        if value.opcode == "fusion" and len(value.shapes) == 1:
            inner = self.module.computations[value.called[0]]
            return self._made(inner, inner.root)
        if value.opcode == "parameter" or _CHAINED in value.attributes:
            return 0  # passed through
        updates = _updates(body, value)
        return sum(shape.nbytes for shape in updates) if updates else value.nbytes


def _part_read(at: hlo.Computation, user: hlo.Instruction, position: int, whole: int) -> int:
    """Bytes that an instruction reads of an operand of ``whole`` bytes."""
    base = user.opcode.removesuffix("-start")
    if base in _SLICES and position == 0:
        return user.shapes[0 if base == user.opcode else len(user.operands)].nbytes
    if base == "dynamic-update-slice" and position == 0:
        return 0
    if base == "scatter" and position < len(user.operands) // 2:
        return _updates(at, user)[position].nbytes  # combines with what is there
    return whole


def _updates(at: hlo.Computation, i: hlo.Instruction) -> tuple[hlo.Shape, ...]:
    """The operands that an update in place writes; empty for any other instruction."""
    if i.opcode == "dynamic-update-slice":
        return at.by_name[i.operands[1]].shapes
    if i.opcode == "scatter":
        updates = i.operands[len(i.operands) // 2 + 1 :]
        return tuple(shape for name in updates for shape in at.by_name[name].shapes)
    return ()


def _starts(body: hlo.Computation, collective: hlo.Instruction) -> bool:
    return any("AsyncCollectiveStart" in i.attributes for i in body.users[collective.name])
