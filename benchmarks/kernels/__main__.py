"""``python -m benchmarks.kernels [KERNEL ...]``: compiles for TPUs and appends the figures.

Needs the extra ``tpu-aot``, and no TPU: nothing is run, so there are no times among them.

``python -m benchmarks.kernels time [KERNEL ...]``: times them, on the TPU or the GPU of this
machine, and appends rows to ``kernels_times.json``.

``python -m benchmarks.kernels leaves [CHIP ...]``: a step over many small leaves, one by one and
packed, on the CPU and as the compilers that are installed make it; appends to
``kernels_leaves.json``.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from benchmarks import _results
from benchmarks.kernels import figures, leaves, times
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.parallel.topologies import SETTINGS, is_installed

RESULTS = _results.RESULTS / "kernels.json"
TIMES = _results.RESULTS / "kernels_times.json"
LEAVES = _results.RESULTS / "kernels_leaves.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    parser.add_argument(
        "names", nargs="*", help="leaves, and chips; time; kernels, or train_step: all by default"
    )
    options = parser.parse_args(arguments)
    command = " ".join(["python -m benchmarks.kernels", *options.names])
    stamp = _results.stamp(command, packages=("jax",) + ("libtpu",) * is_installed("libtpu"))
    what, *names = options.names or [""]
    if what == "time":
        file, rows = TIMES, times.measure(names)
    elif what == "leaves":
        file, rows = LEAVES, leaves.measure(names)
    else:
        file, rows = RESULTS, figures.measure(options.names)
    try:
        for row in rows:
            _results.append(file, row | stamp)
    except (UserError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] != ["time"]:  # they are of a machine without TPUs
        os.environ.update({**SETTINGS, **os.environ})
    sys.exit(main())
