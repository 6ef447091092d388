"""What a plan says for itself: tables for the terminal, JSON, and one HTML page."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxopt_suite.experiments import markup
from jaxopt_suite.experiments.markup import Block, Code, Grid, Heading, Item, Listing, Paragraph
from jaxopt_suite.parallel.chips import Chip
from jaxopt_suite.parallel.memory import PARTS
from jaxopt_suite.parallel.meshes import format_mesh
from jaxopt_suite.parallel.planning import GIB, Plan, axes_text

_LARGEST = 8  # arrays listed in the HTML page


@dataclasses.dataclass(frozen=True)
class Report:
    """Plans for the same pod, side by side.

    Attributes:
      plans: by optimizer; of one topology, mesh, model and batch.
      settings: the configuration, to be shown as it is.
      command: the command line that makes them.
      environment: versions and hardware, to be shown as they are.
    """

    plans: Mapping[str, Plan]
    settings: Mapping[str, Any]
    command: str
    environment: Mapping[str, str]

    @property
    def first(self) -> Plan:
        """The first plan: what is said of the pod and the mesh holds for all."""
        return next(iter(self.plans.values()))

    @property
    def title(self) -> str:
        """The model, the pod and the mesh, in a line."""
        plan = self.first
        return f"{self.settings['preset']} on {plan.topology.name}, mesh {format_mesh(plan.mesh)}"


def grids(report: Report) -> dict[str, Grid]:
    """The tables, by title: one column for each optimizer."""
    return {"Memory of one device, GiB": _memory(report), "One step, one device": _step(report)}


def constraints(report: Report) -> list[str]:
    """What limits each plan, a sentence each; with the optimizer's name if there are several."""
    many = len(report.plans) > 1
    return [f"{n}: {p.constraint}" if many else p.constraint for n, p in report.plans.items()]


def _memory(report: Report) -> Grid:
    plans = report.plans.values()
    rows = [(part, [_gib(plan.memory.parts[part]) for plan in plans]) for part in PARTS]
    rows += [
        ("at the peak, in all", [_gib(plan.memory.total) for plan in plans]),
        ("the compiler's figure", [_gib(plan.compiler_bytes) for plan in plans]),
        ("there is", [_gib(plan.available) for plan in plans]),
    ]
    if any(plan.memory.host for plan in plans):
        rows.append(("in the host's memory besides", [_gib(plan.memory.host) for plan in plans]))
    return _grid(report, rows)


def _step(report: Report) -> Grid:
    plans = report.plans.values()
    rows = [
        ("FLOP", [_flops(plan) for plan in plans]),
        ("bytes of memory traffic", [_amount(plan.hbm_bytes) for plan in plans]),
    ]
    for axes in dict.fromkeys(link.axes for plan in plans for link in plan.links):
        along = [[link for link in plan.links if link.axes == axes] for plan in plans]
        sent, largest = (
            [sum(getattr(link, name) for link in links) for links in along]
            for name in ("nbytes", "largest")
        )
        rows.append((f"bytes sent over {axes_text(axes)}", [_amount(nbytes) for nbytes in sent]))
        if sent != largest:
            rows.append(("in the largest step", [_amount(nbytes) for nbytes in largest]))
    for name in dict.fromkeys(name for plan in plans for name in plan.times):
        times = [plan.times.get(name) for plan in plans]
        rows.append((f"ms at least: {name}", ["" if t is None else _ms(t) for t in times]))
    rows += [
        ("ms at least: a step", [_ms(plan.bound) for plan in plans]),
        ("model FLOP of the peak, at most", [_share(plan.utilization) for plan in plans]),
        ("seconds to compile here", [f"{plan.compile_seconds:.0f}" for plan in plans]),
    ]
    return _grid(report, rows)


def _grid(report: Report, rows: Iterable[tuple[str, Sequence[str]]]) -> Grid:
    return Grid(("", *report.plans), [(name, *texts) for name, texts in rows])


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.3f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def _amount(value: float) -> str:
    """Three digits and a metric prefix: ``29.1 M``."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g}"


def _flops(plan: Plan) -> str:
    return _amount(plan.flops) + ("" if plan.exact else ", a loop of unknown length once")


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def chip_grid(chip: Chip) -> Grid:
    """The figures of the chip that the bounds are made of."""
    links = "to one neighbour, one way" if chip.torus else "to the host's other GPUs, one way"
    return Grid(
        (chip.title, "one chip"),
        [
            ("JAX devices", str(chip.devices)),
            ("memory, GiB", f"{chip.hbm_bytes / GIB:.4g}"),
            ("memory, bytes/s", _amount(chip.hbm_bandwidth)),
            ("bfloat16 products, FLOP/s", _amount(chip.bf16_flops)),
            (f"link {links}, bytes/s", _amount(chip.link_bandwidth)),
            ("network between hosts or slices, bytes/s", _amount(chip.network_bandwidth)),
        ],
    )


def statements(report: Report) -> list[str]:
    """How the figures are to be read, and what is not in them."""
    plan = report.first
    chip = plan.chip
    paths = ", ".join(f"{axes_text(link.axes)}: {link.path}" for link in plan.links)
    said = [
        "Everything is read from the program compiled for the pod. The bound is what the busiest "
        "resource needs at its published peak, all others overlapped with it: no step is faster.",
        "FLOP are those of matrix products and convolutions, loops by their trips, recomputation "
        "included; the peak is that of bfloat16 whatever the dtype.",
        f"Bytes on the wire are counted under the ring model{f' ({paths})' if paths else ''}; of "
        "workers that synchronise now and then, the mean over a round.",
    ]
    if chip.platform == "tpu":
        said.append(
            "The compiler's figure is its peak. Where a program's temporaries in main memory are "
            "smaller than those it keeps on the chip, it counts the latter instead."
        )
    else:
        said.append(
            "Compiled without a GPU: nothing is autotuned, so kernels and their scratch memory can "
            "differ from a real run; there are no memory kinds, so state cannot be offloaded."
        )
    for name, one in report.plans.items():
        if one.uncounted:
            listed = ", ".join(f"{what} ({times} times)" for what, times in one.uncounted.items())
            said.append(f"Not among the FLOP of {name}: {listed}.")
    return said


def document(report: Report) -> list[Block]:
    """The report as a document."""
    blocks: list[Block] = [Heading(f"Plan: {report.title}", 1), Code(report.command)]
    blocks += [Paragraph(sentence) for sentence in constraints(report)]
    for title, grid in grids(report).items():
        blocks += [Heading(title), grid]
    blocks += [
        Heading("What the parts are"),
        Listing([Item(f"{k}: {v}") for k, v in PARTS.items()]),
    ]
    for name, plan in report.plans.items():
        rows = [
            (array.shape, array.part, _gib(array.nbytes), array.op_name or array.name)
            for array in plan.memory.arrays[:_LARGEST]
        ]
        blocks.append(Heading(f"Largest arrays at the peak: {name}"))
        blocks.append(Grid(("array", "part", "GiB", "made by"), rows))
    chip = report.first.chip
    sources = [*chip.sources, *([f"Where sources differ: {chip.notes}"] if chip.notes else [])]
    blocks += [Heading("Figures of the chip"), chip_grid(chip)]
    blocks += [Listing([Item(source) for source in sources])]
    blocks += [Heading("How to read this"), Listing([Item(text) for text in statements(report)])]
    facts = {**report.settings, **report.environment}
    told = {name: value for name, value in facts.items() if value not in (None, "", ())}
    return [*blocks, Heading("Made with"), Listing([Item(f"{k}: {v}") for k, v in told.items()])]


def to_html(report: Report) -> str:
    """The report as one page that loads nothing."""
    return markup.to_html(document(report), title=f"Plan: {report.title}")


def to_json(report: Report) -> str:
    """Every number of the report as JSON text."""
    content = {
        "plans": {name: plan.to_json() for name, plan in report.plans.items()},
        "settings": dict(report.settings),
        "environment": dict(report.environment),
        "command": report.command,
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"
