"""What mirrors hold after a kill, after a failure, and where a package is missing."""

import dataclasses
import json
import math
import sys
import types

import numpy as np
import pytest

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import loop, model
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.experiments.data import Corpus, train_batches
from jaxopt_suite.experiments.logs import RunFolder
from jaxopt_suite.experiments.loop import train
from jaxopt_suite.experiments.mirrors import mirroring, require_packages
from jaxopt_suite.experiments.steps import build_program

CONFIG = TrainConfig(
    steps=8, batch_size=2, seq_len=16, log_every=1, eval_every=8, eval_batches=1, checkpoint_every=3
)
CORPUS = Corpus(
    name="sentence",
    train=np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 40, np.uint8),
    validation=np.frombuffer(b"pack my box with five dozen liquor jugs. " * 8, np.uint8),
)


class FakeWandb(types.ModuleType):
    """The little of W&B that is used, with its server: runs by id, points by step, no way back."""

    def __init__(self):
        super().__init__("wandb")
        self.server = {}
        self.starts = []
        self.failing = False

    def init(self, **settings):
        self.starts.append(settings)
        return FakeRun(self, self.server.setdefault(settings["id"], {}))


class FakeRun:
    def __init__(self, service, points):
        self.service, self.points = service, points
        self.exit_code = None

    @property
    def step(self):
        return max(self.points, default=-1) + 1

    def log(self, values, step, commit):
        if self.service.failing:
            raise ConnectionError("no route to the server")
        assert commit, "a point not committed is lost when the process is killed"
        assert step >= self.step, "W&B would drop this point"
        self.points[step] = values

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.service.exit_code = int(kind is not None)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture(scope="module")
def program():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "PRESETS", model.PRESETS | {"nano": model.ModelConfig(8, 1, 1, 16)})
        yield build_program(CONFIG)


@pytest.fixture
def folder(tmp_path):
    """A run with two records; the second one's loss is not a number."""
    run = RunFolder(tmp_path / "run")
    run.create_or_open({"seed": 3})
    run.append({"step": 0, "seconds": 0.0, "val_loss": 5.5, "lr": None})
    run.append({"step": 2, "seconds": 1.5, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    return run


def start(path, program, *mirror):
    config = dataclasses.replace(CONFIG, out=str(path), mirror=mirror)
    return train(config, corpus=CORPUS, program=program)


def crash_before_batch(monkeypatch, number):
    def batches(*args, **kwargs):
        real = train_batches(*args, **kwargs)

        class Crashing:
            get_state, set_state, left = real.get_state, real.set_state, number

            def __next__(self):
                self.left -= 1
                if self.left == 0:
                    raise RuntimeError("crash")
                return next(real)

        return Crashing()

    monkeypatch.setattr(loop, "train_batches", batches)


def curves(run):
    """The numbers of ``metrics.jsonl`` by name, as (step, value) in order."""
    found = {}
    for record in run.read():
        for name, value in record.items():
            if name != "step" and value is not None:
                found.setdefault(name, []).append((record["step"], value))
    return found


def tensorboard_events(path):
    """All points by name, from every event file there is, as a fresh TensorBoard reads them."""
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs tensorboard: pip install 'jaxopt-suite[tensorboard]'",
    )
    unlimited = {accumulators.TENSORS: 0}
    events = accumulators.EventAccumulator(str(path / "tensorboard"), unlimited).Reload()
    return {name: events.Tensors(name) for name in events.Tags()["tensors"]}


def tensorboard_curves(path):
    return {
        name: [(point.step, point.tensor_proto.float_val[0]) for point in points]
        for name, points in tensorboard_events(path).items()
    }


def wandb_curves(wandb):
    (points,) = wandb.server.values()
    found = {}
    for step, values in points.items():
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))
    return found


def as_float32(found):
    return {name: [(s, float(np.float32(v))) for s, v in found[name]] for name in found}


def without_clock(found):
    return {name: found[name] for name in found if name not in ("seconds", "tokens_per_second")}


def test_tensorboard_holds_what_metrics_jsonl_holds_after_a_crash_too(
    tmp_path, program, monkeypatch
):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    crash_before_batch(monkeypatch, 6)
    with pytest.raises(RuntimeError, match="crash"):
        start(tmp_path, program, "tensorboard")
    crashed = curves(RunFolder(tmp_path))
    assert [step for step, _ in crashed["loss"]] == [1, 2, 3, 4, 5]  # past the checkpoint of 3
    assert tensorboard_curves(tmp_path) == as_float32(crashed)
    monkeypatch.undo()
    run = start(tmp_path, program, "tensorboard").run
    assert tensorboard_curves(tmp_path) == as_float32(curves(run))
    assert len(tensorboard_events(tmp_path)["loss"]) == CONFIG.steps
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_wandb_holds_one_run_whose_losses_are_those_of_metrics_jsonl(
    tmp_path, program, monkeypatch, wandb
):
    crash_before_batch(monkeypatch, 6)
    with pytest.raises(RuntimeError, match="crash"):
        start(tmp_path, program, "wandb")
    assert wandb.exit_code == 1
    assert wandb_curves(wandb) == curves(RunFolder(tmp_path))
    monkeypatch.setattr(loop, "train_batches", train_batches)
    run = start(tmp_path, program, "wandb").run
    assert wandb.exit_code == 0
    assert without_clock(wandb_curves(wandb)) == without_clock(curves(run))
    first, second = wandb.starts
    assert first == second
    assert first["resume"] == "allow"
    assert first["dir"] == str(tmp_path)
    assert first["config"] == json.loads(run.config_path.read_text())


def test_a_mirror_changes_no_record(tmp_path, program, wandb):
    plain = start(tmp_path / "plain", program).run
    mirrored = start(tmp_path / "mirrored", program, "wandb").run
    assert without_clock(curves(plain)) == without_clock(curves(mirrored))
    assert plain.config_path.read_text() == mirrored.config_path.read_text()


def test_a_mirror_that_fails_under_way_costs_one_warning_and_no_step(tmp_path, program, wandb):
    wandb.failing = True
    with pytest.warns(UserWarning, match="--mirror wandb failed .*no route") as warned:
        result = start(tmp_path, program, "wandb")
    assert len(warned) == 1
    assert result.stopped == "finished"
    assert [record["step"] for record in result.run.read()] == list(range(CONFIG.steps + 1))


def test_a_mirror_that_cannot_be_opened_is_the_user_s_to_put_right(folder, wandb):
    def init(**settings):
        raise ConnectionError("no API key configured")

    wandb.init = init
    with (
        pytest.raises(UserError, match="--mirror wandb cannot be opened: no API key"),
        mirroring(["wandb"], folder),
    ):
        pytest.fail("a mirror that is not open was used")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_before_anything_is_created(tmp_path, monkeypatch, name):
    for module in (name, f"{name}.summary"):
        monkeypatch.setitem(sys.modules, module, None)
    install = rf"needs the package {name}: pip install 'jaxopt-suite\[{name}\]'"
    with pytest.raises(UserError, match=f"--mirror {name} {install}"):
        train(dataclasses.replace(CONFIG, out=str(tmp_path / "run"), mirror=(name,)))
    assert not (tmp_path / "run").exists()


def test_a_folder_named_wandb_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="needs the package wandb"):
        require_packages(["wandb"])
    del sys.modules["wandb"]


def test_records_kept_come_first_and_numbers_that_are_not_finite_stay_so(folder, wandb):
    last = {"step": 3, "seconds": 2.0, "loss": -math.inf, "lr": None}
    with mirroring(["wandb"], folder) as (write,):
        folder.append(last)
        write(last)
    (points,) = wandb.server.values()
    assert list(points) == [0, 2, 3]
    assert points[0] == {"seconds": 0.0, "val_loss": 5.5}
    assert math.isnan(points[2].pop("loss"))
    assert points[2] == {"seconds": 1.5, "grad_norm": math.inf, "lr": 0.1}
    assert points[3] == {"seconds": 2.0, "loss": -math.inf}


def test_tensorboard_gets_what_is_not_finite_and_the_seconds_trained_as_its_clock(folder):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    with mirroring(["tensorboard"], folder):
        pass
    found = tensorboard_events(folder.path)
    assert math.isnan(found["loss"][0].tensor_proto.float_val[0])
    assert found["grad_norm"][0].tensor_proto.float_val[0] == math.inf
    assert sorted(found) == ["grad_norm", "loss", "lr", "seconds", "val_loss"]
    assert found["loss"][0].wall_time - found["val_loss"][0].wall_time == pytest.approx(1.5)


def test_only_event_files_are_deleted(folder):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    notes = folder.path / "tensorboard" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    for _ in range(2):
        with mirroring(["tensorboard"], folder):
            pass
    assert notes.read_text() == "mine"
    assert len(list(notes.parent.glob("events.*"))) == 1
