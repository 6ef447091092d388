"""Training in a process of its own that is killed, or asked to stop, and started again."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from jaxopt_suite.experiments.checkpoints import Checkpoints
from jaxopt_suite.experiments.logs import RunFolder

STEPS = 60
PATIENCE = 240  # seconds; a start takes about four on an idle machine


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(400)]
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choices(words, k=4000)))
    return path


@pytest.fixture
def start(tmp_path, text):
    """Starts a run in a new process; every process still alive at the end of the test is killed."""
    started = []

    def call(out):
        options = {
            "data": text,
            "out": out,
            "optimizer": "adam_snsm",
            "steps": STEPS,
            "batch-size": 4,
            "seq-len": 32,
            "log-every": 1,
            "eval-every": 10,
            "checkpoint-every": 7,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        module = [sys.executable, "-m", "jaxopt_suite.cli.main", "train"]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([*module, *words], cwd=tmp_path, **pipe))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


def lines(run):
    """Complete lines of the metrics so far."""
    try:
        return run.metrics_path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def wait_for(process, condition):
    """Returns once ``condition()`` holds; the process must not end before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def complete(process):
    """Lets it run to its end."""
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return printed


def losses(run):
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in r.items() if k not in clock} for r in run.read()]


@pytest.mark.slow
def test_three_kills_change_no_bit_of_any_loss(start, tmp_path):
    rng = random.Random(1)
    undisturbed, killed = RunFolder(tmp_path / "undisturbed"), RunFolder(tmp_path / "killed")
    complete(start(undisturbed.path))
    # Before the first step (the record of step 0 is there), then somewhere in each half.
    moments = [1, rng.randrange(10, STEPS // 2), rng.randrange(STEPS // 2, STEPS - 10)]
    for moment in moments:
        process = start(killed.path)
        wait_for(process, lambda moment=moment: lines(killed) >= moment)
        time.sleep(rng.uniform(0.0, 0.05))  # several steps, or the middle of a checkpoint
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert moment <= lines(killed) < STEPS + 1, "it was killed too late to tell anything"
    printed = complete(start(killed.path))
    assert f"finished: {STEPS} steps" in printed
    assert [record["step"] for record in losses(killed)] == list(range(STEPS + 1))
    assert losses(killed) == losses(undisturbed)


@pytest.mark.slow
def test_a_sigterm_saves_the_state_and_says_how_to_go_on(start, tmp_path):
    run = RunFolder(tmp_path / "run")
    process = start(run.path)
    wait_for(process, lambda: lines(run) >= 10)
    process.terminate()
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGTERM, errors
    with Checkpoints(run.checkpoints_path) as checkpoints:
        step = checkpoints.steps()[-1]
    assert f"stopped by SIGTERM after step {step} of {STEPS}; the state is saved" in errors
    assert f"to go on: jaxopt-suite train --steps {STEPS}" in errors
    assert losses(run)[-1]["step"] == step
    assert "Traceback" not in printed + errors
    at_step = tmp_path / "copy"
    shutil.copytree(run.path, at_step)
    complete(start(run.path))
    resumed = losses(run)
    assert resumed[: step + 1] == losses(RunFolder(at_step))
    assert [record["step"] for record in resumed] == list(range(STEPS + 1))
