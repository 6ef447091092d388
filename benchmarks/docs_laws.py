"""``docs/laws.md``: every scaling law of the registry, what others published, and how ours fits."""

import pathlib
from typing import Any

from benchmarks import _results
from benchmarks.markdown import measured, table
from jaxopt_suite.scaling_laws import Law, laws


def page(results: pathlib.Path) -> str:
    """The page's text, without the notice that it is generated."""
    registry = laws.registry()
    planted = _results.latest(_results.load(results / "scaling_planted.json"), "law")
    parts = [
        "# Scaling laws\n",
        "The laws of `jaxopt_suite.scaling_laws.laws.registry()`; `jaxopt-suite fit --list` prints "
        "their names. Traps and helpers of each family are in its module's text.\n",
        table(
            ["name", "formula", "columns", "source"],
            [
                [f"`{name}`", f"`{law.formula}`", ", ".join((*law.inputs, law.output)), law.source]
                for name, law in registry.items()
            ],
        ),
        "## Published values\n",
        "Presets, with where their numbers come from; some were read in transcriptions, and say "
        "so.\n",
        table(
            ["law", "preset", "values", "from"],
            [row for name, law in registry.items() for row in _presets(name, law)],
        ),
        "## Planted and found again\n",
        "For every form 200 random laws: the share of them recovered from runs without noise, the "
        "worst relative error of a coefficient, and the share of truths inside 90 % intervals from "
        "runs with 1 % noise, the lowest and the highest over the coefficients.\n",
    ]
    if not planted:
        return "\n".join([*parts, "No measurements yet.\n"])
    head = ["law", "runs", "recovered", "worst error", "coverage", "held in the runs with noise"]
    parts.append(table(head, [_planted(row) for row in planted.values()]))
    for row in _results.load(results / "scaling_speed.json")[-1:]:
        parts += ["## Speed\n", _speed(row), measured(row)]
    return "\n".join(parts)


def _presets(name: str, law: Law) -> list[list[str]]:
    return [
        [
            f"`{name}`",
            f"`{key}`",
            ", ".join(f"{coefficient} {value:.6g}" for coefficient, value in preset.values.items()),
            preset.source,
        ]
        for key, preset in law.presets.items()
    ]


def _planted(row: dict[str, Any]) -> list[Any]:
    coverage = row["coverage"].values()
    return [
        f"`{row['law']}`",
        row["runs"],
        f"{row['recovered']:.1%}",
        f"{row['worst_error']:.0e}",
        f"{min(coverage):.2f} to {max(coverage):.2f}",
        ", ".join(row["held_with_noise"]),
    ]


def _speed(row: dict[str, Any]) -> str:
    with_differences, with_gradient = row["scipy_differences"], row["scipy_gradient"]
    return (
        f"{row['starts']} starts, screened, and {row['resamples']} resamples of the 240 runs of "
        f"the Chinchilla problem: {row['seconds']:.1f} s after {row['compile_seconds']:.1f} s of "
        f"compilation. The same by SciPy's BFGS, from a sample of its fits in the same run: "
        f"{with_differences['seconds']:.0f} s with finite differences ({row['times_faster']:.0f} "
        f"times as long), {with_gradient['seconds']:.0f} s with a gradient written by hand "
        f"({row['times_faster_than_gradient']:.0f} times).\n"
    )
