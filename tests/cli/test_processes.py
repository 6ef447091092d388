"""Training in several processes, as their user meets it: the same losses, one end for all."""

import json
import random
import shlex
import signal
import time

import numpy as np
import pytest
import several_processes
from several_processes import clean_env, run_all, started

from jaxopt_suite.experiments.checkpoints import Checkpoints
from jaxopt_suite.experiments.logs import RunFolder
from jaxopt_suite.parallel.roll_call import free_port

STEPS = 40
PROGRAM = "-m jaxopt_suite.cli.main train"


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Seconds; two processes start in about ten on an idle machine of two cores."""
    monkeypatch.setattr(several_processes, "LIMIT", 300)


@pytest.fixture
def options(tmp_path):
    rng = random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(rng.choice(["alpha", "beta", "gamma"]) for _ in range(4000)))
    sizes = f"--steps {STEPS} --batch-size 8 --seq-len 16 --log-every 1 --eval-every 20"
    return shlex.split(f"{PROGRAM} {sizes} --eval-batches 1 --data {text}")


def members(words, count=2):
    """The command of each process, which find one another on this machine."""
    address = ["--coordinator", f"localhost:{free_port()}", "--num-processes", str(count)]
    return [[*words, *address, "--process-id", str(index)] for index in range(count)]


def losses(path):
    return [[r.get("loss", 0.0), r.get("val_loss", 0.0)] for r in RunFolder(path).read()]


def finish(words, **env):
    (ended,) = run_all(words, env=clean_env(**env))
    assert ended.status == 0, ended.err
    return ended


@pytest.mark.slow
def test_two_processes_of_four_devices_train_as_one_process_of_eight(options, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish([*options, "--mesh", "data=8", "--out", str(one)])
    ended = finish([*options, "--mesh", "data=8", "--processes", "2", "--out", str(two)])
    assert ended.out.count("finished: 40 steps") == 1
    # Gloo adds up in another order than one process does; float32, 40 steps.
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-4)
    (start,) = map(json.loads, (two / "starts.jsonl").read_text().splitlines())
    assert (start["mesh"], start["processes"]) == ("data=8", 2)


@pytest.mark.slow
def test_a_sigterm_to_one_process_stops_both_and_any_number_may_go_on(options, tmp_path):
    words = [*options, "--out", str(tmp_path / "run")]
    run = RunFolder(tmp_path / "run")
    both = members([*words, "--mesh", "data=8"])
    with started(*both, env=clean_env(JAX_NUM_CPU_DEVICES="4")) as processes:
        while not run.metrics_path.exists() or run.metrics_path.read_bytes().count(b"\n") < 5:
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        processes[1].terminate()
        shown = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, shown
    with Checkpoints(run.checkpoints_path) as checkpoints:
        step = checkpoints.steps()[-1]
    assert 4 <= step < STEPS, "it was stopped too late to tell anything"
    assert f"stopped by SIGTERM after step {step} of {STEPS}; the state is saved" in shown[0][1]
    assert "Traceback" not in "".join(out + err for out, err in shown)
    # One process goes on, is stopped, and two start over from there.
    with started([*words, "--mesh", "data=2,fsdp=2"]) as (alone,):
        while len((run.path / "starts.jsonl").read_text().splitlines()) < 2:
            assert alone.poll() is None, alone.communicate()
            time.sleep(0.01)
        alone.terminate()
        assert alone.wait() == 128 + signal.SIGTERM
    finish([*words, "--mesh", "data=4", "--processes", "2"])
    finish([*options, "--out", str(tmp_path / "undisturbed")])
    undisturbed = losses(tmp_path / "undisturbed")
    # From 5.4 they fall to a twentieth, and what was rounded at the start shows as much more.
    np.testing.assert_allclose(losses(run.path), undisturbed, rtol=2e-4, atol=2e-4)


@pytest.mark.exhaustive
def test_after_a_kill_one_process_goes_on_with_fewer_workers(options, tmp_path):
    saves = ["--checkpoint-every", "5", "--sync-every", "4", "--out", str(tmp_path / "run")]
    words, run = [*options, *saves], RunFolder(tmp_path / "run")
    both = members([*words, "--diloco-workers", "4"])
    with started(*both, env=clean_env(JAX_NUM_CPU_DEVICES="2")) as processes:
        while not (run.checkpoints_path / "10").exists():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.01)
        processes[1].kill()  # the other waits in a step for it until it is killed too
    finish([*words, "--diloco-workers", "2"])
    starts = [json.loads(x) for x in (run.path / "starts.jsonl").read_text().splitlines()]
    assert [start["mesh"] for start in starts] == ["worker=4", "worker=2"]
    assert 10 <= starts[1]["step"] < STEPS
    found = np.array(losses(run.path))
    assert len(found) == STEPS + 1
    assert found[-1, 1] < 0.6 * found[0, 1]  # it has gone on learning


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_found_at_the_next_record_and_ends_both(options, tmp_path):
    words = [*options, "--log-every", "7", "--learning-rate", "1e35", "--diloco-workers", "4"]
    (ended,) = run_all([*words, "--processes", "2", "--out", str(tmp_path)])
    assert ended.status == 3
    assert ended.err.count("not finite at step 1: loss ") == 1
    assert [record["step"] for record in RunFolder(tmp_path).read()] == [0, 1]


@pytest.mark.slow
def test_an_error_of_one_process_ends_it_at_once_though_the_other_waits_for_it(options, tmp_path):
    first, second = members([*options, "--out", str(tmp_path / "run")])
    with started(first, [*second, "--data", "missing.txt"]) as processes:
        begun = time.monotonic()
        _, errors = processes[1].communicate()
        assert processes[1].returncode == 2
        assert errors == "error: cannot read the data missing.txt: No such file or directory\n"
        assert time.monotonic() - begun < 60  # JAX's own farewell takes five minutes
        processes[0].communicate()  # is told, within JAX's half a minute
        assert processes[0].returncode not in (0, None)
        assert time.monotonic() - begun < 120


@pytest.mark.slow
def test_what_is_wrong_with_all_processes_is_said_once(options, tmp_path):
    words = [*options, "--mesh", "data=4", "--processes", "2", "--optimizer", "adam"]
    (ended,) = run_all([*words, "--out", str(tmp_path / "run")])
    assert ended.status == 2
    assert ended.err.count("--optimizer must be one of") == 1, ended.err
    assert "Traceback" not in ended.err


def test_a_coordinator_that_does_not_answer_is_given_up_in_time(options, tmp_path):
    words = [*options, "--coordinator", f"localhost:{free_port()}", "--num-processes", "2"]
    (ended,) = run_all([*words, "--process-id", "1", "--initialization-timeout", "5"])
    assert ended.status == 2
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert 5 <= ended.seconds < 30
    assert not (tmp_path / "run").exists()


def test_more_devices_than_the_environment_allows_are_refused(options, tmp_path):
    words = [*options, "--mesh", "data=4", "--out", str(tmp_path / "run")]
    for fixed in (
        {"JAX_NUM_CPU_DEVICES": "2"},
        {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    ):
        (ended,) = run_all(words, env=clean_env(**fixed))
        assert ended.status == 2
        assert ended.err == "error: --mesh: mesh data=4 needs 4 devices, and there are 2\n"
