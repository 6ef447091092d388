"""A sweep of small models on the default text: runs of our own to fit laws to.

Seven sizes meet six budgets of compute. Each pair is one run of byte-level transformers with AdamW
and a cosine that ends with the run, so that every loss is that of a finished schedule. ``N`` counts
the blocks and the output head (the rule ``body_head``), ``C = 6 N D``. Pairs that would take fewer
than ``LEAST_STEPS`` steps, or more than one pass over the text, are left out; the middle budget is
run with three seeds, which says how noisy a loss is.

The learning rate is the one tuned for the preset of width 96, times ``sqrt(96 / width)``: a rule,
not a sweep, so that sizes far from 96 may be a little worse than they could be.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from benchmarks import _results
from jaxopt_suite.experiments import model
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.experiments.data import Corpus, load_corpus
from jaxopt_suite.experiments.loop import TrainResult, train
from jaxopt_suite.experiments.steps import build_program, find_recipe
from jaxopt_suite.scaling_laws.conventions import N_RULES, Shape

SHAPES = ((16, 1), (24, 1), (32, 2), (48, 2), (64, 3), (96, 3), (128, 4))  # width, depth
BUDGETS = (2e10, 5e10, 1.2e11, 3e11, 7e11, 1.6e12)  # FLOP
REPEATED = 1.2e11  # FLOP, with all of ``SEEDS``; the others have the first
SEEDS = (0, 1, 2)
HEAD_SIZE = 16
BATCH, SEQ_LEN = 8, 128
LEAST_STEPS = 60
MOST_TOKENS = 8_000_000  # the training text is about as long
EVAL_BATCHES = 128
N_RULE = "body_head"
_TUNED_WIDTH = 96
_FOLDER = pathlib.Path("runs/scaling-sweep")
ROWS = _results.RESULTS / "scaling" / "sweep.jsonl"


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of the sweep.

    Attributes:
      sizes: of the model.
      steps: of its schedule.
      seed: of parameters and data order.
    """

    sizes: model.ModelConfig
    steps: int
    seed: int

    @property
    def label(self) -> str:
        """Of the model."""
        return f"w{self.sizes.d_model}-l{self.sizes.n_layers}"

    @property
    def name(self) -> str:
        """Of the run, and of its folder."""
        return f"{self.label}-steps{self.steps}-seed{self.seed}"

    @property
    def n(self) -> int:
        """Parameters by ``N_RULE``."""
        return _count(self.sizes)

    @property
    def tokens(self) -> int:
        """Bytes trained on."""
        return self.steps * BATCH * SEQ_LEN

    @property
    def learning_rate(self) -> float:
        """By the rule of the module."""
        return find_recipe("adamw").learning_rate * (_TUNED_WIDTH / self.sizes.d_model) ** 0.5


def _shape(sizes: model.ModelConfig) -> Shape:
    return Shape(
        width=sizes.d_model,
        depth=sizes.n_layers,
        vocab=sizes.vocab_size,
        seq_len=SEQ_LEN,
        heads=sizes.n_heads,
        ff_width=sizes.d_ff,
        ff_matrices=3,
    )


def _count(sizes: model.ModelConfig) -> int:
    return int(N_RULES[N_RULE].of(_shape(sizes)))


def points(
    shapes: Sequence[tuple[int, int]] = SHAPES, budgets: Sequence[float] = BUDGETS
) -> list[Point]:
    """The runs, cheapest budget first."""
    found = []
    for budget in budgets:
        for width, depth in shapes:
            sizes = model.sized(width, depth, HEAD_SIZE)
            steps = round(budget / (6 * _count(sizes) * BATCH * SEQ_LEN))
            if LEAST_STEPS <= steps <= MOST_TOKENS // (BATCH * SEQ_LEN):
                seeds = SEEDS if budget == REPEATED else SEEDS[:1]
                found += [Point(sizes, steps, seed) for seed in seeds]
    return found


def measure(
    wanted: Sequence[Point],
    rows: pathlib.Path,
    folder: pathlib.Path,
    *,
    console: Console | None = None,
) -> int:
    """Makes the runs that have no row yet; killed and started again, it goes on inside a run.

    Args:
      wanted: the runs.
      rows: JSON lines, one for each finished run; read first, and added to.
      folder: of the run folders.
      console: where to say what is done.

    Returns:
      0 when every run has a row, 128 plus the number of the signal that stopped one, 1 if a run
      diverged: it gets no row.
    """
    say = (console or Console(quiet=True)).print
    corpus, known, status = load_corpus(None), _names(rows), 0
    for i, point in enumerate(wanted):
        if point.name in known:
            continue
        say(f"{i + 1}/{len(wanted)} {point.name}: {point.n:,} parameters, {point.tokens:,} bytes")
        result = run(point, folder, corpus)
        if result.stopped == "signal":
            say(result.message)
            return 128 + (result.signum or 0)
        if result.stopped == "nonfinite":
            say(result.message)
            status = 1
            continue
        _append(rows, row(point, result))
        say(f"  loss {result.val_loss:.4f} in {result.seconds:.0f} s")
    return status


def run(point: Point, folder: pathlib.Path, corpus: Corpus) -> TrainResult:
    """Trains one model, from the newest checkpoint in its folder if there is one."""
    config = TrainConfig(
        preset=point.label,
        optimizer="adamw",
        learning_rate=point.learning_rate,
        steps=point.steps,
        batch_size=BATCH,
        seq_len=SEQ_LEN,
        seed=point.seed,
        eval_every=point.steps,
        eval_batches=EVAL_BATCHES,
        log_every=max(1, point.steps // 20),
        checkpoint_every=max(1, point.steps // 4),
        keep=1,
        out=str(folder / point.name),
    )
    return train(config, program=build_program(config, sizes=point.sizes), corpus=corpus)


def row(point: Point, result: TrainResult) -> dict[str, Any]:
    """What is kept of a finished run, under the names that ``load_runs`` knows."""
    return {
        "run_id": point.name,
        "N": point.n,
        "N_rule": N_RULE,
        "D": point.tokens,
        "C": 6 * point.n * point.tokens,
        "flop_rule": "6ND",
        "loss": result.val_loss,
        "loss_kind": "val",
        "lr": point.learning_rate,
        "seed": point.seed,
        "width": point.sizes.d_model,
        "depth": point.sizes.n_layers,
        "heads": point.sizes.n_heads,
        "ff_width": point.sizes.d_ff,
        "ff_matrices": 3,
        "vocab": point.sizes.vocab_size,
        "seq_len": SEQ_LEN,
        "batch_tokens": BATCH * SEQ_LEN,
        "steps": result.step,
        "decay_finished": result.step == point.steps,
        "seconds": round(result.seconds, 2),
    }


def stamp(wanted: Sequence[Point]) -> dict[str, Any]:
    """What all rows have in common: command, machine, versions, the text."""
    corpus = load_corpus(None)
    return {
        "runs": len(wanted),
        "text": corpus.name,
        "fingerprint": corpus.fingerprint,
        "learning_rate": f"tuned rate of width {_TUNED_WIDTH} times sqrt({_TUNED_WIDTH} / width)",
        **_results.stamp(
            "python -m benchmarks.scaling_laws sweep", packages=("jax", "flax", "optax", "numpy")
        ),
    }


def main() -> int:
    """The whole sweep; the rows and, beside them, what they have in common."""
    wanted = points()
    status = measure(wanted, ROWS, _FOLDER, console=Console(highlight=False, soft_wrap=True))
    if status < 128:
        text = json.dumps(stamp(wanted), indent=1, ensure_ascii=False)
        ROWS.with_suffix(".json").write_text(text + "\n")
    return status


def _names(rows: pathlib.Path) -> set[str]:
    if not rows.is_file():
        return set()
    return {json.loads(line)["run_id"] for line in rows.read_text().splitlines()}


def _append(rows: pathlib.Path, new: dict[str, Any]) -> None:
    """Adds a line; a reader sees the file without it or with it."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    before = rows.read_text() if rows.is_file() else ""
    unfinished = rows.with_suffix(".tmp")
    unfinished.write_text(before + json.dumps(new, allow_nan=False) + "\n")
    unfinished.replace(rows)
