"""What one device holds when it holds the most, by purpose, from the scheduled program.

``buffers`` says which arrays share memory and when; the largest sum over time is the peak, and each
buffer alive then is told from its makers. What this cannot know is how tightly the compiler packs:
holes between buffers are in the compiler's figure and not in ours.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import jax

from jaxopt_suite.parallel.buffers import Buffer, Timeline
from jaxopt_suite.parallel.hlo import Module

PARTS: Mapping[str, str] = {
    "parameters": "as the step receives and returns them",
    "optimizer state": "likewise",
    "batch": "and whatever else the step receives",
    "gradients": "made by the backward pass, in the shape of a parameter's part on one device",
    "activations": "made from the batch by the forward pass, or made again for the backward pass",
    "temporaries": "the rest: copies of parameters (cast, stacked, gathered), the backward pass's "
    "and the optimizer's intermediate results",
}
"""Everything that a byte at the peak can be."""

_HOST = 5  # the memory space of pinned host memory
_ARGUMENTS = {"parameters": r"\w+\.params\b", "optimizer state": r"\w+\.opt_state\b"}


@dataclasses.dataclass(frozen=True)
class Held:
    """An array that is held at the peak.

    Attributes:
      part: one of ``PARTS``.
      nbytes: with the padding of its layout.
      shape: element type and dimensions, as ``f32[8,128]``.
      name: of the instruction that makes it.
      op_name: where in the JAX program that is; empty if the compiler does not say.
    """

    part: str
    nbytes: int
    shape: str
    name: str
    op_name: str


@dataclasses.dataclass(frozen=True)
class Memory:
    """The peak of one device's memory.

    Attributes:
      parts: bytes of the device's main memory by part, for each of ``PARTS``.
      host: bytes of arguments and results in pinned host memory.
      at: the instruction during which the peak is reached.
      op_name: where in the JAX program that is.
      arrays: what is held then, largest first.
    """

    parts: Mapping[str, int]
    host: int
    at: str
    op_name: str
    arrays: tuple[Held, ...]

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


def peak(module: Module, *, gradient_shapes: Iterable[Sequence[int]] = ()) -> Memory:
    """Finds the most that one device holds at any moment of one step.

    Args:
      module: what ``hlo.parse`` makes of a compiled step's text. Its arguments are a ``TrainState``
        and a batch, and its scopes those of ``make_train_step``.
      gradient_shapes: the shapes that gradients may have on one device.

    Raises:
      ValueError: if the program is not scheduled.
    """
    timeline = Timeline(module)
    found = timeline.buffers()
    in_main = [buffer for buffer in found if not buffer.shape.memory_space]
    time = _time_of_peak(in_main)
    batch = {
        int(parameter.arguments)
        for parameter in module.computations[module.entry].parameters
        if _argument(parameter.op_name) == "batch"
    }
    shapes = {tuple(sorted(shape)) for shape in gradient_shapes}
    arrays = [
        _held(buffer, _part(buffer, shapes, batch))
        for buffer in sorted(in_main, key=lambda buffer: -buffer.nbytes)
        if buffer.start <= time <= buffer.end
    ]
    at = timeline.instructions[time]
    last = len(timeline.instructions) - 1
    return Memory(
        parts={part: sum(a.nbytes for a in arrays if a.part == part) for part in PARTS},
        host=sum(b.nbytes for b in found if b.shape.memory_space == _HOST and b.end == last),
        at=at.name,
        op_name=at.op_name,
        arrays=tuple(arrays),
    )


def compiler_figures(compiled: jax.stages.Compiled, platform: str) -> dict[str, int]:
    """What the compiler says itself of the bytes on one device.

    Args:
      compiled: the program.
      platform: of the devices it is for: ``tpu``, ``gpu`` or ``cpu``.

    Returns:
      ``peak``: the most that is held at any moment. TPU only: others do not say it, or say less.
      Where a program's temporaries in main memory are smaller than those in the chip's own (at most
      128 MiB on v5e), the latter are counted instead.
      ``sum``: arguments, plus results in memory of their own, plus temporaries. On CPU and GPU it
      is what will be allocated. On TPU (JAX 0.10.2) it is too much: for a step that updates its
      argument it can exceed the memory of a chip on which the program fits and compiles.

    Raises:
      ValueError: if it says nothing.
    """
    m = compiled.memory_analysis()
    if m is None:
        raise ValueError("the compiler tells nothing of this program's memory")
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    figures = {"sum": m.argument_size_in_bytes + results + m.temp_size_in_bytes}
    if platform == "tpu":  # where arguments in the host's memory are counted in
        figures["peak"] = m.peak_memory_in_bytes - m.host_argument_size_in_bytes
    return figures


def _time_of_peak(buffers: Iterable[Buffer]) -> int:
    change: dict[int, int] = defaultdict(int)
    for buffer in buffers:
        change[buffer.start] += buffer.nbytes
        change[buffer.end + 1] -= buffer.nbytes
    held, most, when = 0, -1, 0
    for time in sorted(change):
        held += change[time]
        if held > most:
            most, when = held, time
    return when


def _part(buffer: Buffer, gradient_shapes: set[tuple[int, ...]], batch: set[int]) -> str:
    for maker in buffer.makers:
        if maker.opcode == "parameter":
            return _argument(maker.op_name)
    names = [maker.op_name for maker in buffer.makers]
    if not any("/gradients/" in name for name in names) or not buffer.sources & batch:
        return "temporaries"
    if not any(_is_backward(name) for name in names):
        return "activations"
    shapes = {tuple(sorted(s.dims)) for maker in buffer.makers for s in maker.shapes}
    return "gradients" if shapes & gradient_shapes else "temporaries"


def _is_backward(op_name: str) -> bool:
    return "transpose(" in op_name and "rematted_computation" not in op_name


def _argument(op_name: str) -> str:
    """The part of an argument, whose name in the program is ``state.params['w']`` and the like."""
    return next((part for part, name in _ARGUMENTS.items() if re.match(name, op_name)), "batch")


def _held(buffer: Buffer, part: str) -> Held:
    dims = ",".join(map(str, buffer.shape.dims))
    names = [maker.op_name for maker in buffer.makers]
    told = next((name for name in names if "/" in name), names[0])
    return Held(part, buffer.nbytes, f"{buffer.shape.dtype}[{dims}]", buffer.makers[0].name, told)
