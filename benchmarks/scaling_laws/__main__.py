"""``python -m benchmarks.scaling_laws speed``: measures, and appends a row of results."""

import argparse
import sys
from collections.abc import Sequence

from benchmarks import _results
from benchmarks.scaling_laws import speed


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a limit is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling_laws")
    parser.add_argument("part", choices=["speed"])
    parser.parse_args(arguments)
    stamp = _results.stamp(
        "python -m benchmarks.scaling_laws speed", packages=("jax", "numpy", "scipy")
    )
    row = speed.measure()
    _results.append(_results.RESULTS / "scaling_speed.json", row | stamp)
    for name, value in row.items():
        print(f"{name}: {value}")
    return 0 if speed.kept(row) else 1


if __name__ == "__main__":
    sys.exit(main())
