"""The measured part of ``docs/guides/kernels.md``: programs with and without each kernel."""

import pathlib
from collections.abc import Mapping
from typing import Any

from benchmarks import _results
from benchmarks.markdown import measured, table

_HEAD = ("case", "chip", "GFLOP", "MB moved", "temporary MB")


def sections(results: pathlib.Path) -> dict[str, str]:
    """Markdown of every measured part of the guide, by the name of its place."""
    rows = _results.load(results / "kernels.json")
    if not rows:
        return {"kernels": "No measurements yet.\n"}
    newest = {(row["kernel"], row["case"], row["topology"]): row for row in rows}
    parts = []
    for kernel in dict.fromkeys(row["kernel"] for row in newest.values()):
        own = [row for row in newest.values() if row["kernel"] == kernel]
        parts += [f"**`{kernel}`**\n", table(_HEAD, map(_cells, own)), measured(own[-1])]
    return {"kernels": "\n".join(parts)}


def _cells(row: Mapping[str, Any]) -> list[str]:
    xla, pallas = row["xla"], row["pallas"]
    both = lambda key, unit, digits: (
        f"{xla[key] / unit:.{digits}f} → {pallas[key] / unit:.{digits}f}"
    )
    return [
        row["case"],
        row["topology"].partition(":")[0],
        both("flops", 1e9, 2),
        both("bytes_accessed", 1e6, 1),
        both("temporary_bytes", 1e6, 1),
    ]
