"""``python -m benchmarks.communication PART``: measures a part and appends its rows.

``wire``: bytes in programs compiled for TPUs (needs the extra ``tpu-aot``, and no TPU); meshes may
follow.
``recipes``: collectives of the recipes in such programs.
``diloco``: bytes of outer loops in such programs, averaged over a round, and memory.
``overhead``: time to compress and decompress, against a train step.
``task``: loss against bytes on the default task; names of variants may follow.
``outer_task``: the same of outer loops, and of workers that come and go; names may follow.
``utilisation``: the bandwidth that a share of computing needs, beside published figures.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import _results
from benchmarks.communication import (
    outer_loops,
    outer_task,
    overhead,
    recipes,
    task,
    utilisation,
    wire_bytes,
)
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.assembly import provide_cpu_devices
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.parallel.topologies import SETTINGS

Row = dict[str, Any]

PARTS: dict[str, tuple[str, Callable[..., Iterator[Row]], Callable[[list[Row]], bool]]] = {
    "wire": ("compressed_bytes.json", wire_bytes.measure, wire_bytes.kept),
    "recipes": ("recipe_collectives.json", recipes.measure, recipes.kept),
    "diloco": ("outer_loop_bytes.json", outer_loops.measure, outer_loops.kept),
    "overhead": ("compression_overhead.json", overhead.measure, overhead.kept),
    "task": ("communication_task.json", task.measure, task.kept),
    "outer_task": ("outer_loop_task.json", outer_task.measure, outer_task.kept),
    "utilisation": ("utilisation.json", utilisation.measure, utilisation.kept),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a promise is broken; 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.communication")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("names", nargs="*", help="variants of the task, or meshes of wire")
    options = parser.parse_args(arguments)
    if options.names and options.part not in ("wire", "task", "outer_task"):
        parser.error(f"{options.part} takes no names, got {' '.join(options.names)}")
    name, measure, kept = PARTS[options.part]
    given = {"names": options.names} if options.names else {}
    if options.part == "outer_task":
        provide_cpu_devices(TrainConfig(mesh=task.MESH))  # before the stamp, which starts JAX
    words = [options.part, *(f"'{each}'" for each in options.names)]
    stamp = _results.stamp(f"python -m benchmarks.communication {' '.join(words)}")
    rows = []
    try:
        for row in measure(**given):
            rows.append(row)
            _results.append(_results.RESULTS / name, row | stamp)
    except (UserError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if kept(rows) else 1


if __name__ == "__main__":
    os.environ.update({**SETTINGS, **os.environ})
    sys.exit(main())
