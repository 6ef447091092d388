"""What a train step will need on a pod nobody has rented yet, from the program compiled for it.

``plan`` compiles the real step for the pod's chips on whatever machine this is, and reads the
compiled program: what lies in memory, what is computed, what crosses the wire. Divided by what the
chips can do that gives a bound: no step is faster, and most are slower.
"""

import dataclasses
import math
import pathlib
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxopt_suite.parallel import cost, hlo, memory, meshes, wire
from jaxopt_suite.parallel.chips import Chip
from jaxopt_suite.parallel.memory import Memory
from jaxopt_suite.parallel.topologies import Topology, describe

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Link:
    """What goes over the wire along some axes of the mesh, in one step.

    Attributes:
      axes: mesh axes; empty for what cannot be attributed.
      nbytes: sent by one device, under the ring model; where steps differ, the mean over a round.
      largest: sent by one device in the step that sends the most.
      bandwidth: of one device along these axes, bytes/s.
      path: where that goes, in words.
    """

    axes: tuple[str, ...]
    nbytes: float
    largest: float
    bandwidth: float
    path: str

    @property
    def seconds(self) -> float:
        """Time on the wire at full bandwidth."""
        return self.nbytes / self.bandwidth


@dataclasses.dataclass(frozen=True)
class Plan:
    """A compiled train step, seen from one of its devices.

    Attributes:
      topology: the pod.
      mesh: sizes by axis.
      memory: what one device holds at the peak, by part.
      compiler: the compiler's own figures for the same, as ``memory.compiler_figures`` gives them.
      available: bytes that the compiler may use on one device.
      flops: of the matrix products and convolutions of one device in one step, as compiled:
        recomputation included.
      uncounted: what else computes, by name: how often it runs (kernels, library routines).
      exact: whether every loop's trips are known; if not, the loop is counted once.
      model_flops: that the model needs per step on all devices together; None if not told.
      hbm_bytes: read from and written to the memory of one device in one step.
      links: bytes on the wire.
      compile_seconds: for lowering and compiling, on this machine.
    """

    topology: Topology
    mesh: Mapping[str, int]
    memory: Memory
    compiler: Mapping[str, int]
    available: float
    flops: float
    uncounted: Mapping[str, int]
    exact: bool
    model_flops: float | None
    hbm_bytes: float
    links: tuple[Link, ...]
    compile_seconds: float

    @property
    def chip(self) -> Chip:
        """The chip whose figures are used."""
        return self.topology.chip

    @property
    def compiler_bytes(self) -> int:
        """The compiler's figure that ours is to be compared with: the peak if it tells one."""
        return self.compiler.get("peak", self.compiler.get("sum", 0))

    @property
    def needed(self) -> int:
        """Bytes needed on one device: the larger of our figure and the compiler's."""
        return max(self.memory.total, self.compiler_bytes)

    @property
    def fits(self) -> bool:
        """Whether the step fits in the memory of a device."""
        return self.needed <= self.available

    @property
    def times(self) -> dict[str, float]:
        """Seconds that each resource is busy in one step at its peak rate, by resource."""
        share = self.chip.devices
        times = {
            "compute": self.flops * share / self.chip.bf16_flops,
            "memory traffic": self.hbm_bytes * share / self.chip.hbm_bandwidth,
        }
        return times | {f"wire ({axes_text(link.axes)})": link.seconds for link in self.links}

    @property
    def bound(self) -> float:
        """Seconds that a step takes at least, however well everything overlaps."""
        return max(self.times.values())

    @property
    def utilization(self) -> float | None:
        """Share of the peak FLOP/s that the model's FLOPs are at the bound; None if not told."""
        if self.model_flops is None:
            return None
        peak = self.chip.bf16_flops / self.chip.devices * len(self.topology.devices)
        return self.model_flops / (self.bound * peak)

    @property
    def constraint(self) -> str:
        """What limits the step, in one sentence."""
        if not self.fits:
            part, size = max(self.memory.parts.items(), key=lambda item: item[1])
            needed, available = self.needed / GIB, self.available / GIB
            return (
                f"Does not fit: a device needs {needed:.4g} of {available:.4g} GiB, and "
                f"{size / GIB:.3g} of them are {part}."
            )
        first, *others = sorted(self.times.items(), key=lambda item: -item[1])
        rest = ", ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in others)
        return (
            f"Bound by {first[0]}: a step takes at least {_milliseconds(first[1])} ({rest}); "
            f"memory is {self.needed / self.available:.0%} full."
        )

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dictionaries. Bytes, seconds, FLOP."""
        return {
            "topology": self.topology.name,
            "devices": len(self.topology.devices),
            "mesh": dict(self.mesh),
            "chip": dataclasses.asdict(self.chip),
            "memory": {
                "parts": dict(self.memory.parts),
                "total": self.memory.total,
                "compiler": dict(self.compiler),
                "available": self.available,
                "host": self.memory.host,
                "peak_at": self.memory.op_name or self.memory.at,
                "largest": [dataclasses.asdict(array) for array in self.memory.arrays[:20]],
            },
            "flops": self.flops,
            "uncounted": dict(self.uncounted),
            "exact": self.exact,
            "model_flops": self.model_flops,
            "hbm_bytes": self.hbm_bytes,
            "wire": [dataclasses.asdict(link) for link in self.links],
            "seconds": self.times,
            "bound": self.bound,
            "utilization": self.utilization,
            "fits": self.fits,
            "constraint": self.constraint,
            "compile_seconds": self.compile_seconds,
        }


def plan(
    make_step: Callable[[Mesh], Any],
    params_like: Any,
    batch_like: Any,
    *,
    topology: str | Topology,
    mesh: Mapping[str, int],
    model_flops: float | None = None,
    steps_per_round: int | None = None,
) -> Plan:
    """Compiles a train step for a topology and reads off what it needs.

    Args:
      make_step: gives the ``TrainStep`` for a mesh, as ``make_train_step`` does.
      params_like: the parameters' shapes and dtypes.
      batch_like: the whole batch's shapes and dtypes.
      topology: its name, such as ``"v5e:16x16"``, or what ``topologies.describe`` gave.
      mesh: sizes by axis name; their product is the number of devices.
      model_flops: what the model needs per step, on all devices together, for ``utilization``.
      steps_per_round: steps in which each branch that sends between workers is taken once, as an
        outer loop's. None: branches count as if all were taken in every step.

    Returns:
      The plan, whether or not the step fits.

    Raises:
      ValueError: if the topology does not exist, the mesh does not use exactly its devices, or the
        step cannot be split so.
      ModuleNotFoundError: if the compiler for the topology is not installed.
    """
    pod = describe(topology) if isinstance(topology, str) else topology
    if math.prod(mesh.values()) != len(pod.devices):
        raise ValueError(
            f"mesh {meshes.format_mesh(mesh)} has {math.prod(mesh.values())} devices, and topology "
            f"{pod.name} has {len(pod.devices)}: sizes must multiply to that"
        )
    grid = meshes.make_mesh(mesh, devices=pod.devices)
    step = make_step(grid)
    start = time.perf_counter()
    program = _compile(step.lower(params_like, batch_like), pod)
    seconds = time.perf_counter() - start
    module = hlo.parse(program.text)
    flops = cost.flops(module)
    return Plan(
        topology=pod,
        mesh=dict(mesh),
        memory=memory.peak(
            module, gradient_shapes=_gradient_shapes(step.abstract_state(params_like))
        ),
        compiler=program.figures,
        available=program.available,
        flops=flops.total,
        uncounted=flops.uncounted,
        exact=flops.exact,
        model_flops=model_flops,
        hbm_bytes=cost.hbm_bytes(module),
        links=_links(module, grid, pod, steps_per_round, step.placement.worker_axis),
        compile_seconds=seconds,
    )


@dataclasses.dataclass(frozen=True)
class _Compiled:
    text: str
    figures: Mapping[str, int]  # the compiler's own
    available: float


def _compile(lowered: jax.stages.Lowered, pod: Topology) -> _Compiled:
    """Compiles; a program that does not fit is scheduled all the same, and read from a dump."""
    available = pod.chip.hbm_bytes / pod.chip.devices
    try:
        compiled = lowered.compile()
        figures = memory.compiler_figures(compiled, pod.devices[0].platform)
        return _Compiled(compiled.as_text() or "", figures, available)
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)G\)", str(error))
        if not found:
            raise
    scale = 1024 ** ("KMGT".index(found[2]) + 1)
    figures = {"peak": int(float(found[1]) * scale)}
    return _Compiled(_dumped(lowered), figures, float(found[3]) * GIB)


def _dumped(lowered: jax.stages.Lowered) -> str:
    """The scheduled program that the compiler writes down before it finds that it does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError:
            (text,) = pathlib.Path(folder).glob("*after_optimizations.txt")
            return text.read_text()
    raise RuntimeError("a program that did not fit at first fitted when it was compiled again")


def _gradient_shapes(state: Any) -> set[tuple[int, ...]]:
    """Shapes that gradients may have on one device.

    Those of the shards of parameters and optimizer state; and of equal ones side by side, as a loop
    over layers has them: as many as have the last part of their name and their shape in common.
    """
    shard = lambda leaf: leaf.sharding.shard_shape(leaf.shape)
    shapes = {shard(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim}
    layers = Counter(
        (jax.tree_util.keystr(path[-1:]), shard(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    )
    shapes |= {(count, *shape) for (_, shape), count in layers.items() if count > 1}
    return shapes | {tuple(size for size in shape if size != 1) for shape in shapes}


def _links(
    module: hlo.Module, mesh: Mesh, pod: Topology, steps: int | None, worker_axis: str | None
) -> tuple[Link, ...]:
    found: dict[tuple[str, ...] | None, list[wire.Collective]] = {}
    for c in wire.collectives(module, mesh):
        if c.nbytes:
            found.setdefault(c.axes, []).append(c)
    links = []
    for axes, along in found.items():
        sent = wire.traffic(along, steps=steps, axis=worker_axis)
        bandwidth, path = pod.bandwidth(mesh, axes or tuple(mesh.axis_names))
        links.append(Link(axes or (), sent.mean, sent.largest, bandwidth, path))
    return tuple(links)


def axes_text(axes: tuple[str, ...]) -> str:
    """Mesh axes in words."""
    return " and ".join(axes) or "unknown axes"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
