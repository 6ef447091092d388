"""``python -m benchmarks.scaling_laws speed`` or ``sweep``: measures, and adds to the results."""

import argparse
import sys
from collections.abc import Sequence

from benchmarks import _results
from benchmarks.scaling_laws import speed, sweep


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a limit is missed or a run diverged, more if a signal stopped the sweep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling_laws")
    parser.add_argument("part", choices=["speed", "sweep"])
    part = parser.parse_args(arguments).part
    return sweep.main() if part == "sweep" else _measure_speed()


def _measure_speed() -> int:
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
