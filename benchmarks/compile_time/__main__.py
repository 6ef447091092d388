"""``python -m benchmarks.compile_time``: prints two lines and appends a row to the results."""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _results
from benchmarks.compile_time import steps
from benchmarks.step_time import timing
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.assembly import find_preset, provide_cpu_devices
from jaxopt_suite.experiments.config import TrainConfig, at_least
from jaxopt_suite.parallel.meshes import make_mesh, parse_mesh

MESH = "data=8"
TARGET = 1.15  # times the time of the step written by hand
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
RESULTS = _results.RESULTS / "compile_time.json"


def measure(
    preset: str, *, batch_size: int, seq_len: int, rounds: int, clock: str = "wall"
) -> list[dict[str, Any]]:
    """Compiles both steps in turns, with the layers written out and in a loop.

    Args:
      preset: of the model.
      batch_size: sequences; nothing is run, so it costs nothing.
      seq_len: bytes predicted per sequence.
      rounds: timed compilations of each, after one that is not counted.
      clock: one of ``CLOCKS``.
    """
    read = CLOCKS[clock]
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len + 1), jnp.int32)
    rows = []
    for scan_layers in (False, True):
        task = steps.Task(find_preset(preset), make_mesh(parse_mesh(MESH)), tokens, scan_layers)
        compared = timing.compare(
            steps.compiling(task, steps.ours, read),
            steps.compiling(task, steps.by_hand, read),
            rounds=rounds,
            warm_up=1,
        )
        reached = compared.ratio <= TARGET
        layers = "in a loop" if scan_layers else "written out"
        rows.append(
            {
                "layers": layers,
                **dataclasses.asdict(compared),
                "target": TARGET,
                "reached": reached,
            }
        )
        print(
            f"layers {layers:11s} {compared.ms / 1e3:7.2f} s, by hand "
            f"{compared.baseline_ms / 1e3:7.2f} s, ratio {compared.ratio:.3f} "
            f"({compared.low:.2f} - {compared.high:.2f}), target {TARGET:.2f}"
            + ("" if reached else " MISSED"),
            flush=True,
        )
    return rows


def _measure(options: argparse.Namespace) -> bool:
    """Measures, appends the row, and returns whether the target was reached."""
    at_least("rounds", options.rounds, 1)
    provide_cpu_devices(TrainConfig(mesh=MESH))
    sizes = {"batch_size": options.batch_size, "seq_len": options.seq_len}
    rows = measure(options.preset, rounds=options.rounds, clock=options.clock, **sizes)
    command = f"python -m benchmarks.compile_time --preset {options.preset}"
    command += f" --rounds {options.rounds} --clock {options.clock}"
    facts = {"preset": options.preset, "mesh": MESH, **sizes, "optimizer": "adamw"}
    row = {**facts, "clock": options.clock, "steps": rows}
    packages = ("jax", "jaxlib", "optax", "flax")
    _results.append(options.results, {**row, **_results.stamp(command, packages=packages)})
    return all(row["reached"] for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if the target was reached, 1 if not, 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time", description=__doc__)
    parser.add_argument("--preset", default="125m", help="model to compile the step of")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences, a multiple of 8")
    parser.add_argument("--seq-len", type=int, default=64, help="bytes predicted per sequence")
    parser.add_argument("--rounds", type=int, default=5, help="timed compilations of each")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="what to time by; processor time is of this process alone, for a busy machine",
    )
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="file to append to")
    options = parser.parse_args(arguments)
    try:
        return 0 if _measure(options) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
