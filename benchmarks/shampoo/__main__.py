"""``python -m benchmarks.shampoo PART``: measures a part and appends its row.

``updates``: times of single updates, ours and those of Meta's Distributed Shampoo, in turns; needs
PyTorch and ``--reference``, a clone of facebookresearch/optimizers.
``train``: whole train steps against AdamW's, in turns.
``compile``: what compiling the update takes, by the number of layers.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import _results
from benchmarks.shampoo import compiling, train_steps, updates
from jaxopt_suite.core.errors import UserError

RESULTS = _results.RESULTS / "shampoo_times.json"
ENVIRONMENT = ("GLIBC_TUNABLES", "OPENBLAS_NUM_THREADS")  # what changes times on a CPU


def _measure(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """The row, and whether what is promised was kept."""
    command, packages = f"python -m benchmarks.shampoo {options.part}", ["jax", "optax"]
    if options.part == "updates":
        if options.reference is None:
            raise UserError("updates: --reference must name a clone of facebookresearch/optimizers")
        row, kept = updates.measure(options.reference), updates.kept
        command, packages = f"{command} --reference PATH", [*packages, "torch"]
    elif options.reference is not None:
        raise UserError(f"{options.part} has no reference, got --reference {options.reference}")
    elif options.part == "train":
        row, kept = train_steps.measure(), train_steps.kept
    else:
        row, kept = compiling.measure(), compiling.kept
    row["environment"] = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    stamp = _results.stamp(command, packages=tuple(packages))
    return {"part": options.part, **row, **stamp}, kept(row)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a promise is broken; 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shampoo", description=__doc__)
    parser.add_argument("part", choices=("updates", "train", "compile"))
    parser.add_argument("--reference", type=pathlib.Path, help="clone to compare updates with")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="file to append to")
    options = parser.parse_args(arguments)
    # As the command line has it; read when LAPACK is loaded, by the first decomposition.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        row, kept = _measure(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _results.append(options.results, row)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
