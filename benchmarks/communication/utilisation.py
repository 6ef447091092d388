"""The share of time spent computing, beside the figures that two papers give for the same jobs.

Both print the Gbit/s that a share needs, from one simulator that is not public. Their figures lie
on 50 points from 0.1 to 1000, equally spaced in the logarithm; where our formula agrees, theirs is
the last point that is *not yet* enough. The papers do not say how many bits a value has, or which
layers are sent when. 16 bits, two workers, fragments of every so-many-th layer, and sending in the
backward pass, as the authors' web page (arthurdouillard.com/diloco) has it, reproduce the first.
"""

import bisect
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxopt_suite.parallel.utilisation import Job, Schedule, bandwidth_for

SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
STREAMING, SCALING = "arXiv:2501.18512, table 4", "arXiv:2503.09799, simulated utilisation"
_GRID = [0.1 * 10 ** (4 * k / 49) for k in range(50)]
_FURTHEST = 1.5  # two points of the grid


@dataclasses.dataclass(frozen=True)
class Published:
    """One model of a table: its job, and Gbit/s for ``SHARES`` by method."""

    source: str
    model: str
    job: Job
    gbits_per_second: Mapping[str, Sequence[float]]


def schedule(method: str, layers: int) -> Schedule:
    """What a row of the tables does; those of streaming have fragments of three layers."""
    late = 1 if "overlapped" in method else 0
    if method == "data parallel":
        return Schedule.data_parallel(bits=16)
    if method.startswith("DiLoCo"):
        return Schedule(int(method.rpartition("=")[2]), bits=16, in_backward=True)
    bits = 4 if "FP4" in method else 16
    return Schedule(100, layers // 3, late, bits, in_backward=True)


def _streaming(model: str, job: Job, *rows: Sequence[float]) -> Published:
    methods = (
        "data parallel", "DiLoCo, H=100", "streaming", "streaming, overlapped",
        "streaming, overlapped, FP4",
    )  # fmt: skip
    return Published(STREAMING, model, job, dict(zip(methods, rows, strict=True)))


def _scaling(model: str, job: Job, *rows: Sequence[float]) -> Published:
    methods = ("data parallel", *(f"DiLoCo, H={h}" for h in (10, 50, 100, 300)))
    return Published(SCALING, model, job, dict(zip(methods, rows, strict=True)))


TABLES = (
    _streaming(
        "1B", Job(0.1, 1e9, 24),
        (86.8, 152.6, 184.2, 222.3, 569.0), (1.4, 6.2, 13.3, 23.3, 86.8),
        (1.4, 5.2, 9.1, 16.0, 28.1), (1.4, 4.3, 6.2, 9.1, 11.0), (0.4, 0.9, 1.7, 2.0, 3.0),
    ),
    _streaming(
        "10B", Job(0.8, 10e9, 48),
        (104.8, 222.3, 222.3, 268.3, 471.5), (1.7, 7.5, 16.0, 33.9, 104.8),
        (1.7, 5.2, 9.1, 13.3, 19.3), (1.7, 3.6, 5.2, 6.2, 7.5), (0.4, 0.9, 1.4, 1.4, 1.7),
    ),
    _streaming(
        "100B", Job(4.9, 100e9, 108),
        (184.2, 323.8, 390.7, 390.7, 471.5), (3.0, 11.0, 23.3, 49.4, 184.2),
        (2.4, 6.2, 9.1, 11.0, 19.3), (1.7, 3.6, 4.3, 5.2, 5.2), (0.5, 0.9, 1.1, 1.1, 1.4),
    ),
    _scaling(
        "10B Chinchilla", Job(0.8, 10e9, 48),
        (104.8, 184.2, 222.3, 222.3, 390.7), (16.0, 49.4, 86.8, 152.6, 222.3),
        (3.0, 11.0, 23.3, 41.0, 126.5), (1.4, 6.2, 13.3, 23.3, 86.8), (0.5, 2.0, 4.3, 9.1, 41.0),
    ),
    _scaling(
        "405B Llama 3", Job(26.0, 405e9, 126),
        (126.5, 222.3, 268.3, 323.8, 323.8), (19.3, 72.0, 126.5, 184.2, 268.3),
        (3.6, 13.3, 28.1, 59.6, 184.2), (2.0, 7.5, 16.0, 33.9, 126.5),
        (0.7, 3.0, 6.2, 13.3, 59.6),
    ),
    _scaling(
        "671B DeepSeek-V3", Job(20.0, 671e9, 61),
        (323.8, 569.0, 686.6, 686.6, 1000.0), (49.4, 152.6, 268.3, 390.7, 686.6),
        (7.5, 33.9, 72.0, 126.5, 390.7), (4.3, 16.0, 41.0, 72.0, 268.3),
        (1.7, 6.2, 13.3, 28.1, 126.5),
    ),
)  # fmt: skip


def as_printed(gbits_per_second: float) -> float:
    """The last point of the papers' grid below a bandwidth, with the digits that they print.

    They round twice, to hundredths and then to tenths: 40.949 stands there as 41.0.
    """
    below = bisect.bisect_left(_GRID, gbits_per_second) - 1
    return float(f"{round(_GRID[max(below, 0)], 2):.1f}")


def measure() -> Iterator[dict[str, Any]]:
    """One row for each model of a table: published figures, ours, and how many are the same."""
    for table in TABLES:
        entries = [
            {
                "method": method,
                "published": list(published),
                "needed": [
                    round(bandwidth_for(share, table.job, schedule(method, table.job.layers)), 3)
                    for share in SHARES
                ],
            }
            for method, published in table.gbits_per_second.items()
        ]
        pairs = [pair for e in entries for pair in zip(e["needed"], e["published"], strict=True)]
        ratios = [needed / published for needed, published in pairs]
        row = {
            "source": table.source,
            "model": table.model,
            "job": dataclasses.asdict(table.job),
            "utilisation": list(SHARES),
            "entries": entries,
            "figures": len(pairs),
            "same": sum(as_printed(needed) == published for needed, published in pairs),
            "lowest": round(min(ratios), 3),
            "highest": round(max(ratios), 3),
        }
        _show(row)
        yield row


def _show(row: Mapping[str, Any]) -> None:
    shares = " ".join(f"{f'{share:.0%}':>15}" for share in row["utilisation"])
    print(f"{row['source']}: {row['model']}, Gbit/s needed (published)\n{'':28}{shares}")
    for entry in row["entries"]:
        pairs = zip(entry["needed"], entry["published"], strict=True)
        figures = " ".join(f"{ours:7.1f} ({theirs:5.1f})" for ours, theirs in pairs)
        print(f"{entry['method']:28}{figures}")
    print(f"the same point of the grid: {row['same']} of {row['figures']}\n", flush=True)


def kept(rows: list[dict[str, Any]]) -> bool:
    """Whether four in five figures of the first paper are ours, and all are within two points."""
    first = [row for row in rows if row["source"] == STREAMING]
    same = sum(row["same"] for row in first) >= 0.8 * sum(row["figures"] for row in first)
    return same and all(
        row["lowest"] > 1 / _FURTHEST and row["highest"] < _FURTHEST for row in rows
    )
