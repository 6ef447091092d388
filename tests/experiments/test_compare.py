"""Comparisons: the sweep's choices, what is run once and not twice, folders of something else."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable

import pytest

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import compare
from jaxopt_suite.experiments.config import CompareConfig, TrainConfig
from jaxopt_suite.experiments.data import Corpus, load_corpus
from jaxopt_suite.experiments.logs import RunFolder
from jaxopt_suite.experiments.loop import TrainResult
from jaxopt_suite.experiments.table import Run


def planted(loss_of: Callable[[float], float]) -> Callable[[float], Run]:
    """Trials whose final loss is a function of the learning rate; infinite is diverged."""

    def trial(rate: float) -> Run:
        loss = loss_of(rate)
        diverged = None if math.isfinite(loss) else 7
        return Run("x", 9, rate, (0, 8), (0.0, 1.0), (5.5, loss), 1.0, 8, 1, diverged_at=diverged)

    return trial


def valley(best: float) -> Callable[[float], float]:
    return lambda rate: 2.0 + abs(math.log2(rate / best))


@pytest.mark.parametrize(
    ("best", "chosen", "tried", "at_edge"),
    [
        (1.0, 1.0, [0.25, 0.5, 1, 2, 4], False),
        (2.0, 2.0, [0.25, 0.5, 1, 2, 4], False),
        (4.0, 4.0, [0.25, 0.5, 1, 2, 4, 8], False),
        (0.125, 0.125, [0.0625, 0.125, 0.25, 0.5, 1, 2, 4], False),
        (1024.0, 16.0, [0.25, 0.5, 1, 2, 4, 8, 16], True),
    ],
)
def test_sweep_follows_the_best_rate_past_the_edge_twice_at_most(best, chosen, tried, at_edge):
    rate = compare.sweep(1.0, planted(valley(best)))
    assert rate.value == chosen
    assert [trial.learning_rate for trial in rate.trials] == tried
    assert rate.at_edge is at_edge
    assert rate.source == "swept"


def test_sweep_counts_divergence_as_infinite_and_keeps_it_in_the_record():
    rate = compare.sweep(1.0, planted(lambda r: math.inf if r >= 1 else valley(4.0)(r)))
    assert rate.value == 0.5
    assert [t.learning_rate for t in rate.trials if t.diverged_at == 7] == [1.0, 2.0, 4.0]
    assert not rate.at_edge


def test_sweep_in_which_everything_diverges_ends_at_the_smallest_rate_and_says_edge():
    rate = compare.sweep(1.0, planted(lambda _: math.inf))
    assert rate.value == 0.0625
    assert rate.at_edge


@pytest.fixture
def corpus(tmp_path: pathlib.Path) -> Corpus:
    path = tmp_path / "text"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    return load_corpus(path)


class FakeTraining:
    """Stands in for the loop: writes planted records and remembers what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.trained: list[TrainConfig] = []
        self.built: list[TrainConfig] = []
        self.signal_at: int | None = None
        self.nan_above = math.inf
        monkeypatch.setattr(compare, "train", self.train)
        monkeypatch.setattr(compare, "build_program", lambda config: self.built.append(config))

    def train(self, config: TrainConfig, **_: object) -> TrainResult:
        if len(self.trained) == self.signal_at:
            return self._result(RunFolder(config.out), stopped="signal", signum=2)
        self.trained.append(config)
        folder = RunFolder(config.out)
        folder.create_or_open({"out": config.out})
        loss = math.nan if config.learning_rate > self.nan_above else config.learning_rate
        for step, value in ((0, 5.5), (config.steps, loss)):
            folder.append({"step": step, "seconds": 0.1 * step, "val_loss": value})
        return self._result(folder)

    def _result(self, run: RunFolder, stopped: str = "finished", signum: int | None = None):
        names = [field.name for field in dataclasses.fields(TrainResult)]
        values = dict.fromkeys(names, 1) | {"message": "stopped", "run": run, "mesh": None}
        return TrainResult(**values | {"stopped": stopped, "signum": signum})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTraining:
    return FakeTraining(monkeypatch)


@pytest.fixture
def config(tmp_path: pathlib.Path) -> CompareConfig:
    return CompareConfig(
        optimizers="adamw,lion",
        seeds=2,
        steps=4,
        batch_size=4,
        seq_len=8,
        out=str(tmp_path / "out"),
    )


def do(config: CompareConfig, corpus: Corpus):
    return compare.compare(config, command="the command", corpus=corpus)


def test_seeds_are_interleaved_and_each_program_is_built_once(fake, config, corpus):
    comparison = do(config, corpus)
    order = [(c.optimizer, c.seed) for c in fake.trained]
    assert order == [("adamw", 0), ("lion", 0), ("adamw", 1), ("lion", 1)]
    assert [c.optimizer for c in fake.built] == ["adamw", "lion"]
    assert [(r.optimizer, r.seed) for r in comparison.runs] == sorted(order)


def test_the_sweeps_seed_is_none_of_the_final_ones_and_its_rate_is_used(fake, config, corpus):
    comparison = do(dataclasses.replace(config, lr_sweep=True, optimizers="lion"), corpus)
    sweep = [c for c in fake.trained if "/sweep/" in c.out]
    final = [c for c in fake.trained if "/sweep/" not in c.out]
    assert {c.seed for c in sweep} == {2}
    assert {c.seed for c in final} == {0, 1}
    best = min(c.learning_rate for c in sweep)  # the planted loss is the rate itself
    assert {c.learning_rate for c in final} == {best}
    assert comparison.rates["lion"].at_edge
    assert len(comparison.rates["lion"].trials) == len(sweep) == 7
    assert "used, at the grid's edge" in (pathlib.Path(config.out) / "report.md").read_text()


def test_what_has_ended_is_read_back_and_not_repeated(fake, config, corpus):
    first = do(config, corpus)
    (pathlib.Path(config.out) / "report.md").unlink()
    second = do(config, corpus)
    assert len(fake.trained) == 4
    assert second == first
    assert (pathlib.Path(config.out) / "report.md").exists()


def test_a_signal_ends_it_and_the_next_start_makes_only_what_is_missing(fake, config, corpus):
    fake.signal_at = 3
    with pytest.raises(compare.Interrupted) as stop:
        do(config, corpus)
    assert stop.value.signum == 2
    fake.signal_at = None
    do(config, corpus)
    assert [(c.optimizer, c.seed) for c in fake.trained[3:]] == [("lion", 1)]


def test_a_validation_loss_that_is_not_finite_is_a_divergence(fake, config, corpus):
    fake.nan_above = 0.0
    comparison = do(config, corpus)
    assert {run.diverged_at for run in comparison.runs} == {4}
    assert {run.steps for run in comparison.runs} == {(0,)}


def test_a_folder_with_another_comparison_is_refused_naming_every_difference(fake, config, corpus):
    do(config, corpus)
    other = dataclasses.replace(config, steps=8, optimizers="adamw")
    with pytest.raises(UserError) as refusal:
        do(other, corpus)
    for expected in ("steps is 4 there and 8 here", "optimizers is 'adamw,lion' there and 'adamw'"):
        assert expected in str(refusal.value)
    assert "seq_len" not in str(refusal.value)


def test_another_mesh_is_another_comparison_as_it_takes_other_times(fake, config, corpus):
    do(config, corpus)
    with pytest.raises(UserError, match="mesh is None there and 'data=2' here"):
        do(dataclasses.replace(config, mesh="data=2"), corpus)


def test_layout_and_precision_reach_every_run(fake, config, corpus):
    chosen = {"mesh": "data=2", "scan_layers": True, "dtype": "bfloat16", "accumulate": 2}
    do(dataclasses.replace(config, **chosen), corpus)
    for trained in fake.trained:
        assert {name: getattr(trained, name) for name in chosen} == chosen


def test_one_of_several_processes_is_refused(fake, config, corpus, monkeypatch):
    monkeypatch.setattr(compare.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"one process, and this is one of 2; .*jaxopt-suite train"):
        do(config, corpus)
    assert not pathlib.Path(config.out).exists()


def test_other_data_under_the_same_name_is_refused(fake, config, corpus):
    do(config, corpus)
    changed = dataclasses.replace(corpus, train=corpus.train[::-1])
    with pytest.raises(UserError, match="data_fingerprint is"):
        do(config, changed)


def test_settings_that_were_refused_before_the_first_run_do_not_claim_the_folder(
    fake, config, corpus, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(
            compare, "build_program", lambda config: (_ for _ in ()).throw(UserError("x"))
        )
        with pytest.raises(UserError, match="x"):
            do(dataclasses.replace(config, preset="nanoo"), corpus)
    assert do(config, corpus).settings["preset"] == "nano"


def test_a_damaged_result_and_a_folder_that_cannot_be_made_are_the_users_to_put_right(
    fake, config, corpus, tmp_path
):
    do(config, corpus)
    path = pathlib.Path(config.out) / "adamw" / "seed-0" / "result.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        do(config, corpus)
    with pytest.raises(UserError, match="cannot be written"):
        do(dataclasses.replace(config, out=str(tmp_path / "text" / "out")), corpus)


def test_the_folder_of_a_training_run_is_refused(fake, config, corpus):
    RunFolder(config.out).create_or_open({"optimizer": "adamw"})
    with pytest.raises(UserError, match="folder of a training run"):
        do(config, corpus)


def test_summary_names_data_machine_and_versions(fake, config, corpus):
    do(config, corpus)
    summary = json.loads((pathlib.Path(config.out) / "summary.json").read_text())
    assert summary["command"] == "the command"
    assert summary["data"]["fingerprint"] == corpus.fingerprint
    assert summary["unigram_entropy"] == corpus.unigram_entropy()
    assert {"hardware", "jax", "optax", "python"} <= set(summary["environment"])
