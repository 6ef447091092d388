"""Bytes that a compiled program puts on the wire, read from its text.

``collectives`` lists what the program really does, after XLA has split, merged, moved, narrowed and
fused: each collective once, with its size, its group, the mesh axes it runs along, and how often it
runs. Sizes become bytes under the ring model, in which each of ``g`` devices sends

    all-reduce                    2 S (g-1)/g   S: bytes of the operand
    reduce-scatter, all-to-all      S (g-1)/g
    all-gather                      R (g-1)/g   R: bytes of the result
    collective-permute              S           from a device that is the source of a pair
    collective-broadcast, send      S
    dcn-send                        S           handed to the network between TPU slices

and nothing if it is alone. Latency and contention are not in it, and bytes are those of the shapes
printed: without the padding of tiles, with the padding that XLA made part of the program.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from jax.sharding import AbstractMesh, Mesh

from jaxopt_suite.parallel import groups, hlo


class Program(Protocol):
    """Anything that prints itself as HLO, such as ``jax.stages.Compiled``."""

    def as_text(self) -> str | None:
        """Optimised HLO text."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program, as one device runs it."""

    kind: str  # a name in the table above, or "ragged-all-to-all"
    dtype: str  # as printed, "f32"; "bf16+f32" where one collective moves both
    nbytes: float  # sent per device per execution
    payload: int  # the bytes S of the operand, or R of the result of an all-gather
    group_size: int
    axes: tuple[str, ...] | None  # mesh axes in mesh order; None: no mesh given, or not whole axes
    times: int  # executions in one of the program
    exact: bool  # False: an unknown number of times or of bytes; see `collectives`
    branch: tuple[str, str] | None  # the outermost conditional it is in, and the branch of that
    name: str  # of the instruction
    op_name: str  # JAX's name stack

    @property
    def total(self) -> float:
        """Bytes sent per device in one execution of the program."""
        return self.nbytes * self.times

    @property
    def conditional(self) -> bool:
        """Whether it is in a branch that may not be taken."""
        return self.branch is not None


class Traffic(NamedTuple):
    """Bytes that one device sends in a step, where not all steps send alike."""

    mean: float  # over a round of steps
    largest: float  # of the step that sends the most


_GROUPED = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all")
_LINKED = ("collective-permute", "collective-broadcast", "send")
_ID_OF_PARTITION = ("all-to-all", "ragged-all-to-all", "collective-broadcast")
_MEGASCALE = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
_CHAIN = re.compile(r'chain_id="([^"]*)"')
_TARGET = re.compile(r"_xla_megascale_target=\"?(\{+)([\d,]+)")
_IDS_PER_SLICE = 100_000  # devices of TPU slice i have the ids from (i + 1) times this
_SLICE_SIZES = re.compile(r"slice_sizes=\{\{([\d,]*)\}")


def collectives(
    compiled: Program | hlo.Module | str, mesh: Mesh | AbstractMesh | None = None
) -> list[Collective]:
    """Every collective of a program once, in the order of the text.

    In a loop whose trips the text does not tell, ``exact`` is False and ``times`` counts one trip.
    It is False too for a ragged all-to-all, whose sizes are data: it counts as if every row was
    sent, evenly. A collective of a conditional's branch counts as if that branch was always taken.

    Args:
      compiled: what ``jax.jit(f).lower(...).compile()`` gives, its text, or that text parsed.
      mesh: of the program, to attribute traffic to axes; an abstract mesh will do, except for
        traffic between TPU slices, where the devices tell which axes cross them.

    Raises:
      ValueError: if the text is not that of an HLO module, or the mesh has another size than the
        program.
    """
    module = _module(compiled)
    if mesh is not None:
        groups.parts(mesh, module.num_partitions)  # raises if it is not the program's
    times = hlo.executions(module)
    return [
        _collective(module, kind, computation, instruction, times[computation.name], mesh)
        for kind, computation, instruction in _once(module, times)
    ]


def bytes_sent(
    compiled: Program | hlo.Module | str,
    mesh: Mesh | AbstractMesh | None = None,
    *,
    conditional: bool = True,
) -> float:
    """Bytes that one device sends in one execution of the program.

    Args:
      compiled: as for ``collectives``.
      mesh: as for ``collectives``.
      conditional: whether to count the collectives in branches, each branch as if it was taken.
    """
    found = collectives(compiled, mesh)
    return sum((c.total for c in found if conditional or not c.conditional), 0.0)


def traffic(
    found: Iterable[Collective], *, steps: int | None = None, axis: str | None = None
) -> Traffic:
    """Mean and largest bytes of a step of a program that is run again and again.

    A program does not say how often a branch is taken; an outer loop does, once in ``steps``
    executions of the program. The step that sends the most is one in which every conditional takes
    its dearest branch.

    Args:
      found: what ``collectives`` gave.
      steps: executions of the program in which each branch is taken once. None: not known, and
        branches count as if all of them were always taken, which is the most there can be.
      axis: the mesh axis that ``steps`` is about; branches count so too for what does not go along
        it. None: it is about all branches.
    """
    always, branches = 0.0, defaultdict[str, dict[str, float]](lambda: defaultdict(float))
    for c in found:
        concerned = axis is None or (c.axes is not None and axis in c.axes)
        if steps is None or c.branch is None or not concerned:
            always += c.total
        else:
            conditional, branch = c.branch
            branches[conditional][branch] += c.total
    dearest = sum(max(sent.values()) for sent in branches.values())
    every = sum(sum(sent.values()) for sent in branches.values())
    return Traffic(always + every / (steps or 1), always + dearest)


def bytes_by_axis(
    compiled: Program | hlo.Module | str, mesh: Mesh | AbstractMesh
) -> dict[tuple[str, ...] | None, float]:
    """Bytes that one device sends, by the mesh axes they go along; None for those unattributed.

    A collective over several axes has a key of its own. The values add up to ``bytes_sent``.
    """
    by_axis: dict[tuple[str, ...] | None, float] = {}
    for c in collectives(compiled, mesh):
        if c.nbytes:
            by_axis[c.axes] = by_axis.get(c.axes, 0.0) + c.total
    return by_axis


def _module(compiled: Program | hlo.Module | str) -> hlo.Module:
    if isinstance(compiled, hlo.Module):
        return compiled
    return hlo.parse(compiled if isinstance(compiled, str) else compiled.as_text() or "")


def _once(
    module: hlo.Module, times: Mapping[str, hlo.Times]
) -> Iterator[tuple[str, hlo.Computation, hlo.Instruction]]:
    """Kind, place and instruction of every collective that runs.

    TPU programs print a collective that is overlapped with other work several times: where it
    starts, in each fusion it runs beside, and where it ends, linked by a ``chain_id``. The start
    counts. They also fuse an all-reduce with the slicing of its result, and then run a
    reduce-scatter.
    """
    for computation in module.computations.values():
        if computation.name not in times:
            continue
        starts = any("AsyncCollectiveStart" in i.attributes for i in computation.instructions)
        for instruction in computation.instructions:
            kind = _kind(computation, instruction)
            if kind and (starts or not _CHAIN.search(instruction.attributes)):
                yield kind, computation, instruction


def _kind(computation: hlo.Computation, instruction: hlo.Instruction) -> str | None:
    kind = instruction.opcode.removesuffix("-start")
    if kind == "send" and "is_host_transfer=true" in instruction.attributes:
        return "dcn-send" if _MEGASCALE in instruction.attributes else None
    if kind == "all-reduce" and _only_sliced(computation, instruction.name):
        return "reduce-scatter"
    return kind if kind in _GROUPED + _LINKED else None


def _only_sliced(computation: hlo.Computation, name: str) -> bool:
    """Whether this is a TPU fusion that keeps but a slice of each part of a value."""
    if not computation.name.startswith("all-reduce-scatter"):
        return False
    users = [i for i in computation.instructions if name in i.operands]
    return all(
        user.opcode == "dynamic-slice"
        or (user.opcode == "get-tuple-element" and _only_sliced(computation, user.name))
        for user in users
    )


def _collective(
    module: hlo.Module,
    kind: str,
    computation: hlo.Computation,
    instruction: hlo.Instruction,
    times: hlo.Times,
    mesh: Mesh | AbstractMesh | None,
) -> Collective:
    operands = _operands(kind, computation, instruction)
    members, axes = _members(module, kind, instruction, mesh)
    group_size = max((len(group) for group in members), default=1)
    payload = sum(shape.nbytes for shape in operands) * (group_size if kind == "all-gather" else 1)
    sent: float = payload
    if kind in _GROUPED:
        sent = (2 if kind == "all-reduce" else 1) * payload * (group_size - 1) / group_size
    elif kind != "dcn-send" and group_size == 1:
        sent = 0
    return Collective(
        kind=kind,
        dtype="+".join(sorted({shape.dtype for shape in operands})),
        nbytes=float(sent),
        payload=payload,
        group_size=group_size,
        axes=axes,
        times=times.count,
        exact=times.exact and kind != "ragged-all-to-all",
        branch=times.branch,
        name=instruction.name,
        op_name=instruction.op_name,
    )


def _operands(
    kind: str, computation: hlo.Computation, instruction: hlo.Instruction
) -> list[hlo.Shape]:
    """What is sent; operands look the same in every form of a collective, results do not."""
    names = instruction.operands
    sliced = _SLICE_SIZES.search(instruction.attributes)
    if kind in ("send", "dcn-send", "ragged-all-to-all") or sliced:
        names = names[:1]  # the others are a token, or say where pieces lie
    shapes = [shape for name in names for shape in computation.by_name[name].shapes]
    if sliced:
        dims = tuple(int(size) for size in sliced[1].split(","))
        return [shape._replace(dims=dims) for shape in shapes]
    return shapes


def _members(
    module: hlo.Module,
    kind: str,
    instruction: hlo.Instruction,
    mesh: Mesh | AbstractMesh | None,
) -> tuple[groups.Groups, tuple[str, ...] | None]:
    """The groups of a collective, and the mesh axes they run along."""
    attributes, count = instruction.attributes, module.num_partitions
    if kind == "dcn-send":
        slices = _slices(attributes)
        axes = None if mesh is None else groups.axes_between_slices(mesh, len(slices))
        return [slices], axes
    if kind in ("collective-permute", "send"):
        pairs = groups.pairs(attributes)
        if mesh is None:
            return groups.linked(pairs), None
        axes = groups.axes_of(pairs, mesh, num_partitions=count, whole=False)
        return groups.linked(pairs), axes
    members = groups.replica_groups(attributes, count)
    by_replica = "use_global_device_ids=true" not in attributes and "channel_id=" in attributes
    if by_replica and kind not in _ID_OF_PARTITION:
        members = [list(range(count))]  # groups of replicas, each of all partitions
    if mesh is None:
        return members, None
    return members, groups.axes_of(members, mesh, num_partitions=count)


def _slices(attributes: str) -> list[int]:
    """The TPU slices that a transfer is between: ``{1,2}x{0:3}``, or ids of devices in groups."""
    found = _TARGET.search(attributes)
    if found is None:
        return [1, 2]  # a sender and a receiver
    numbers = [int(number) for number in found[2].split(",")]
    per_slice = _IDS_PER_SLICE if found[1] == "{{" else 1
    return sorted({number // per_slice for number in numbers})
