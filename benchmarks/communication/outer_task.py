"""Outer loops on the default task: loss, bytes, and what workers that come and go cost.

Eight workers share the batch of the data-parallel baseline, so that all see the same tokens. Every
method's inner rate is swept with a seed that no result uses. Rate and momentum of the outer step
are the best of a few that were tried beforehand.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.communication import task
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.experiments.data import load_corpus, train_batches, validation_batches
from jaxopt_suite.experiments.steps import Program, build_program

WORKERS, AWAY, STRETCH = 8, 2, 20


def _outer(rate: float, momentum: float | None) -> tuple[str, ...]:
    chosen = (f"outer_learning_rate={rate}", f"outer_momentum={momentum}")
    return tuple(word for setting in chosen for word in ("--set", setting))


VARIANTS = (
    task.Variant("AdamW, every step", "adamw"),
    task.Variant("DiLoCo", "diloco", _outer(1.4, None)),
    task.Variant("streaming DiLoCo, int4", "streaming_diloco", _outer(1.0, None)),
    task.Variant("eager DiLoCo", "eager_diloco", _outer(1.0, 0.0)),
    task.Variant("CO2", "co2", _outer(1.0, 0.0)),
    task.Variant("local AdamW", "local_adamw"),
)
DISTURBED = ("DiLoCo", "streaming DiLoCo, int4")


def measure(names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """One row for each variant, the baseline first; after some, a row with workers away.

    Args:
      names: of the variants; none: all.

    Raises:
      UserError: if there is no such variant.
    """
    dense = None
    for variant in task.selected(VARIANTS, names):
        row = task.run(variant)
        dense = dense or row
        yield task.beside({**row, "away": 0}, dense)
        if variant.name in DISTURBED:
            yield task.beside(disturbed(variant, row), dense)


def kept(rows: list[dict[str, Any]]) -> bool:
    """Whether nothing diverged, and away workers cost 2 % at most."""
    return all(row["mean"] is not None and row.get("over_calm", 1.0) <= 1.02 for row in rows)


def disturbed(variant: task.Variant, calm: dict[str, Any]) -> dict[str, Any]:
    """The runs of ``calm`` again, seed by seed, with ``AWAY`` workers missing at every step."""
    losses = [_train(variant, calm, seed) for seed in range(task.SEEDS)]
    mean = statistics.fmean(losses)
    return {
        **calm,
        "name": f"{variant.name}, {AWAY} of {WORKERS} away",
        "away": AWAY,
        "losses": losses,
        "mean": mean,
        "spread": statistics.stdev(losses),
        "over_calm": mean / calm["mean"],
    }


def absences(steps: int, seed: int) -> np.ndarray:
    """Weights ``[steps, workers]``, 0 for ``AWAY`` workers drawn anew every ``STRETCH`` steps."""
    rng = np.random.default_rng([seed, AWAY])
    present = np.ones((steps, WORKERS), np.float32)
    for start in range(0, steps, STRETCH):
        present[start : start + STRETCH, rng.permutation(WORKERS)[:AWAY]] = 0
    return present


def _train(variant: task.Variant, calm: dict[str, Any], seed: int) -> float:
    """Validation loss after the last step."""
    config = TrainConfig(
        optimizer=variant.optimizer,
        mesh=task.MESH,
        learning_rate=calm["learning_rate"],
        steps=calm["steps"],
        set=variant.words[1::2],
        seed=seed,
    )
    corpus = load_corpus(config.data)
    shape = {"batch_size": config.batch_size, "seq_len": config.seq_len}
    program = build_program(config)
    batches = train_batches(corpus, seed=seed, **shape)
    state = _trained(program, batches, absences(config.steps, seed), seed)
    held_out = validation_batches(corpus, batches=config.eval_batches, **shape)
    return program.evaluate(state, held_out)


def _trained(
    program: Program, batches: Iterator[np.ndarray], weights: np.ndarray, seed: int
) -> Any:
    """The state after a step for each row of weights."""
    state = program.initial(seed)
    for active in weights:
        state, metrics = program.train_step(state, next(batches), active=active)
        jax.block_until_ready(metrics)  # simulated devices block one another with many on their way
    return state
