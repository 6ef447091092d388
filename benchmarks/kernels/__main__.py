"""``python -m benchmarks.kernels [KERNEL ...]``: compiles for TPUs and appends the figures.

Needs the extra ``tpu-aot``, and no TPU: nothing is run, so there are no times among them.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from benchmarks import _results
from benchmarks.kernels import figures
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.parallel.topologies import SETTINGS, is_installed

RESULTS = _results.RESULTS / "kernels.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels")
    parser.add_argument("names", nargs="*", help="kernels, or train_step; all by default")
    options = parser.parse_args(arguments)
    command = " ".join(["python -m benchmarks.kernels", *options.names])
    stamp = _results.stamp(command, packages=("jax",) + ("libtpu",) * is_installed("libtpu"))
    try:
        for row in figures.measure(options.names):
            _results.append(RESULTS, row | stamp)
    except (UserError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    os.environ.update({**SETTINGS, **os.environ})
    sys.exit(main())
