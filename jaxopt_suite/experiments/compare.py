"""Training one model with several optimizers and seeds, each at its own learning rate."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.core.files import write_atomically
from jaxopt_suite.experiments import environment, report
from jaxopt_suite.experiments.config import CompareConfig, ExperimentConfig, TrainConfig
from jaxopt_suite.experiments.data import Corpus, load_corpus
from jaxopt_suite.experiments.entries import Entry, entries
from jaxopt_suite.experiments.loop import TrainResult, train
from jaxopt_suite.experiments.steps import Program, build_program
from jaxopt_suite.experiments.table import Rate, Run

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
EXTENSIONS = 2


class Interrupted(Exception):
    """A signal stopped the comparison; everything up to there is saved.

    Attributes:
      signum: the signal's number.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def sweep(center: float, trial: Callable[[float], Run]) -> Rate:
    """Looks for the best learning rate on a grid of powers of two around ``center``.

    While the best rate is at an edge of the grid, one more point is added beyond it, ``EXTENSIONS``
    times at most.

    Args:
      center: the middle of the grid.
      trial: trains with a learning rate; a run that diverged counts as an infinite loss.

    Returns:
      The rate with the lowest final validation loss (the lowest such rate on a tie), all trials,
      and whether it is still at the edge.
    """
    trials = {rate: trial(rate) for rate in (center * factor for factor in FACTORS)}
    best = lambda: min(sorted(trials), key=lambda rate: trials[rate].final_loss)
    for _ in range(EXTENSIONS):
        if best() not in (min(trials), max(trials)):
            break
        beyond = best() / 2 if best() == min(trials) else best() * 2
        trials[beyond] = trial(beyond)
    at_edge = best() in (min(trials), max(trials))
    return Rate(best(), "swept", tuple(trials[rate] for rate in sorted(trials)), at_edge)


def _as_run(result: TrainResult, *, optimizer: str, seed: int, learning_rate: float) -> Run:
    """Reduces a run that has ended to what the comparison keeps of it."""
    records = [record for record in result.run.read() if "val_loss" in record]
    points = [record for record in records if record["val_loss"] is not None]
    nonfinite = [record["step"] for record in records if record["val_loss"] is None]
    if result.stopped == "nonfinite":
        nonfinite.append(result.step)
    return Run(
        optimizer=optimizer,
        seed=seed,
        learning_rate=learning_rate,
        steps=tuple(record["step"] for record in points),
        seconds=tuple(record["seconds"] for record in points),
        val_loss=tuple(record["val_loss"] for record in points),
        ms_per_step=result.ms_per_step,
        state_bytes=result.state_bytes,
        n_params=result.n_params,
        load=os.getloadavg()[0],
        hardware=environment.hardware(),
        mesh=result.mesh,
        wire_bytes=result.wire_bytes,
        largest_wire_bytes=result.largest_wire_bytes,
        diverged_at=min(nonfinite, default=None),
    )


def _read_run(path: pathlib.Path) -> Run:
    try:
        fields = json.loads(path.read_text())
        lists = {name: tuple(fields[name]) for name in ("steps", "seconds", "val_loss")}
        return Run(**(fields | lists))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it, and the run's result is made again"
        ) from error


class _Runner:
    """Makes the runs of one comparison, each of them once, and compiles each program once."""

    def __init__(self, config: CompareConfig, corpus: Corpus, console: Console) -> None:
        self._corpus = corpus
        self._console = console
        self._folder = pathlib.Path(config.out)
        names = [field.name for field in dataclasses.fields(ExperimentConfig)]
        self._common = {name: getattr(config, name) for name in names if name != "set"}
        self._programs: dict[tuple[str, float], Program] = {}

    def run(self, entry: Entry, *, learning_rate: float, seed: int, folder: str) -> Run:
        """The run in ``<out>/<optimizer>/<folder>``: read if it has ended before, else made."""
        name = entry.recipe.name
        out = self._folder / name / folder
        self._say(f"{name}, {folder}, learning rate {learning_rate:.3g}")
        result_path = out / "result.json"
        if result_path.exists():
            run = _read_run(result_path)
        else:
            result = self._train(entry, learning_rate, seed, out)
            run = _as_run(result, optimizer=name, seed=seed, learning_rate=learning_rate)
            write_atomically(result_path, json.dumps(dataclasses.asdict(run)).encode())
        self._say(f"  {run.outcome}, {run.ms_per_step:.1f} ms per step")
        return run

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _train(self, entry: Entry, rate: float, seed: int, out: pathlib.Path) -> TrainResult:
        config = TrainConfig(
            **self._common,
            set=entry.settings_as_text(),
            optimizer=entry.recipe.name,
            learning_rate=rate,
            seed=seed,
            out=str(out),
            keep=1,  # only to go on from: with a checkpoint of every run, disk space matters
        )
        key = entry.recipe.name, rate
        if key not in self._programs:
            self._programs[key] = build_program(config)
        # Elsewhere than on a terminal the loop shows a line for every record: too much of it here.
        console = self._console if self._console.is_terminal else None
        result = train(config, corpus=self._corpus, program=self._programs[key], console=console)
        if result.signum is not None:
            raise Interrupted(f"{out}: {result.message}", result.signum)
        return result

    def sweep(self, entry: Entry, *, seed: int) -> Rate:
        """The entry's best learning rate, by runs that stay in the folder."""

        def trial(rate: float) -> Run:
            return self.run(entry, learning_rate=rate, seed=seed, folder=f"sweep/lr-{rate:.6g}")

        return sweep(entry.rate.value, trial)


def _open(config: CompareConfig, chosen: list[Entry], corpus: Corpus) -> None:
    """Creates the folder, or makes sure that the runs in it are of the same comparison."""
    identity = dataclasses.asdict(config) | {
        "data": corpus.name,
        "data_fingerprint": corpus.fingerprint,
        "learning_rates": {entry.recipe.name: entry.rate.value for entry in chosen},
    }
    del identity["out"]
    folder = pathlib.Path(config.out)
    if (folder / "config.json").exists():
        raise UserError(f"--out {folder} is the folder of a training run; give another one")
    text = json.dumps(identity, indent=2) + "\n"
    path = folder / "comparison.json"
    # A comparison that was refused before its first run holds nothing worth protecting.
    if any(folder.glob("*/seed-*/config.json")) or any(folder.glob("*/sweep/*/config.json")):
        _refuse_other(folder, _stored(path), json.loads(text))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _stored(path: pathlib.Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"the runs in {path.parent} cannot be told to be of this comparison, as {path.name} "
            f"cannot be read ({error}); give another --out"
        ) from error


def _refuse_other(folder: pathlib.Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    differing = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in {**there, **here}
        if there.get(name) != here.get(name)
    ]
    if differing:
        raise UserError(
            f"--out {folder} holds another comparison: {'; '.join(differing)}. Give the same "
            "settings to go on with it, or another --out"
        )


def _method(entry: Entry) -> report.Method:
    recipe, paper = entry.recipe, entry.recipe.paper
    return report.Method(
        name=recipe.name,
        title=paper.title,
        year=paper.year,
        arxiv=paper.arxiv,
        state_formula=recipe.state_formula,
        schedule=recipe.schedule,
        settings=entry.settings_as_text(),
    )


def _data_facts(corpus: Corpus) -> dict[str, str]:
    return {
        "source": corpus.name,
        "train": f"{corpus.train.size:,} bytes",
        "validation": f"{corpus.validation.size:,} bytes",
        "fingerprint": corpus.fingerprint,
    }


def _make_runs(
    config: CompareConfig, chosen: list[Entry], runner: _Runner
) -> tuple[list[Run], dict[str, Rate]]:
    """All final runs, grouped by optimizer, and the learning rates they were made with."""
    rates = {
        entry.recipe.name: runner.sweep(entry, seed=config.seeds) if config.lr_sweep else entry.rate
        for entry in chosen
    }
    # Seed by seed, so that a slow spell of the machine falls on all optimizers, not on one.
    runs = [
        runner.run(entry, learning_rate=rates[name].value, seed=seed, folder=f"seed-{seed}")
        for seed in range(config.seeds)
        for name, entry in zip(rates, chosen, strict=True)
    ]
    return sorted(runs, key=lambda run: list(rates).index(run.optimizer)), rates


@contextlib.contextmanager
def _blaming_disk(folder: str) -> Iterator[None]:
    """Turns a full disk or a forbidden folder into the user's message."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error}") from error


def compare(
    config: CompareConfig,
    *,
    command: str,
    corpus: Corpus | None = None,
    console: Console | None = None,
) -> report.Comparison:
    """Makes all runs of a comparison and writes its report into ``config.out``.

    Runs that have ended before are not repeated, and one that was cut off goes on.

    Args:
      config: what to compare.
      command: the command line to show in the report.
      corpus: ``config.data``, if it is loaded already.
      console: where progress is shown; ``None`` for nowhere.

    Returns:
      What the report was made from.

    Raises:
      UserError: for everything the user can put right.
      Interrupted: if a signal asked for a stop.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"compare runs in one process, and this is one of {jax.process_count()}; train every "
            "optimizer with jaxopt-suite train instead"
        )
    chosen = entries(config)
    corpus = load_corpus(config.data) if corpus is None else corpus
    console = Console(quiet=True) if console is None else console
    with _blaming_disk(config.out):
        _open(config, chosen, corpus)
        runs, rates = _make_runs(config, chosen, _Runner(config, corpus, console))
        machines = " | ".join(sorted({run.hardware for run in runs}))
        comparison = report.Comparison(
            runs=tuple(runs),
            rates=rates,
            methods=tuple(map(_method, chosen)),
            entropy=corpus.unigram_entropy(),
            settings=dataclasses.asdict(config),
            data=_data_facts(corpus),
            environment={"hardware": machines} | environment.versions(),
            command=command,
        )
        report.write(comparison, pathlib.Path(config.out))
    return comparison
