"""Loss against bytes on the default task: eight workers, tuned learning rates, three seeds."""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks import _results

MESH, SEEDS = "worker=8", 3


class Variant(NamedTuple):
    """A recipe with words of its own for the command line."""

    name: str
    optimizer: str
    words: tuple[str, ...] = ()


def _sparse(compressor: str) -> tuple[str, ...]:
    # What is left out arrives later, which is a momentum by itself: Muon's own is shorter.
    return ("--set", "beta=0.3", "--compress", compressor, "--exchange", "two_phase")


VARIANTS = (
    Variant("AdamW, dense", "adamw"),
    Variant("AdamW, int8", "adamw_int8"),
    Variant("PowerSGD, rank 4", "powersgd"),
    Variant("1-bit Adam", "onebit_adam"),
    Variant("TernGrad with Adam", "terngrad"),
    Variant("DeMo, 32 of 4096", "demo"),
    Variant("DeMo, 8 of 4096", "demo", ("--set", "k=8", "--set", "values=bfloat16")),
    Variant("Muon, dense", "muon"),
    Variant("Muon, signs", "muon", ("--set", "beta=0.3", "--compress", "sign()")),
    Variant("Muon, 10 of 256", "muon", _sparse("top_k(10, chunk=256, values='bfloat16')")),
    Variant("Muon, 2 of 205", "muon", _sparse("top_k(2, chunk=205, values='bfloat16')")),
)


def measure(names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """One row for each variant, the dense baseline first.

    Args:
      names: of the variants; none: all.

    Raises:
      UserError: if there is no such variant.
    """
    dense = None
    for variant in selected(VARIANTS, names):
        row = run(variant)
        dense = dense or row
        yield beside(row, dense)


def selected(variants: Sequence[Variant], names: Sequence[str]) -> list[Variant]:
    """The baseline, which is the first, and those named; all of them if none is.

    Raises:
      UserError: if there is no such variant.
    """
    _results.check_names("variant", names, [variant.name for variant in variants])
    return [v for v in variants if not names or v.name in (variants[0].name, *names)]


def beside(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """The row with its bytes and its loss against the baseline's; prints it."""
    row["times_fewer"] = dense["wire_bytes"] / row["wire_bytes"]
    row["over_dense"] = None if row["mean"] is None else row["mean"] / dense["mean"]
    print(row, flush=True)
    return row


def kept(rows: list[dict[str, Any]]) -> bool:
    """Whether a variant is within 1 % of dense AdamW in 30 times fewer bytes, one 3 % in 100."""
    within = lambda loss, fewer: any(
        row["over_dense"] is not None and row["over_dense"] <= loss and row["times_fewer"] >= fewer
        for row in rows
    )
    return within(1.01, 30) and within(1.03, 100)


def run(variant: Variant) -> dict[str, Any]:
    """Sweeps the rate with a seed that no result uses, then trains with each seed."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["compare", "--optimizers", variant.optimizer, "--lr-sweep", "--mesh", MESH]
        words += ["--seeds", str(SEEDS), "--out", folder]
        words += variant.words
        subprocess.run([sys.executable, "-m", "jaxopt_suite.cli.main", *words], check=True)
        found = pathlib.Path(folder) / variant.optimizer
        return {**variant._asdict(), **_row(_runs(found, "seed-*"), _runs(found, "sweep/lr-*"))}


def _runs(folder: pathlib.Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{pattern}/result.json"))]


def _row(runs: list[dict[str, Any]], sweep: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of the runs; a run that diverged has no loss."""
    losses = [_final(run) for run in runs]
    finished = [loss for loss in losses if loss is not None]
    return {
        "mesh": MESH,
        "steps": runs[0]["steps"][-1],
        "learning_rate": runs[0]["learning_rate"],
        "sweep": {f"{run['learning_rate']:.6g}": _final(run) for run in sweep},
        "losses": losses,
        "mean": statistics.fmean(finished) if len(finished) == len(losses) else None,
        "spread": statistics.stdev(finished) if len(finished) > 1 else None,
        "wire_bytes": runs[0]["wire_bytes"],
        "state_bytes": runs[0]["state_bytes"],
        "parameters": runs[0]["n_params"],
    }


def _final(run: dict[str, Any]) -> float | None:
    return None if run["diverged_at"] is not None else run["val_loss"][-1]
