"""Checkpoints that several processes write and read together, on meshes that differ."""

import json
import pathlib
import random
import shutil
import time

import pytest
from several_processes import Ended, run_all, started

from jaxopt_suite.experiments.checkpoints import Checkpoints
from jaxopt_suite.parallel.roll_call import free_port

# Eight devices, however many processes share them. Every element tells the step; the values of
# "bits" are NaNs, -0.0 and a subnormal.
COMMON = """
import json, sys, warnings
import jax, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.checkpoints import Checkpoints, DamagedCheckpointWarning
from jaxopt_suite.parallel.processes import initialize

address, count, index, path, layout, *steps = sys.argv[1:]
count, index = int(count), int(index)
if count > 1:
    initialize(address, count, index, timeout=40, local_device_count=8 // count)
else:
    jax.config.update("jax_num_cpu_devices", 8)
assert jax.process_count() == count

SHAPES = {"flat": {"d": 8}, "whole": {"d": 8}, "grid": {"a": 2, "b": 4}}
SPECS = {"flat": (P("d"), P("d")), "whole": (P(), P()), "grid": (P("b", "a"), P("a"))}
HOST = {"flat": "pinned_host", "whole": "device", "grid": "pinned_host"}
sizes = SHAPES[layout]
mesh = Mesh(np.array(jax.devices()).reshape(tuple(sizes.values())), tuple(sizes),
            axis_types=(AxisType.Auto,) * len(sizes))
two, one = SPECS[layout]

def place(spec, kind="device"):
    return NamedSharding(mesh, spec, memory_kind=kind)

PLACES = {"w": place(two), "bits": place(one), "count": place(P()), "none": place(P()),
          "host": place(two, HOST[layout])}

def values(step):
    bits = np.resize(np.array([0x7FC1, 0xFFFF, 0x8000, 0x0001], np.uint16), 8)
    return {
        "w": np.arange(128, dtype=np.float32).reshape(16, 8) + 1000 * step,
        "bits": bits.view(jax.numpy.bfloat16), "count": np.array(step, np.int32),
        "none": np.zeros((0, 3), np.float32),
        "host": np.arange(64, dtype=np.float32).reshape(8, 8) - step,
    }

def make(step):
    return {name: jax.make_array_from_callback(v.shape, PLACES[name], lambda i, v=v: v[i])
            for name, v in values(step).items()}

def check(restored):
    want = values(restored.step)
    for name, array in restored.state.items():
        assert array.sharding == PLACES[name], (name, array.sharding)
        assert array.dtype == want[name].dtype
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == want[name][shard.index].tobytes(), name

LIKE = {name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=PLACES[name])
        for name, v in values(0).items()}
"""
SAVE = """
with Checkpoints(path) as c:
    for step in map(int, steps):
        c.save(step, make(step), {"position": step})
"""
RESTORE = """
with Checkpoints(path) as c, warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", DamagedCheckpointWarning)
    restored = c.restore(LIKE)
    told = [str(w.message) for w in caught if w.category is DamagedCheckpointWarning]
    if restored is not None:
        check(restored)
    print(json.dumps([restored and restored.step, c.steps(), told]))
"""


def commands(code: str, count: int, path: pathlib.Path, layout: str, *steps: int) -> list:
    address = f"localhost:{free_port()}"
    return [
        ["-c", COMMON + code, address, str(count), str(i), str(path), layout, *map(str, steps)]
        for i in range(count)
    ]


def run(code: str, count: int, path: pathlib.Path, layout: str, *steps: int) -> list[Ended]:
    ended = run_all(*commands(code, count, path, layout, *steps))
    for process in ended:
        assert process.status == 0, process.err
    return ended


def restored(count: int, path: pathlib.Path, layout: str) -> list:
    """What ``restore`` found, the same on all processes: step, steps and warnings."""
    seen = [json.loads(e.out.splitlines()[-1]) for e in run(RESTORE, count, path, layout)]
    assert all(each == seen[0] for each in seen), seen
    return seen[0]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("original")
    run(SAVE, 2, path, "flat", 1, 2)
    return path


@pytest.fixture
def saved(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a folder with steps 1 and 2, each written by two processes."""
    return shutil.copytree(original, tmp_path / "saved")


@pytest.mark.parametrize(("count", "layout"), [(1, "grid"), (1, "whole"), (2, "flat"), (2, "grid")])
def test_what_two_processes_wrote_comes_back_on_other_meshes_and_counts(
    saved: pathlib.Path, count: int, layout: str
) -> None:
    assert restored(count, saved, layout) == [2, [1, 2], []]


@pytest.mark.parametrize("layout", ["flat", "whole"])
def test_what_one_process_wrote_comes_back_on_two(tmp_path: pathlib.Path, layout: str) -> None:
    run(SAVE, 1, tmp_path, "grid", 7)
    assert restored(2, tmp_path, layout) == [7, [7], []]


def test_both_processes_wrote_and_nothing_but_the_steps_is_left(original: pathlib.Path) -> None:
    assert sorted(p.name for p in original.iterdir()) == ["1", "2"]
    for part in ("ocdbt.process_0", "ocdbt.process_1"):
        assert any((original / "2" / "state" / part / "d").iterdir())


def files_of(step: pathlib.Path, part: str) -> list[pathlib.Path]:
    return sorted(p for p in (step / "state" / part).rglob("*") if p.is_file())


@pytest.mark.parametrize("part", ["ocdbt.process_0", "ocdbt.process_1", "d"])
def test_a_flipped_byte_in_any_part_sends_both_back_to_the_step_before(
    saved: pathlib.Path, part: str
) -> None:
    file = random.Random(0).choice(files_of(saved / "2", part))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    step, _, told = restored(2, saved, "flat")
    assert step == 1
    assert len(told) == 1
    assert file.name in told[0]


def test_nothing_intact_restores_to_none_on_both(saved: pathlib.Path) -> None:
    for step in ("1", "2"):
        (saved / step / "manifest.json").unlink()
    step, steps, told = restored(2, saved, "flat")
    assert (step, steps, len(told)) == (None, [], 2)


def test_donated_right_after_save_the_arrays_are_saved_as_they_were(tmp_path: pathlib.Path) -> None:
    code = """
spoil = {n: jax.jit(lambda x: x * 0, donate_argnums=0, out_shardings=p) for n, p in PLACES.items()}
with Checkpoints(path) as c:
    for step in (1, 2, 3):
        state = make(step)
        c.save(step, state, {})
        jax.block_until_ready({name: spoil[name](x) for name, x in state.items()})
        check(c.restore(LIKE))
"""
    run(code, 2, tmp_path, "whole")  # without host memory, which a jitted function cannot scale


def test_errors_of_one_process_are_raised_on_both(saved: pathlib.Path) -> None:
    code = """
def message(call):
    try:
        call()
    except (UserError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
with Checkpoints(path) as c:
    print(json.dumps([
        message(lambda: c.save(2, make(2), {})),
        message(lambda: c.save(3, {"w": jax.numpy.ones(3)}, {})),
        message(lambda: c.restore(LIKE | {"w": jax.ShapeDtypeStruct((1,), np.float32)})),
    ]))
"""
    seen = [json.loads(process.out.splitlines()[-1]) for process in run(code, 2, saved, "flat")]
    assert seen[0] == seen[1]
    exists, local, other = seen[0]
    assert exists.startswith("ValueError: step 2 is saved already")
    assert local.startswith("TypeError: with several processes")
    assert other.startswith("UserError: the checkpoint")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_cannot_write_fails_the_save_of_both_and_the_next_one_works(
    saved: pathlib.Path, failing: int
) -> None:
    code = f"""
import hashlib
digest = hashlib.file_digest
def fail(*arguments):
    raise OSError(28, "No space left on device")
with Checkpoints(path) as c:
    if index == {failing}:
        hashlib.file_digest = fail
    c.save(3, make(3), {{}})
    try:
        c.wait()
    except UserError as error:
        print(error)
    hashlib.file_digest = digest
    assert c.restore(LIKE).step == 2
    c.save(3, make(3), {{}})
    assert c.restore(LIKE).step == 3
"""
    for process in run(code, 2, saved, "flat"):
        assert f"step 3 in {saved}: process {failing}: " in process.out
        assert "No space left on device" in process.out
    assert sorted(p.name for p in saved.iterdir()) == ["1", "2", "3"]


def test_a_seal_that_cannot_be_written_fails_the_save_of_both(saved: pathlib.Path) -> None:
    code = """
from jaxopt_suite.experiments import manifest
def fail(*arguments):
    raise OSError(28, "No space left on device")
manifest.seal = fail
with Checkpoints(path) as c:
    c.save(3, make(3), {})
    try:
        c.wait()
    except UserError as error:
        print(error)
    assert c.restore(LIKE).step == 2
"""
    for process in run(code, 2, saved, "flat"):
        assert "process 0: [Errno 28] No space left on device" in process.out
        assert "process 1: " not in process.out
    assert sorted(p.name for p in saved.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_fails_under_one_process_fails_the_save_of_both(
    saved: pathlib.Path, failing: int
) -> None:
    code = f"""
import resource
big = {{"big": jax.make_array_from_callback((8, 40_000), place(P("d")),
                                          lambda i: np.ones((8, 40_000), np.float32)[i])}}
with Checkpoints(path) as c:
    if index == {failing}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    c.save(3, big, {{}})
    try:
        c.wait()
    except UserError as error:
        print(error)
    assert c.restore(LIKE).step == 2
"""
    for process in run(code, 2, saved, "flat"):
        assert f"process {failing}: " in process.out
        assert "File too large" in process.out
        assert process.seconds < 30
    assert sorted(p.name for p in saved.iterdir()) == ["1", "2"]


def test_folders_that_are_not_shared_are_refused_by_name(tmp_path: pathlib.Path) -> None:
    code = """
try:
    Checkpoints(path + str(index)).save(1, make(1), {})
except UserError as error:
    print(error)
"""
    for process in run(code, 2, tmp_path / "run", "flat"):
        assert "process 1 does not see" in process.out
        assert "all processes share" in process.out


SAVE_FOREVER = """
with Checkpoints(path, keep=2) as c:
    restored = c.restore(LIKE)
    step = restored.step if restored else 0
    while True:
        step += 1
        c.save(step, make(step), {"position": step})
        print(step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_while_saving_no_checkpoint_is_accepted_that_is_not_whole(
    tmp_path: pathlib.Path, killed: int
) -> None:
    rng = random.Random(killed)
    for _ in range(2):
        with started(*commands(SAVE_FOREVER, 2, tmp_path, "flat")) as processes:
            out = processes[killed].stdout
            assert out is not None
            begun: list[int] = []
            while len(begun) < 3:
                line = out.readline()
                assert line, processes[killed].stderr.read()
                begun += [int(line)] if line.strip().isdigit() else []  # others are gloo's
            time.sleep(rng.random() * 0.3)
            processes[killed].kill()
            processes[killed].wait()
            time.sleep(0.5)  # what the other does alone in this time must not finish a step
        step, _, _ = restored(2, tmp_path, "flat")
        assert step >= begun[-1] - 1  # a save begins when the one before it is complete
    with Checkpoints(tmp_path) as checkpoints:
        assert step in checkpoints.steps()
