"""``python -m benchmarks.step_time``: prints a table and appends a row to the results."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import _results
from benchmarks.step_time import ahead, programs, timing, train_memory
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import Recipe, registry

BASELINE = "adamw"
TARGETS = {"grams": 1.05, "adam_sn": 1.10}  # times the time of adamw's update
MEMORY_TARGET = 1.10  # times the peak memory of training with adamw
RESULTS = _results.RESULTS / "step_time.json"
MEMORY_RESULTS = _results.RESULTS / "train_memory.json"
AHEAD_RESULTS = _results.RESULTS / "step_bytes.json"


def measure_updates(recipes: Sequence[Recipe], params: Any, *, rounds: int) -> list[dict[str, Any]]:
    """Times each recipe's update in turns with the baseline's.

    Args:
      recipes: what to time.
      params: shapes and dtypes of the parameters.
      rounds: timed updates of each; a refresh step gets a twentieth, at least three.
    """
    values, grads = programs.arrays(params, seed=0), programs.arrays(params, seed=1)
    baseline_tx = registry()[BASELINE].make(registry()[BASELINE].learning_rate)
    baseline = timing.Runner(
        programs.compile_update(baseline_tx, params), baseline_tx, values, [grads]
    )
    rows = []
    for subject in (s for recipe in recipes for s in programs.subjects(recipe)):
        program = programs.compile_update(subject.tx, params)
        runner = timing.Runner(program, subject.tx, values, [grads])
        if subject.kind == "refresh step":  # seconds each, and alike from the first one on
            compared = timing.compare(runner, baseline, rounds=max(3, rounds // 20), warm_up=0)
        else:
            compared = timing.compare(runner, baseline, rounds=rounds)
        rows.append(_row(subject, program, compared))
        print(_line(rows[-1]), flush=True)
    return rows


def _row(
    subject: programs.Subject, program: programs.Program, compared: timing.Comparison
) -> dict[str, Any]:
    costs = {
        field.name: getattr(program, field.name)
        for field in dataclasses.fields(program)
        if field.name != "step"
    }
    target = TARGETS.get(subject.name)
    return {
        "optimizer": subject.name,
        "kind": subject.kind,
        **dataclasses.asdict(compared),
        "target": target,
        "reached": None if target is None else compared.ratio <= target,
        **costs,
    }


_HEAD = (
    f"{'optimizer':14s} {'kind':13s} {'ms':>8s} {'adamw ms':>8s} {'ratio':>6s} {'quartiles':>13s} "
    f"{'MB moved':>9s} {'minimum':>8s} {'Mflop':>8s} {'temp MB':>8s} {'state MB':>8s}"
)


def _line(row: dict[str, Any]) -> str:
    spread = f"{row['low']:.2f} - {row['high']:.2f}"
    verdict = "" if row["target"] is None else f"  target {row['target']:.2f}"
    if row["reached"] is False:
        verdict += " MISSED"
    return (
        f"{row['optimizer']:14s} {row['kind']:13s} {row['ms']:8.2f} {row['baseline_ms']:8.2f} "
        f"{row['ratio']:6.3f} {spread:>13s} {row['bytes_accessed'] / 1e6:9.1f} "
        f"{row['minimum_bytes'] / 1e6:8.1f} {row['flops'] / 1e6:8.1f} "
        f"{row['temporary_bytes'] / 1e6:8.1f} {row['state_bytes'] / 1e6:8.1f}{verdict}"
    )


def measure_train_memory(names: Sequence[str], *, preset: str, steps: int) -> list[dict[str, Any]]:
    """Peak memory of training with each optimizer, against training with the baseline."""
    peaks = {name: train_memory.peak_bytes(name, preset=preset, steps=steps) for name in names}
    rows = []
    for name, peak in peaks.items():
        ratio = peak / peaks[BASELINE]
        target = None if registry()[name].peer else MEMORY_TARGET
        rows.append(
            {
                "optimizer": name,
                "peak_bytes": peak,
                "ratio": ratio,
                "target": target,
                "reached": None if target is None else ratio <= target,
            }
        )
        print(f"{name:14s} {peak / 2**20:8.0f} MiB {ratio:6.3f}", flush=True)
    return rows


def _choose(text: str | None) -> list[str]:
    """The recipes asked for, in the registry's order; all that one device can run by default."""
    legal = [name for name, recipe in registry().items() if not recipe.communicates]
    if text is None:
        return legal
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in legal]
    if unknown:
        raise UserError(f"--optimizers: no {unknown[0]!r}; legal: {', '.join(legal)}")
    return [name for name in legal if name in names]


def _measure(options: argparse.Namespace) -> bool:
    """Measures, appends the row, and returns whether every target was reached."""
    names = _choose(options.optimizers)
    if options.preset not in model.PRESETS:
        raise UserError(
            f"--preset must be one of {', '.join(model.PRESETS)}, got {options.preset!r}"
        )
    command = f"python -m benchmarks.step_time --preset {options.preset}"
    if options.optimizers is not None:
        command += f" --optimizers {','.join(names)}"
    if options.train_memory:
        chosen = [BASELINE, *(name for name in names if name != BASELINE)]
        rows = measure_train_memory(chosen, preset=options.preset, steps=options.steps)
        path = options.results or MEMORY_RESULTS
        settings: dict[str, Any] = {"preset": options.preset, "steps": options.steps}
        command += f" --train-memory --steps {options.steps}"
    elif options.topology:
        rows = ahead.measure(
            [registry()[name] for name in names],
            registry()[BASELINE],
            model.abstract_params(model.PRESETS[options.preset]),
            topology=options.topology,
        )
        path = options.results or AHEAD_RESULTS
        settings = {"preset": options.preset, "topology": options.topology}
        command += f" --topology {options.topology}"
    else:
        print(_HEAD)
        params = model.abstract_params(model.PRESETS[options.preset])
        recipes = [registry()[name] for name in names]
        rows = measure_updates(recipes, params, rounds=options.rounds)
        path = options.results or RESULTS
        sizes = [leaf.size for leaf in jax.tree.leaves(params)]
        settings = {"preset": options.preset, "parameters": sum(sizes), "leaves": len(sizes)}
        command += f" --rounds {options.rounds}"
    _results.append(path, {**settings, "optimizers": rows, **_results.stamp(command)})
    return all(row.get("reached") is not False for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every target was reached, 1 if not, 2 for what the user can put right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__)
    parser.add_argument("--preset", default="small", help="model whose parameters are updated")
    parser.add_argument("--optimizers", help="names separated by commas; all by default")
    parser.add_argument("--rounds", type=int, default=60, help="timed updates of each")
    parser.add_argument(
        "--train-memory", action="store_true", help="peak memory of training instead of step times"
    )
    parser.add_argument(
        "--topology", help="bytes of the program compiled for a TPU, such as v5e:2x2, instead"
    )
    parser.add_argument("--steps", type=int, default=6, help="of each training run")
    parser.add_argument("--results", type=pathlib.Path, help="file to append to")
    options = parser.parse_args(arguments)
    try:
        return 0 if _measure(options) else 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
