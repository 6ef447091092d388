"""The measured part of ``docs/guides/bandwidth.md``: its tables and its picture."""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from benchmarks import _results
from benchmarks.communication.utilisation import SHARES, STREAMING, schedule
from benchmarks.markdown import measured, table
from jaxopt_suite.core.figures import GREY, PALETTE
from jaxopt_suite.parallel.utilisation import Job, Schedule, draw

_INK = "#1a1a1a"
_DRAWN = "100B"
_Rows = list[dict[str, Any]]


def sections(results: pathlib.Path) -> dict[str, str]:
    """Markdown of every measured part of the guide, by the name of its place."""
    rows = _newest(results)
    if not rows:
        return {"utilisation": "No measurements yet.\n"}
    return {"utilisation": "\n".join([_overview(rows), _figures(rows), measured(rows[-1])])}


def pictures(results: pathlib.Path) -> dict[str, tuple[str, Callable[[], Figure]]]:
    """File name in ``docs/images`` to a digest of the rows it is drawn from, and how to draw it."""
    rows = [r for r in _newest(results) if r["source"] == STREAMING and r["model"] == _DRAWN]
    if not rows:
        return {}
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]
    return {"utilisation-against-bandwidth.svg": (digest, lambda: _curves(rows[0]))}


def _newest(results: pathlib.Path) -> _Rows:
    rows = _results.load(results / "utilisation.json")
    return list({(row["source"], row["model"]): row for row in rows}.values())


def _overview(rows: _Rows) -> str:
    head = ["table", "model", "step", "same point", "needed over published"]
    cells = [
        [
            row["source"],
            row["model"],
            f"{row['job']['step_seconds']:g} s",
            f"{row['same']} of {row['figures']}",
            f"{row['lowest']:.2f} to {row['highest']:.2f}",
        ]
        for row in rows
    ]
    return table(head, cells)


def _figures(rows: _Rows) -> str:
    head = ["model", "method", *(f"{share:.0%}" for share in SHARES)]
    cells = [
        [
            row["model"],
            entry["method"],
            *(
                f"{needed:.3g} ({published:g})"
                for needed, published in zip(entry["needed"], entry["published"], strict=True)
            ),
        ]
        for row in rows
        for entry in row["entries"]
    ]
    return table(head, cells)


def _curves(row: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(7.2, 4.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    job = Job(**row["job"])
    methods = {e["method"]: schedule(e["method"], job.layers) for e in row["entries"]}
    methods["eager or CO2, H=100"] = Schedule.overlapped(100, bits=16)
    draw(axes, job, methods, [0.1 * 10 ** (k / 60) for k in range(241)], ink=_INK)
    for i, entry in enumerate(row["entries"]):
        color = PALETTE[i - 1] if i else GREY
        axes.plot(entry["published"], row["utilisation"], "o", color=color, markersize=4)
    return figure
