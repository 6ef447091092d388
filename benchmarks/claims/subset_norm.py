"""Subset-norm in training a language model: AdamSN against AdamW, and the size of subsets."""

import math
import statistics
from typing import Any

from benchmarks.claims.claim import Claim, Outcome, verdict
from benchmarks.claims.training import Runs, Scale, Trainer, mean_and_spread
from jaxopt_suite.experiments.model import PRESETS
from jaxopt_suite.optimizers import registry


def _measure_against_adamw(quick: bool) -> Outcome:
    trainer = Trainer(Scale.of(quick))
    runs = {
        name: trainer.run(name, registry()[name].learning_rate) for name in ("adamw", "adam_sn")
    }
    final = {name: statistics.fmean(found.final) for name, found in runs.items()}
    excess = final["adam_sn"] / final["adamw"] - 1.0
    share = runs["adam_sn"].state_bytes / runs["adamw"].state_bytes
    return Outcome(
        figure=(
            f"validation loss AdamSN {mean_and_spread(runs['adam_sn'].final)}, AdamW "
            f"{mean_and_spread(runs['adamw'].final)} nats per byte ({excess:+.1%}), "
            f"with {share:.1%} of the state bytes"
        ),
        verdict=verdict(excess <= 0.02, share <= 0.55),
        numbers={name: found.as_json() for name, found in runs.items()},
    )


def _subsets() -> dict[str, tuple[int, float]]:
    """Each subset size by name: our ``subset`` argument, and k for a matrix of typical size."""
    width = PRESETS["nano"].d_model  # a = min(m, n) of every matrix of the model
    d = width * PRESETS["nano"].d_ff
    return {
        "1": (1, 1.0),
        "a/2": (width // 2, width / 2),
        "a": (width, width),
        "sqrt(d)": (-1, math.sqrt(d)),
        "d": (d, d),
    }


def _measure_sizes(quick: bool) -> Outcome:
    trainer = Trainer(Scale.of(quick))
    base = registry()["adamw"].learning_rate
    runs: dict[str, Runs] = {}
    chosen: dict[str, Any] = {}
    for name, (subset, k) in _subsets().items():
        # A sum over k squares is k times their mean, so steps shrink with the root of k.
        rate, trials = trainer.best_rate("adam_sn", base * math.sqrt(k), {"subset": subset})
        runs[name] = trainer.run("adam_sn", rate, {"subset": subset})
        chosen[name] = {"rate": rate, "trials": trials}
    final = {name: statistics.fmean(found.final) for name, found in runs.items()}
    best, worst = min(final, key=final.__getitem__), max(final, key=final.__getitem__)
    listed = ", ".join(f"{name}: {mean_and_spread(found.final)}" for name, found in runs.items())
    return Outcome(
        figure=f"validation loss by subset size: {listed}; best {best}, worst {worst}",
        # a and a/2 are within a factor of two or so of the root of d for these matrices.
        verdict=verdict(best in ("a/2", "a", "sqrt(d)"), worst == "d"),
        numbers={name: {**found.as_json(), **chosen[name]} for name, found in runs.items()},
    )


_SOURCE = "Nguyen, Nguyen 2025, arXiv:2411.07120"

CLAIMS = (
    Claim(
        name="adam-sn-half-state",
        claim="AdamSN is as good as AdamW with half the optimizer state.",
        source=_SOURCE,
        how=(
            "Nano model on the default task, each at its tuned rate. Holds if AdamSN's validation "
            "loss is at most 2 % above AdamW's and its state at most 55 % as large."
        ),
        measure=_measure_against_adamw,
    ),
    Claim(
        name="subset-size",
        claim="Subsets of about sqrt(d) coordinates are best, one subset for all is worst.",
        source=_SOURCE,
        how=(
            "AdamSN with runs of k = 1, a/2, a, sqrt(d), d coordinates on the nano model (a the "
            "smaller side, d the size of a matrix), each at its best of three rates around AdamW's "
            "times sqrt(k). Holds if the least validation loss is at a/2, a or sqrt(d), which lie "
            "within a factor of four of one another, and the largest at d."
        ),
        measure=_measure_sizes,
    ),
)
