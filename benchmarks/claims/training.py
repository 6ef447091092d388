"""Short trainings of the nano model, shared by the claims about language models."""

import dataclasses
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.experiments.data import Corpus, load_corpus
from jaxopt_suite.experiments.loop import train
from jaxopt_suite.experiments.steps import build_program


@dataclasses.dataclass(frozen=True)
class Scale:
    """How long and how often a claim trains. The full scale is the default task.

    Attributes:
      steps: optimizer steps.
      seeds: seeds 0, 1, ... of each setting.
      rates: factors of the middle learning rate that are tried.
      early: the steps whose training loss is the early one.
    """

    steps: int
    seeds: int
    rates: tuple[float, ...]
    early: int

    @classmethod
    def of(cls, quick: bool) -> "Scale":
        """A few seconds for each setting, or the default task."""
        if quick:
            return cls(steps=30, seeds=1, rates=(1.0,), early=15)
        return cls(steps=200, seeds=3, rates=(0.5, 1.0, 2.0), early=50)


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs of one setting over seeds; losses in nats per byte.

    Attributes:
      early: mean training loss of the first steps, for each seed.
      final: validation loss after the last step, for each seed.
      state_bytes: of the optimizer.
    """

    early: tuple[float, ...]
    final: tuple[float, ...]
    state_bytes: int

    def as_json(self) -> dict[str, Any]:
        """For a row of results."""
        return dataclasses.asdict(self)


class Trainer:
    """Trains settings on one corpus, each compiled once for all its seeds."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._corpus: Corpus = load_corpus()

    def run(
        self,
        optimizer: str,
        learning_rate: float,
        settings: Mapping[str, Any] | None = None,
        *,
        seeds: int | None = None,
    ) -> Runs:
        """Trains with one setting.

        Args:
          optimizer: name of a recipe.
          learning_rate: its peak.
          settings: hyperparameters.
          seeds: how many; those of the scale by default.

        Raises:
          UserError: if a run did not reach its last step, as when it is interrupted.
        """
        config = TrainConfig(
            optimizer=optimizer,
            preset="nano",
            steps=self.scale.steps,
            learning_rate=learning_rate,
            log_every=5,
            eval_every=self.scale.steps,
            checkpoint_every=self.scale.steps,
            set=tuple(f"{name}={value}" for name, value in (settings or {}).items()),
        )
        program = build_program(config)
        early, final = [], []
        for seed in range(self.scale.seeds if seeds is None else seeds):
            with tempfile.TemporaryDirectory() as folder:
                here = dataclasses.replace(config, seed=seed, out=f"{folder}/run")
                result = train(here, program=program, corpus=self._corpus)
                if result.stopped == "signal":
                    raise UserError("interrupted before the claim was measured")
                early.append(self._early(result.run.read()))
                final.append(result.val_loss if result.stopped == "finished" else float("inf"))
        return Runs(tuple(early), tuple(final), program.state_bytes)

    def _early(self, records: Iterable[Mapping[str, Any]]) -> float:
        losses = [
            float("inf") if record["loss"] is None else record["loss"]
            for record in records
            if "loss" in record and record["step"] <= self.scale.early
        ]
        return statistics.fmean(losses)

    def best_rate(
        self, optimizer: str, middle: float, settings: Mapping[str, Any] | None = None
    ) -> tuple[float, dict[str, float]]:
        """The rate of least final loss among those around ``middle``, judged by the first seed.

        Returns:
          The rate, and the final loss for every rate that was tried.
        """
        rates = [middle * factor for factor in self.scale.rates]
        if len(rates) == 1:
            return middle, {}
        found = {rate: self.run(optimizer, rate, settings, seeds=1).final[0] for rate in rates}
        best = min(found, key=lambda rate: found[rate])
        return best, {f"{rate:g}": loss for rate, loss in found.items()}


def mean_and_spread(values: Sequence[float]) -> str:
    """``1.234 ± 0.005`` (standard deviation over seeds), or the value alone if there is one."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}"
