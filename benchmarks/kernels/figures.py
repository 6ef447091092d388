"""The compiler's figures of a program, and what is least for its arguments and results."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import _results
from benchmarks.kernels import steps
from benchmarks.kernels.cases import all_cases, compiled
from jaxopt_suite.parallel import topologies

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1")


def measure(names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A row for every case and chip.

    Args:
      names: of kernels, or ``train_step``; none: all.

    Raises:
      UserError: if there is no kernel of such a name.
      ModuleNotFoundError: if the TPU compiler is not installed; the message says how to get it.
    """
    cases = list(all_cases())
    _results.check_names("kernel", names, {case.kernel for case in cases} | {steps.NAME})
    for topology in TOPOLOGIES:
        devices = np.array(topologies.describe(topology).devices[:1])
        mesh = Mesh(devices, ("chip",), axis_types=(AxisType.Auto,))
        place = NamedSharding(mesh, PartitionSpec())
        for case in cases:
            if names and case.kernel not in names:
                continue
            row = {"kernel": case.kernel, "case": case.what, "topology": topology}
            row["xla"] = _figures(compiled(case, "xla", place))
            row["pallas"] = _figures(compiled(case, "pallas", place))
            print(_line(row), flush=True)
            yield row
    if not names or steps.NAME in names:
        for what, programs in steps.programs():
            row = {"kernel": steps.NAME, "case": what, "topology": steps.POD}
            row |= {impl: _figures(program) for impl, program in programs.items()}
            print(_line(row), flush=True)
            yield row


def _figures(program: Any) -> dict[str, int]:
    """Bytes and FLOPs of a kernel are its own estimate: the compiler does not look inside."""
    cost, memory = program.cost_analysis(), program.memory_analysis()
    return {
        "flops": int(cost.get("flops", 0)),
        "bytes_accessed": int(cost["bytes accessed"]),
        "temporary_bytes": memory.temp_size_in_bytes,
        "least_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes,
    }


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['topology']:10s} {row['kernel']} {row['case']:58s}"]
    for impl in ("xla", "pallas"):
        found = row[impl]
        parts.append(
            f"{impl}: {found['flops'] / 1e9:6.2f} GFLOP {found['bytes_accessed'] / 1e6:7.1f} MB "
            f"temp {found['temporary_bytes'] / 1e6:6.1f}"
        )
    return "  ".join(parts)
