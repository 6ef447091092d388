"""The command as its user meets it: words in, an exit status, a message and a folder out."""

import math
import os
import re
import shlex
import subprocess
import sys
import warnings

import pytest

import jaxopt_suite
from jaxopt_suite.cli import main as command_line
from jaxopt_suite.cli.train import command
from jaxopt_suite.experiments import loop
from jaxopt_suite.experiments.checkpoints import Checkpoints
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.experiments.logs import RunFolder
from jaxopt_suite.experiments.steps import build_program

SMALL = ("--steps", "6", "--batch-size", "2", "--seq-len", "16", "--checkpoint-every", "2")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.fixture
def jaxopt(tmp_path, text, capsys, monkeypatch):
    """Runs ``jaxopt-suite train`` with a small run's options before those given."""
    monkeypatch.chdir(tmp_path)

    def call(*words, out="run"):
        small = (*SMALL, "--data", str(text), "--out", str(out))
        status = command_line.main(["train", *small, *words])
        return status, *capsys.readouterr()

    return call


def in_a_new_python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["compare", "--help"]])
def test_help_does_not_wait_for_jax(words):
    program = (
        "import sys\nfrom jaxopt_suite.cli.main import main\n"
        f"try: main({words})\nexcept SystemExit as stop: assert stop.code == 0\n"
        "assert 'jax' not in sys.modules"
    )
    done = in_a_new_python(program)
    assert done.returncode == 0, done.stderr
    assert "usage: jaxopt-suite" in done.stdout


def test_version_is_the_package_s(capsys):
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxopt-suite {jaxopt_suite.__version__}\n"


@pytest.mark.parametrize("words", [["frob"], ["train", "--frob", "1"], ["train", "--steps", "x"]])
def test_words_that_are_no_command_end_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.main(words)
    assert stop.value.code == 2
    assert words[-2 if len(words) > 2 else -1] in capsys.readouterr().err


def test_a_finished_run_prints_its_summary_and_is_told_apart_the_second_time(jaxopt):
    status, printed, errors = jaxopt()
    assert (status, errors) == (0, "")
    assert re.search(r"^step 6/6  loss \d.*validation \d.*tokens/s", printed, re.MULTILINE)
    for name in ("finished: 6 steps", "validation loss", "unigram entropy", "time per step"):
        assert name in printed
    assert re.search(r"optimizer state +8\.000 bytes per parameter", printed)
    assert re.search(r"folder +run$", printed.rstrip(), re.MULTILINE)
    status, again, errors = jaxopt()
    assert (status, errors) == (0, "")
    assert "finished before: 6 steps" in again
    assert again.splitlines()[1:] == printed.splitlines()[-len(again.splitlines()) + 1 :]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer", "adam"], "--optimizer must be one of grams, .*got 'adam'"),
        (["--learning-rate", "-1"], "--learning-rate must be a positive, finite number, got -1"),
        (["--steps", "0"], "--steps must be an integer of at least 1, got 0"),
        (["--seq-len", "-5"], "--seq-len must be an integer of at least 1, got -5"),
        (["--preset", "huge"], "--preset must be one of nano, .*got 'huge'"),
        (["--set", "beta=0.9"], "no hyperparameter 'beta'; it has: b1, b2"),
        (["--set", "b2"], "--set must be NAME=VALUE"),
        (["--data", "missing.txt"], "missing.txt: No such file or directory"),
        (["--data", "empty.txt"], "empty.txt is an empty file"),
        (["--data", "short.txt"], "of short.txt has .* one batch of 2 windows of 17 .*needs 34"),
        (["--out", "text.txt/run"], "cannot use text.txt/run as a run folder"),
        (["--mesh", "dta=8"], "--mesh dta=8: a mesh has axes worker, data, fsdp, model, got 'dta'"),
        (["--mesh", "data=0"], "--mesh data=0: axis 'data' needs a positive size, got '0'"),
        (["--mesh", "data=9"], "--mesh: mesh data=9 needs 9 devices, and there are 8"),
        (["--mesh", "data=8"], r"--batch-size: .*must be a multiple of 8 .*got shape \(2, 17\)"),
        (["--accumulate", "3"], "--batch-size: .*multiple of 3 .*3 micro-batches"),
        (["--mesh", "data=2", "--shard-state-over", "dat"], "mesh's axes 'data', got 'dat'"),
        (["--shard-state-over", "data"], "--shard-state-over must be given with --mesh, got"),
        (["--offload-state"], "--offload-state must be given with --mesh"),
        (["--mesh", "model=2"], "mesh axis 'model' of size 2 must divide n_heads = 3"),
        (["--processes", "3", "--mesh", "data=8"], "--processes must divide the 8 devices"),
        (["--processes", "2"], "--processes must be given with --mesh"),
        (["--coordinator", "localhost:1"], "--coordinator must be given with --num-processes and"),
        (
            ["--coordinator", "localhost", "--num-processes", "2", "--process-id", "0"],
            "HOST:PORT.*got 'localhost'",
        ),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line(jaxopt, tmp_path, words, message):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("short")
    status, printed, errors = jaxopt(*words)
    assert (status, printed) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", errors)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_must_not_be_written_to_is_refused(tmp_path, text):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("needs a user whom file permissions bind, not root")
    words = ["train", *SMALL, "--data", str(text), "--out", str(folder / "run")]
    assert command_line.main(words) == 2


def test_no_traceback_reaches_the_terminal(tmp_path):
    words = ["-m", "jaxopt_suite.cli.main", "train", "--data", str(tmp_path / "none")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_a_run_is_not_gone_on_with_if_it_is_another_or_its_records_are_spoilt(jaxopt, tmp_path):
    assert jaxopt()[0] == 0
    before = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").iterdir()
    }
    status, _, errors = jaxopt("--preset", "tiny")
    assert status == 2
    assert re.search("preset is .nano. there and .tiny. here", errors)
    metrics = tmp_path / "run" / "metrics.jsonl"
    first, *others = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(first[:7] + "\n" + "".join(others))
    status, _, errors = jaxopt()
    assert status == 2
    assert "line 1 of run/metrics.jsonl is not a metrics record" in errors
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_diverging_run_ends_with_status_3_and_says_where(jaxopt):
    status, _, errors = jaxopt("--learning-rate", "1e30")
    assert status == 3
    assert re.match(r"not finite at step \d: loss .*gradient norm .*; stopped, ", errors)


@pytest.mark.parametrize(("signum", "status"), [(2, 130), (15, 143)])
def test_a_stopped_run_says_how_to_go_on(monkeypatch, capsys, signum, status):
    result = loop.TrainResult(
        run=RunFolder("x"),
        step=3,
        train_loss=1.0,
        val_loss=1.0,
        stopped="signal",
        message="stopped after step 3",
        signum=signum,
        seconds=1.0,
        ms_per_step=1.0,
        tokens_per_second=1.0,
        state_bytes=8,
        mesh=None,
        wire_bytes=0.0,
        largest_wire_bytes=0.0,
        n_params=1,
        learning_rate=1.0,
        unigram_entropy=3.0,
    )
    monkeypatch.setattr("jaxopt_suite.cli.train.train", lambda config, console: result)
    assert command_line.main(["train", "--steps", "9", "--out", "a b"]) == status
    errors = capsys.readouterr().err
    assert errors == "stopped after step 3\nto go on: jaxopt-suite train --steps 9 --out 'a b'\n"


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(optimizer="muon", steps=7, learning_rate=1e-5, seed=3, clip=None, out="a b"),
        TrainConfig(set=("b2=0.95", "mode=x y"), data="it's", warmup_fraction=0.0, clip=0.5),
        TrainConfig(mirror=("wandb", "tensorboard")),
    ],
)
def test_the_command_to_go_on_is_read_back_as_the_same_config(config, monkeypatch):
    seen = []
    monkeypatch.setattr("jaxopt_suite.cli.train.run", lambda config: seen.append(config) or 0)
    program, *words = shlex.split(command(config))
    assert program == "jaxopt-suite"
    assert command_line.main(words) == 0
    assert seen == [config]


def test_warnings_are_lines_without_a_source(monkeypatch, capsys):
    def warn(config):
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("skipped one", UserWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("jaxopt_suite.cli.train.run", warn)
    assert command_line.main(["train"]) == 0
    assert capsys.readouterr().err == "warning: skipped one\n"


@pytest.fixture
def small_disk(tmp_path):
    """A file system that two checkpoints of the nano preset fill, and a third does not fit on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs the mount command")
    if done.returncode:
        pytest.skip(f"needs permission to mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_loses_nothing_saved_and_the_run_goes_on_once_there_is_room(jaxopt, small_disk):
    status, _, errors = jaxopt(out=small_disk / "run")
    assert status == 2
    assert re.match(r"error: could not save the checkpoint of step 6 .*No space left", errors)
    with Checkpoints(small_disk / "run" / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [2, 4]
        config = TrainConfig(steps=6, batch_size=2, seq_len=16)
        assert checkpoints.restore(build_program(config).abstract_state).step == 4
    grow = ["mount", "-o", "remount,size=64m", str(small_disk)]
    subprocess.run(grow, check=True)
    assert jaxopt(out=small_disk / "run")[0] == 0
    assert jaxopt(out="undisturbed")[0] == 0
    read = lambda path: [
        {key: record[key] for key in record if key not in ("seconds", "tokens_per_second")}
        for record in RunFolder(path).read()
    ]
    assert read(small_disk / "run") == read("undisturbed")
    assert all(math.isfinite(record.get("loss", 0.0)) for record in read("undisturbed"))
