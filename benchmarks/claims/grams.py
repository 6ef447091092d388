"""Grams against cautious Adam and Adam, in training a language model."""

import statistics

from benchmarks.claims.claim import Claim, Outcome, verdict
from benchmarks.claims.training import Runs, Scale, Trainer, mean_and_spread
from jaxopt_suite.optimizers import registry

# All three are one recipe, so that nothing else differs: no weight decay, one epsilon.
_KAPPAS = {"Grams": -1.0, "cautious": 0.0, "Adam": 1.0}
_RATE = 1e-3


def _in_order(values: list[float]) -> bool:
    return values == sorted(values)


def _measure(quick: bool) -> Outcome:
    trainer = Trainer(Scale.of(quick))
    equal: dict[str, Runs] = {}
    tuned: dict[str, Runs] = {}
    trials = {}
    rates = {}
    tuned_rate = registry()["adamw"].learning_rate
    for name, kappa in _KAPPAS.items():
        settings = {"kappa": kappa}
        equal[name] = trainer.run("grams", _RATE, settings)
        rates[name], trials[name] = trainer.best_rate("grams", tuned_rate, settings)
        tuned[name] = trainer.run("grams", rates[name], settings)
    early = {name: statistics.fmean(runs.early) for name, runs in equal.items()}
    gap = early["Adam"] - early["Grams"]
    tuned_gap = statistics.fmean(tuned["Adam"].early) - statistics.fmean(tuned["Grams"].early)
    listed = lambda found: ", ".join(
        f"{name} {mean_and_spread(runs.early)}" for name, runs in found.items()
    )
    return Outcome(
        figure=(
            f"mean training loss of the first {trainer.scale.early} steps at equal rate: "
            f"{listed(equal)}; each at its best rate: {listed(tuned)}. Adam's lag behind Grams is "
            f"{gap:+.3f}, and {tuned_gap:+.3f} when tuned"
        ),
        verdict=verdict(_in_order([early[name] for name in _KAPPAS]), abs(tuned_gap) < abs(gap)),
        numbers={
            "equal": {name: runs.as_json() for name, runs in equal.items()},
            "tuned": {name: runs.as_json() for name, runs in tuned.items()},
            "tuned_rates": rates,
            "trials": trials,
        },
    )


CLAIMS = (
    Claim(
        name="grams-early",
        claim=(
            "At equal learning rate Grams trains faster early on than cautious Adam, and that "
            "faster than Adam; tuning each rate shrinks the gap."
        ),
        source="Cao, Li, Song 2024, arXiv:2412.17107 (order of methods in pre-training)",
        how=(
            "Nano model on the default task; kappa = -1 (Grams), 0 (cautious Adam, not rescaled), "
            f"1 (Adam) of one recipe at rate {_RATE:g}, then each at its best of three rates "
            "around AdamW's tuned one. Holds if the early training losses are in that order and "
            "the gap is smaller when tuned."
        ),
        measure=_measure,
    ),
)
