"""``python -m benchmarks.kernels [KERNEL ...]``: compiles for TPUs and appends the figures.

Needs the extra ``tpu-aot``, and no TPU: nothing is run, so there are no times among them.

``python -m benchmarks.kernels time [KERNEL ...]``: times them, on the TPU or the GPU of this
machine, and appends rows to ``kernels_times.json``.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from benchmarks import _results
from benchmarks.kernels import figures, times
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.parallel.topologies import SETTINGS, is_installed

RESULTS = _results.RESULTS / "kernels.json"
TIMES = _results.RESULTS / "kernels_times.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    parser.add_argument(
        "names", nargs="*", help="kernels, or train_step; all by default; after time: to be timed"
    )
    options = parser.parse_args(arguments)
    command = " ".join(["python -m benchmarks.kernels", *options.names])
    stamp = _results.stamp(command, packages=("jax",) + ("libtpu",) * is_installed("libtpu"))
    timed = options.names[:1] == ["time"]
    try:
        rows = times.measure(options.names[1:]) if timed else figures.measure(options.names)
        for row in rows:
            _results.append(TIMES if timed else RESULTS, row | stamp)
    except (UserError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] != ["time"]:  # they are of a machine without TPUs
        os.environ.update({**SETTINGS, **os.environ})
    sys.exit(main())
