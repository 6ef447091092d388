"""``python -m benchmarks.scaling_laws PART``: measures a part, and adds to the results.

``speed``: fits and resamples against SciPy. ``planted``: random laws of every form recovered.
``sweep``: trains small models, for runs of our own to fit.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import _results
from benchmarks.scaling_laws import planted, speed, sweep
from benchmarks.scaling_laws.designs import designs


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if a limit is missed or a run diverged, more if a signal stopped the sweep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling_laws")
    parser.add_argument("part", choices=["speed", "planted", "sweep"])
    parser.add_argument("--law", choices=list(designs()), help="plant this one only")
    chosen = parser.parse_args(arguments)
    if chosen.law and chosen.part != "planted":
        parser.error(f"--law is for planted, got {chosen.part}")
    if chosen.part == "sweep":
        return sweep.main()
    packages = ("jax", "numpy", "scipy") if chosen.part == "speed" else ("jax", "numpy")
    command = f"python -m benchmarks.scaling_laws {chosen.part}"
    command += f" --law {chosen.law}" if chosen.law else ""
    kept = True
    for row, good in _rows(chosen.part, chosen.law):
        stamp = _results.stamp(command, packages=packages)
        _results.append(_results.RESULTS / f"scaling_{chosen.part}.json", row | stamp)
        for name, value in row.items():
            print(f"{name}: {value}", flush=True)
        kept &= good
    return 0 if kept else 1


def _rows(part: str, law: str | None) -> Iterator[tuple[dict[str, Any], bool]]:
    if part == "speed":
        row = speed.measure()
        yield row, speed.kept(row)
        return
    for name in [law] if law else designs():
        row = planted.measure(name)
        yield row, planted.kept(row)


if __name__ == "__main__":
    sys.exit(main())
