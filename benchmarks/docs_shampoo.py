"""The measured part of ``docs/guides/shampoo.md``: its tables and its picture."""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from benchmarks import _results
from benchmarks.markdown import measured, table
from benchmarks.shampoo.updates import META
from jaxopt_suite.core.figures import GREY, PALETTE, dress

_INK = "#1a1a1a"
_Rows = dict[str, dict[str, Any]]


def sections(results: pathlib.Path) -> dict[str, str]:
    """Markdown of every measured part of the guide, by the name of its place."""
    rows = _newest(results)
    makers = {"updates": _updates, "train": _train, "compile": _compile}
    parts = [
        make(rows[name]) + "\n" + measured(rows[name])
        for name, make in makers.items()
        if name in rows
    ]
    return {
        "shampoo": "\n".join(parts) or "No measurements yet.\n",
        "roots": _roots(_results.load(results / "roots.json")),
    }


def pictures(results: pathlib.Path) -> dict[str, tuple[str, Callable[[], Figure]]]:
    """File name in ``docs/images`` to a digest of the row it is drawn from, and how to draw it."""
    row = _newest(results).get("updates")
    if row is None:
        return {}
    digest = hashlib.sha256(json.dumps(row["updates"], sort_keys=True).encode()).hexdigest()[:16]
    return {"shampoo-update-times.svg": (digest, lambda: _traces(row))}


def _newest(results: pathlib.Path) -> _Rows:
    return _results.latest(_results.load(results / "shampoo_times.json"), "part")


def _updates(row: dict[str, Any]) -> str:
    head = [f"update of `{row['preset']}`", "mean", "median", "slowest", "slowest of the cycle"]
    keys = "mean", "median", "slowest", "slowest_of_cycle"
    cells = [
        [name, *(f"{found[key]:.0f} ms" for key in keys)] for name, found in row["updates"].items()
    ]
    settings = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
    repository, _, commit = row["reference"].partition(" at ")
    theirs = f"{META} is [{repository}](https://github.com/{repository}) at `{commit[:12]}`"
    variables = " ".join(f"{name}={value}" for name, value in row["environment"].items())
    return (
        f"{theirs}; settings of both: {settings}; environment of both: `{variables}`. "
        "The slowest of the cycle: of its ten steps the slowest, each as the median of four, "
        "without what other work on the machine added to a single one.\n\n" + table(head, cells)
    )


def _train(row: dict[str, Any]) -> str:
    tokens = row["batch_size"] * row["seq_len"]
    head = [f"train step of `{row['preset']}`, {tokens} tokens", "mean", "slowest", "over AdamW"]
    cells = [
        [name, f"{s['mean']:.0f} ms", f"{s['slowest']:.0f} ms", f"{s['over_adamw']:.2f}"]
        for name, s in row["steps"].items()
    ]
    return table(head, cells)


def _compile(row: dict[str, Any]) -> str:
    head = [f"update of `{row['preset']}`", "layers", "leaves", "traced", "compiled"]
    cells = [
        [x["optimizer"], x["layers"], x["leaves"], f"{x['trace']:.1f} s", f"{x['compile']:.1f} s"]
        for x in row["updates"]
    ]
    return table(head, cells)


def _roots(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "No measurements yet.\n"
    errors: dict[tuple[str, int], dict[str, str]] = {}
    for entry in rows[-1]["accuracy"]:
        shown = f"{entry['error']:.1e}" + ("" if entry["ok"] else " (refused)")
        errors.setdefault((entry["solver"], entry["size"]), {})[entry["spectrum"]] = shown
    spectra = list(next(iter(errors.values())))
    cells = [
        [f"`{solver}`".replace(", one triangle`", "`, one triangle"), size]
        + [found.get(spectrum, "") for spectrum in spectra]
        for (solver, size), found in sorted(errors.items(), key=lambda item: item[0][1])
    ]
    times = [
        [f"`{x['solver']}`", "{} of {} by {}".format(*x["stack"]), f"{x['ratio']:.2f}"]
        for x in rows[-1]["times"]
    ]
    accuracy = table(("solver", "rows", *spectra), cells)
    return "\n".join(
        [
            accuracy,
            table(("solver", "stack", "time over that of `eigh`"), times),
            measured(rows[-1]),
        ]
    )


def _traces(row: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.2, 3.6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for i, (name, found) in enumerate(row["updates"].items()):
        color = PALETTE[i - 1] if i else GREY
        axes.plot(
            range(1, len(found["ms"]) + 1), found["ms"], color=color, label=name, linewidth=1.4
        )
    axes.set_yscale("log")
    figure.legend(frameon=False, fontsize=8, labelcolor=_INK, loc="outside upper center", ncols=5)
    dress(axes, "step", "milliseconds of the update", ink=_INK)
    return figure
