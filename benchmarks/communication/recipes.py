"""What the recipes that communicate send in train steps compiled for a TPU."""

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.communication.wire_bytes import among_workers, largest_float, local_shape
from jaxopt_suite import parallel
from jaxopt_suite.optimizers import registry
from jaxopt_suite.parallel import topologies

TOPOLOGY, MESH = "v5e:4x4", "worker=4,model=4"

# Its warm-up is dense Adam: the branch with the all-reduce is in the program, and runs until then.
DENSE_AT_FIRST = ("onebit_adam",)


def measure() -> Iterator[dict[str, Any]]:
    """One row: for every recipe its collectives of more than a number along the workers' axis.

    ``largest_float`` is the largest collective of floats, ``matrix_bytes`` what a device holds of a
    matrix in float32; bytes, per device and step.

    Raises:
      ModuleNotFoundError: if the TPU compiler is not installed; the message says how to get it.
    """
    devices = topologies.describe(TOPOLOGY).devices
    mesh = parallel.make_mesh(parallel.parse_mesh(MESH), devices=devices)
    matrix = 4 * math.prod(local_shape("up", mesh))
    rows = []
    for name, recipe in registry().items():
        if not recipe.communicates or recipe.apart:  # whose bytes are not those of a step
            continue
        found = among_workers(recipe.make(1e-3, axis_name="worker"), mesh)
        sent = [[f"{c.kind} {c.dtype}", c.payload, c.total] for c in found if c.payload > 4]
        row = {"recipe": name, "collectives": sent}
        rows.append(row | {"largest_float": largest_float(found), "matrix_bytes": matrix})
        print(rows[-1], flush=True)
    yield {"topology": TOPOLOGY, "mesh": MESH, "entries": rows}


def kept(rows: list[dict[str, Any]]) -> bool:
    """Whether no recipe sends a whole matrix of floats, but for those that do so at first."""
    return all(
        e["recipe"] in DENSE_AT_FIRST or e["largest_float"] < e["matrix_bytes"]
        for row in rows
        for e in row["entries"]
    )
