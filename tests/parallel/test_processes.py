"""Several processes: they start together or each ends, in time, with what is wrong."""

import contextlib
import socket
import time

import pytest
from several_processes import LIMIT, clean_env, run_all, started

from jaxopt_suite.parallel.processes import initialize
from jaxopt_suite.parallel.roll_call import free_port

START = """
import sys
from jaxopt_suite.parallel.processes import initialize
address, count, index, timeout = sys.argv[1], *map(int, sys.argv[2:5])
try:
    info = initialize(address, count, index, timeout=timeout, local_device_count=2)
except (RuntimeError, ValueError) as error:
    sys.exit(f"refused: {error}")
"""
SUM = """
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("d",), axis_types=(AxisType.Auto,))
x = jax.make_array_from_callback((4,), NamedSharding(mesh, P("d")), lambda i: np.arange(4.0)[i])
total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "d"), mesh=mesh, in_specs=P("d"),
                              out_specs=P()))(x)
print(info, total.addressable_data(0).item())
"""


def start(address: str, count: int, index: int, *, timeout: int = 30, then: str = "") -> list[str]:
    return ["-c", START + then, address, str(count), str(index), str(timeout)]


@pytest.fixture
def address() -> str:
    return f"localhost:{free_port()}"


def test_two_processes_of_two_devices_add_up_what_all_four_hold(address: str) -> None:
    ended = run_all(*(start(address, 2, index, then=SUM) for index in range(2)))
    for index, process in enumerate(ended):
        assert process.status == 0, process.err
        assert (
            f"ProcessInfo(process_index={index}, process_count=2, local_device_count=2, "
            "device_count=4) 6.0" in process.out
        )


def test_one_process_needs_no_other(address: str) -> None:
    (ended,) = run_all(start(address, 1, 0, then="print(info.device_count)"))
    assert (ended.status, ended.out) == (0, "2\n"), ended.err


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_whose_others_never_come_says_so_in_time(address: str, index: int) -> None:
    (ended,) = run_all(start(address, 2, index, timeout=2))
    words = ["found no process 0", address] if index else ["1 of num_processes=2", "process_id 1"]
    assert all(word in ended.err for word in [*words, "within 2 s"]), ended.err
    assert ended.status == 1
    assert ended.seconds < 15  # two of them waiting, the rest importing JAX on a busy machine


def test_different_counts_are_refused_by_both_with_both_named(address: str) -> None:
    for counts in ((2, 3), (3, 2)):
        for ended in run_all(*(start(address, count, i) for i, count in enumerate(counts))):
            assert ended.status == 1
            assert f"process 1 was started with num_processes={counts[1]}" in ended.err
            assert f"process 0 with num_processes={counts[0]}" in ended.err
            assert ended.seconds < 25  # not the 30 it would have waited


def test_a_process_id_that_comes_twice_is_refused_by_all(address: str) -> None:
    for ended in run_all(*(start(address, 3, index) for index in (0, 1, 1))):
        assert "two processes were started with process_id=1" in ended.err, ended.err
        assert ended.status == 1
        assert ended.seconds < 25


def test_a_second_process_0_is_told_that_the_address_is_taken(address: str) -> None:
    ended = run_all(*(start(address, 2, 0, timeout=4) for _ in range(2)))
    assert all(process.status == 1 for process in ended)
    assert sum("cannot listen" in process.err for process in ended) == 1
    assert sum("process_id 1" in process.err for process in ended) == 1


def test_who_comes_to_another_program_is_told_that_it_is_no_process_0(address: str) -> None:
    port = int(address.partition(":")[2])
    with (
        socket.create_server(("127.0.0.1", port)) as other,
        started(start(address, 2, 1)) as (process,),
    ):
        connection, _ = other.accept()
        with connection:
            assert b"process_id" in connection.recv(1000)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        _, err = process.communicate(timeout=LIMIT)
    assert "is no process 0 that waits for process 1" in err


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n", b"[1]\n", b'{"process_id": 1}\n'])
def test_whoever_else_connects_is_not_counted(address: str, noise: bytes) -> None:
    port = int(address.partition(":")[2])
    with started(start(address, 2, 0), start(address, 2, 1)) as processes:
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as it:
                it.sendall(noise)
                break
        for process in processes:
            _, err = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("localhost:1234", 2, None), ["process_id missing", "none of them"]),
        ((None, 2, 1), ["coordinator_address missing"]),
        (("localhost:1234", 2, 2), ["process_id", "[0, 1]", "num_processes=2", "got 2"]),
        (("localhost:1234", 2, -1), ["process_id", "-1"]),
        (("localhost:1234", 0, 0), ["num_processes", "0"]),
        (("localhost", 2, 0), ["HOST:PORT", "'localhost'"]),
        (("localhost:0", 2, 0), ["HOST:PORT", "'localhost:0'"]),
        (("localhost:65536", 2, 0), ["[1, 65535]", "65536"]),
        ((":1234", 2, 0), ["HOST:PORT", "':1234'"]),
    ],
)
def test_bad_arguments_are_named_with_what_is_legal(
    arguments: tuple[str | None, int | None, int | None], words: list[str]
) -> None:
    with pytest.raises(ValueError, match=words[0]) as caught:
        initialize(*arguments)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(("timeout", "devices"), [(0, None), (-1, None), (60, 0)])
def test_no_time_and_no_devices_are_refused(timeout: int, devices: int | None) -> None:
    with pytest.raises(ValueError, match=r"^(timeout|local_device_count)"):
        initialize("localhost:1234", 1, 0, timeout=timeout, local_device_count=devices)


@pytest.mark.parametrize("count", [1, 2])
def test_after_the_backend_has_started_it_is_too_late(address: str, count: int) -> None:
    first = ["-c", "import jax; jax.devices()\n" + START, address, str(count), "0", "30"]
    (ended,) = run_all(first)
    assert "before anything that uses a device" in ended.err
    assert ended.status == 1


def test_a_second_call_is_refused(address: str) -> None:
    again = "try: initialize(address, 1, 0)\nexcept RuntimeError as error: print(error)"
    (ended,) = run_all(start(address, 1, 0, then=again))
    assert ended.status == 0, ended.err
    assert "second time" in ended.out


DETECT = "from jaxopt_suite.parallel import processes; print(processes.initialize(timeout=3))"


def slurm(index: int, port: int) -> dict[str, str]:
    return clean_env(
        SLURM_JOB_ID="1",
        JAX_COORDINATOR_PORT=str(port),
        SLURM_STEP_NODELIST="localhost",
        SLURM_NTASKS="2",
        SLURM_PROCID=str(index),
        SLURM_LOCALID=str(index),
        JAX_NUM_CPU_DEVICES="1",
    )


def test_without_arguments_the_variables_of_slurm_say_which_process_this_is() -> None:
    port = free_port()
    with (
        started(["-c", DETECT], env=slurm(0, port)) as (first,),
        started(["-c", DETECT.replace("=3", "=30")], env=slurm(1, port)) as (second,),
    ):
        for index, process in enumerate((first, second)):
            out, err = process.communicate(timeout=LIMIT)
            assert f"process_index={index}, process_count=2" in out, err


def test_a_slurm_job_whose_others_never_come_ends_in_time_with_the_reason() -> None:
    (ended,) = run_all(["-c", DETECT], env=slurm(1, free_port()))
    assert ended.status == 1
    assert "did not all come within 3 s" in ended.err
    assert "Check failure" not in ended.err  # what JAX would say, with a stack trace


def test_without_arguments_and_without_variables_it_says_what_to_give() -> None:
    (ended,) = run_all(["-c", DETECT])
    assert "ValueError: no variables of SLURM" in ended.err
    assert "give coordinator_address, num_processes and process_id" in ended.err
