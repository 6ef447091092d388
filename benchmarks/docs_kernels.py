"""The measured part of ``docs/guides/kernels.md``: programs with and without each kernel."""

import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks import _results
from benchmarks.markdown import measured, table
from jaxopt_suite.parallel.chips import CHIPS

_HEAD = ("case", "chip", "GFLOP", "MB moved", "ms for these", "temporary MB")
_LEAVES = ("chip", "leaves", "loops", "temporary KB", "compile, s", "ms")
_TIMES = ("kernel", "entries", "chip", "XLA, μs", "kernel, μs", "of bandwidth", "difference")


def sections(results: pathlib.Path) -> dict[str, str]:
    """Markdown of every measured part of the guide, by the name of its place."""
    return {
        "kernels": _programs(_results.load(results / "kernels.json")),
        "kernel_times": _times(_results.load(results / "kernels_times.json")),
        "kernel_leaves": _leaves(_results.load(results / "kernels_leaves.json")),
    }


def _programs(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "No measurements yet.\n"
    dates = {row["kernel"]: row["date"] for row in rows}  # of the newest run, which has all cases
    parts = []
    for kernel, date in dates.items():
        own = [row for row in rows if (row["kernel"], row["date"]) == (kernel, date)]
        parts += [f"**`{kernel}`**\n", table(_HEAD, map(_cells, own)), measured(own[-1])]
    return "\n".join(parts)


def _times(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "No times yet: `python -m benchmarks.kernels time` on a TPU or a GPU makes them.\n"
    newest = {(row["kernel"], row["entries"], row["chip"]): row for row in rows}
    return table(_TIMES, map(_time_cells, newest.values())) + "\n" + measured(rows[-1])


def _leaves(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "No measurements yet.\n"
    newest = {(row["chip"], row["leaves"]): row for row in rows}
    return table(_LEAVES, map(_leaf_cells, newest.values())) + "\n" + measured(rows[-1])


def _leaf_cells(row: Mapping[str, Any]) -> list[str]:
    both = lambda key, unit: f"{row['tree'][key] / unit:.0f} → {row['packed'][key] / unit:.0f}"
    timed = both("ms", 1) if "ms" in row["tree"] else "unmeasured"
    figures = both("loops", 1), both("temporary_bytes", 1e3), both("compile_seconds", 1)
    return [row["chip"], f"{row['leaves']} of {row['entries']}", *figures, timed]


def _time_cells(row: Mapping[str, Any]) -> list[str]:
    xla, pallas = row["xla"], row["pallas"]
    cells = [row["kernel"], str(row["entries"]), row["chip"], f"{xla['us']:.1f}"]
    if pallas is None:
        return [*cells, "none", f"{xla['of_bandwidth']:.0%}", ""]
    both = f"{xla['of_bandwidth']:.0%} → {pallas['of_bandwidth']:.0%}"
    return [*cells, f"{pallas['us']:.1f}", both, f"{row['difference']:.1e}"]


def _cells(row: Mapping[str, Any]) -> list[str]:
    xla, pallas = row["xla"], row["pallas"]
    both = lambda key, unit, digits: (
        f"{xla[key] / unit:.{digits}f} → {pallas[key] / unit:.{digits}f}"
    )
    chip = CHIPS[row["topology"].partition(":")[0]]
    return [
        row["case"],
        chip.name,
        both("flops", 1e9, 2),
        both("bytes_accessed", 1e6, 1),
        both("bytes_accessed", 1e-3 * chip.hbm_bandwidth / chip.devices, 2),
        both("temporary_bytes", 1e6, 1),
    ]
