"""Several processes from one command: what is shown, what is passed on, how all of them end."""

import os
import pathlib
import signal
import sys
import time

import pytest
from several_processes import clean_env, started

from jaxopt_suite.experiments.launch import launch

PRINT = """
import os, sys
words = sys.argv[1:]
index = int(words[words.index("--process-id") + 1])
"""
# What a launcher in a process of its own runs: each child leaves its number in a file.
LAUNCH = """
import sys
from jaxopt_suite.experiments.launch import launch
child, folder = sys.argv[1:]
sys.exit(launch([folder], processes=2, devices_per_process=1, program=(sys.executable, "-c", child),
                grace=1.0))
"""
NOTE = f"""{PRINT}
import pathlib, signal, time
pathlib.Path(words[0], f"{{index}}.tmp").write_text(str(os.getpid()))
pathlib.Path(words[0], f"{{index}}.tmp").rename(pathlib.Path(words[0], str(index)))
"""


def run(code: str, *arguments: str, processes: int = 2, devices: int = 1) -> int:
    return launch(
        arguments,
        processes=processes,
        devices_per_process=devices,
        program=(sys.executable, "-c", PRINT + code),
        grace=1.0,
    )


def test_each_is_told_who_it_is_and_the_output_of_the_first_is_shown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run("print(words)", "train", "--steps", "3") == 0
    out = capfd.readouterr().out
    assert out.startswith("['train', '--steps', '3', '--coordinator', 'localhost:")
    assert out.endswith("'--num-processes', '2', '--process-id', '0']\n")
    assert out.count("--coordinator") == 1


def test_the_devices_are_the_cpus_and_as_many_as_asked_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    code = "import jax; print(jax.default_backend(), jax.device_count(), os.environ['XLA_FLAGS'])"
    assert run(code, processes=1, devices=3) == 0
    assert capfd.readouterr().out.split() == ["cpu", "3", "--xla_dump_to="]


def test_the_status_is_that_of_the_first_to_fail_and_its_output_is_shown(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = "import time; print('out of', index); time.sleep(30 * (1 - index)); sys.exit(7)"
    begun = time.monotonic()
    assert run(code) == 7
    assert time.monotonic() - begun < 15  # the first was not waited for
    assert "[process 1] out of 1\n[process 1] ended with status 7\n" in capfd.readouterr().err


def test_of_one_that_is_killed_the_status_names_the_signal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = "import signal, time; index and os.kill(os.getpid(), signal.SIGKILL); time.sleep(30)"
    assert run(code) == 128 + signal.SIGKILL
    assert "[process 1] ended with status 137" in capfd.readouterr().err


def test_the_others_have_time_to_end_by_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("import time; time.sleep(0.3 * (1 - index)); print('my word'); sys.exit(2)") == 2
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("my word\n", "")  # the other's word is the same


def test_impossible_numbers_are_refused() -> None:
    for processes, devices in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            run("", processes=processes, devices=devices)


def pids(folder: pathlib.Path) -> list[int]:
    """Of the children, once both run."""
    while sum(path.name.isdigit() for path in folder.iterdir()) < 2:
        time.sleep(0.05)
    return [int((folder / str(index)).read_text()) for index in range(2)]


def assert_gone(pids: list[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_each_once_and_their_status_comes_back(
    tmp_path: pathlib.Path, signum: signal.Signals
) -> None:
    child = f"""
seen = []
import signal
signal.signal({int(signum)}, lambda *_: seen.append(1))
{NOTE}
while not seen:
    time.sleep(0.05)
time.sleep(0.3)
pathlib.Path(words[0], f"seen{{index}}").write_text(str(len(seen)))
sys.exit(128 + {int(signum)})
"""
    with started(["-c", LAUNCH, child, str(tmp_path)], env=clean_env()) as (launcher,):
        children = pids(tmp_path)
        launcher.send_signal(signum)
        assert launcher.wait(timeout=20) == 128 + signum
    assert_gone(children)
    assert [(tmp_path / f"seen{index}").read_text() for index in range(2)] == ["1", "1"]


def test_one_that_ignores_the_end_of_another_is_killed(tmp_path: pathlib.Path) -> None:
    child = f"""
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
{NOTE}
time.sleep(60 * (1 - index))
sys.exit(3)
"""
    with started(["-c", LAUNCH, child, str(tmp_path)], env=clean_env()) as (launcher,):
        children = pids(tmp_path)
        assert launcher.wait(timeout=20) == 3
    assert_gone(children)
