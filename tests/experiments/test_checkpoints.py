"""Checkpoints: what comes back is what was saved, whatever happened to the files in between."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.checkpoints import Checkpoints, DamagedCheckpointWarning, Restored

ROOT = pathlib.Path(__file__).parents[2]


def make_state(step: int) -> dict[str, Any]:
    """A state of which every element tells the step."""
    return {"w": jnp.full((8, 16), step, jnp.float32), "count": jnp.asarray(step, jnp.int32)}


ABSTRACT = jax.eval_shape(lambda: make_state(0))


def assert_step(restored: Restored | None, step: int) -> None:
    assert restored is not None
    assert restored.step == step
    assert restored.host == {"position": step}
    jax.tree.map(np.testing.assert_array_equal, restored.state, make_state(step))


def restore_quietly(path: pathlib.Path) -> Restored | None:
    with Checkpoints(path) as checkpoints, warnings.catch_warnings():
        warnings.simplefilter("error")
        return checkpoints.restore(ABSTRACT)


def save_steps(path: pathlib.Path, *steps: int, keep: int = 3) -> None:
    with Checkpoints(path, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"position": step})


def subprocess_env(**extra: str) -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **extra}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("original")
    save_steps(path, 100, 200)
    return path


@pytest.fixture
def saved(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a folder with the intact steps 100 and 200."""
    return shutil.copytree(original, tmp_path / "saved")


@pytest.fixture
def tiny_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    mount = tmp_path / "tiny"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def files_below(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def assert_200_is_skipped_for_100(path: pathlib.Path, reason: str = "") -> None:
    with (
        Checkpoints(path) as checkpoints,
        pytest.warns(DamagedCheckpointWarning, match=rf"/200.*{reason}") as caught,
    ):
        restored = checkpoints.restore(ABSTRACT)
    assert len(caught) == 1
    assert_step(restored, 100)


# What comes back


def test_the_newest_step_comes_back_with_its_host_data(saved: pathlib.Path) -> None:
    assert_step(restore_quietly(saved), 200)


def test_nothing_saved_restores_to_none(tmp_path: pathlib.Path) -> None:
    assert restore_quietly(tmp_path / "absent") is None
    assert not (tmp_path / "absent").exists()


def test_every_kind_of_leaf_and_container_comes_back_bit_for_bit(tmp_path: pathlib.Path) -> None:
    bits = jnp.asarray([0x7FC1, 0xFFFF, 0x8000, 0x0001], jnp.uint16)  # NaNs, -0.0, subnormal
    params = {"a/b": {"w": jnp.ones((2, 3))}, "frozen": jnp.ones(2), "": jnp.zeros((0, 3))}
    tx = optax.masked(
        optax.adamw(1e-3), lambda p: {**jax.tree.map(lambda _: True, p), "frozen": False}
    )
    state = (
        jax.lax.bitcast_convert_type(bits, jnp.bfloat16),
        [None, (), {}, jnp.asarray(True), jnp.zeros((0,), jnp.int8), jnp.float16(-0.0)],
        tx.init(params),
        params,
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        restored = checkpoints.restore(jax.eval_shape(lambda: state))
    assert restored is not None
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored.state), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
        assert not new.committed  # as a fresh array, so that nothing compiles anew


def test_arrays_may_be_donated_and_overwritten_as_soon_as_save_returns(
    tmp_path: pathlib.Path,
) -> None:
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 4):
            state = make_state(step)
            checkpoints.save(step, state, {"position": step})
            # On CPU orbax writes from a view, and JAX leaves memory alone that a view still shows.
            jax.block_until_ready(overwrite(state))
            assert_step(checkpoints.restore(ABSTRACT), step)


def test_restored_arrays_can_be_donated(saved: pathlib.Path) -> None:
    restored = restore_quietly(saved)
    assert restored is not None
    jax.jit(lambda x: x + 1, donate_argnums=0)(restored.state["w"])
    assert restored.state["w"].is_deleted()


def test_eight_way_sharded_arrays_restore_onto_another_mesh(tmp_path: pathlib.Path) -> None:
    code = """
import sys, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxopt_suite.experiments.checkpoints import Checkpoints
flat = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
grid = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
values = np.arange(128, dtype=np.float32).reshape(16, 8)
with Checkpoints(sys.argv[1]) as c:
    c.save(1, {"w": jax.device_put(values, NamedSharding(flat, P("x")))}, {})
    for sharding in (NamedSharding(grid, P("b", "a")), NamedSharding(grid, P()), None):
        like = jax.ShapeDtypeStruct((16, 8), np.float32, sharding=sharding)
        w = c.restore({"w": like}).state["w"]
        assert sharding is None or w.sharding == sharding, w.sharding
        assert len(w.sharding.device_set) == (1 if sharding is None else 8)
        np.testing.assert_array_equal(np.asarray(w), values)
"""
    env = subprocess_env(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_eight_devices_saved_comes_back_on_four_split_where_it_was_whole(
    tmp_path: pathlib.Path,
) -> None:
    eight = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    four = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    values = np.arange(128, dtype=np.float32).reshape(16, 8)
    wanted = NamedSharding(four, PartitionSpec("fsdp"))
    with Checkpoints(tmp_path) as checkpoints:
        saved = {"w": jax.device_put(values, NamedSharding(eight, PartitionSpec()))}
        checkpoints.save(1, saved, {})
        like = {"w": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=wanted)}
        restored = checkpoints.restore(like)
    assert restored is not None
    assert restored.state["w"].sharding == wanted
    assert [s.data.shape for s in restored.state["w"].addressable_shards] == [(4, 8)] * 4
    np.testing.assert_array_equal(np.asarray(restored.state["w"]), values)


def test_state_in_host_memory_is_saved_and_comes_back_where_it_is_wanted(
    tmp_path: pathlib.Path,
) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    values = np.arange(128, dtype=np.float32).reshape(16, 8)
    kinds = ("pinned_host", "device")
    places = [NamedSharding(mesh, PartitionSpec("data"), memory_kind=kind) for kind in kinds]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"m": jax.device_put(values, places[0])}, {})
        for place in places:
            like = {"m": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=place)}
            restored = checkpoints.restore(like)
            assert restored is not None
            assert restored.state["m"].sharding == place  # memory kind included
            np.testing.assert_array_equal(np.asarray(restored.state["m"]), values)


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"w": jax.ShapeDtypeStruct((8, 17), jnp.float32)}, ["'w'", "[8, 16]", "[8, 17]"]),
        ({"w": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)}, ["'w'", "float32", "bfloat16"]),
        ({"more": jax.ShapeDtypeStruct((3,), jnp.float32)}, ["'more'", "absent", "float32[3]"]),
        ({"count": None}, ["'count'", "int32[]", "absent"]),
    ],
)
def test_a_state_of_another_model_is_an_error_naming_the_leaf_and_no_damage(
    saved: pathlib.Path, change: dict[str, Any], words: list[str]
) -> None:
    with Checkpoints(saved) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.restore({**ABSTRACT, **change})
    assert all(word in str(caught.value) for word in words), caught.value


def test_saving_a_step_again_is_an_error_naming_it(saved: pathlib.Path) -> None:
    with Checkpoints(saved) as checkpoints, pytest.raises(ValueError, match=r"step 200 .*/200"):
        checkpoints.save(200, make_state(7), {})
    assert_step(restore_quietly(saved), 200)


@pytest.mark.parametrize(
    ("step", "state", "host", "error"),
    [
        (-1, make_state(0), {}, ValueError),
        (1.0, make_state(0), {}, TypeError),
        (1, {"n": 3}, {}, TypeError),
        (1, {"key": jax.random.key(0)}, {}, TypeError),
        (1, {"w": jnp.zeros((0,))}, {}, ValueError),
        (1, make_state(0), {"tuple": (1, 2)}, TypeError),
        (1, make_state(0), {1: 2}, TypeError),
        (1, make_state(0), {"x": object()}, TypeError),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: pathlib.Path, step: Any, state: Any, host: Any, error: type[Exception]
) -> None:
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(error):
        checkpoints.save(step, state, host)
    assert list(tmp_path.iterdir()) == []


# Damage


def test_a_flipped_bit_anywhere_in_any_file_is_noticed(saved: pathlib.Path) -> None:
    rng = random.Random(0)
    files = files_below(saved / "200")
    assert {"manifest.json", "contents.json", "_METADATA"} <= {f.name for f in files}
    with Checkpoints(saved) as checkpoints:
        for file in files:
            data = file.read_bytes()
            places = {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(4))}
            for place in sorted(places):
                flipped = bytearray(data)
                flipped[place] ^= 1 << rng.randrange(8)
                file.write_bytes(flipped)
                with pytest.warns(DamagedCheckpointWarning, match=r"/200: .*") as caught:
                    restored = checkpoints.restore(ABSTRACT)
                assert file.name in str(caught[0].message), (file, place)
                assert_step(restored, 100)
            file.write_bytes(data)
        assert_step(checkpoints.restore(ABSTRACT), 200)


def truncate(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: pathlib.Path) -> None:
    file.write_bytes(b"")


def extend(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes() + b"\n")


@pytest.mark.parametrize("damage", [truncate, empty, extend, pathlib.Path.unlink])
def test_a_truncated_empty_extended_or_missing_file_is_noticed(
    saved: pathlib.Path, damage: Callable[[pathlib.Path], None]
) -> None:
    with Checkpoints(saved) as checkpoints:
        for file in files_below(saved / "200"):
            data = file.read_bytes()
            damage(file)
            with pytest.warns(DamagedCheckpointWarning, match="/200") as caught:
                restored = checkpoints.restore(ABSTRACT)
            assert file.name in str(caught[0].message)
            assert_step(restored, 100)
            file.write_bytes(data)


def test_an_extra_file_is_noticed(saved: pathlib.Path) -> None:
    (saved / "200" / "state" / "extra").write_text("")
    assert_200_is_skipped_for_100(saved, "state/extra is not in the manifest")


def test_an_empty_directory_or_a_file_named_like_a_step_is_skipped(saved: pathlib.Path) -> None:
    shutil.rmtree(saved / "200")
    (saved / "200").mkdir()
    assert_200_is_skipped_for_100(saved, "manifest.json is missing")
    (saved / "200").rmdir()
    (saved / "200").write_text("")
    assert_200_is_skipped_for_100(saved)


def test_a_step_without_its_manifest_is_not_listed(saved: pathlib.Path) -> None:
    (saved / "200" / "manifest.json").unlink()
    assert Checkpoints(saved).steps() == [100]


def test_an_intact_checkpoint_under_another_number_is_noticed(saved: pathlib.Path) -> None:
    (saved / "200").rename(saved / "300")
    with (
        Checkpoints(saved) as checkpoints,
        pytest.warns(DamagedCheckpointWarning, match="/300: manifest.json .* another step"),
    ):
        assert_step(checkpoints.restore(ABSTRACT), 100)


@pytest.mark.parametrize("name", ["200.partial", "200.orbax-checkpoint-tmp"])
def test_what_an_interrupted_save_left_is_skipped_and_replaced_by_the_next_save_of_the_step(
    saved: pathlib.Path, name: str
) -> None:
    (saved / "200").rename(saved / name)
    assert_200_is_skipped_for_100(saved, "interrupted")
    save_steps(saved, 200)
    assert sorted(p.name for p in saved.iterdir()) == ["100", "200"]
    assert_step(restore_quietly(saved), 200)


def test_all_damaged_restores_to_none_with_a_warning_each(saved: pathlib.Path) -> None:
    for step in (100, 200):
        truncate(saved / str(step) / "contents.json")
    with Checkpoints(saved) as checkpoints, pytest.warns(DamagedCheckpointWarning) as caught:
        assert checkpoints.restore(ABSTRACT) is None
    assert len(caught) == 2


def test_a_damaged_step_is_replaced_only_once_its_successor_is_complete(
    saved: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truncate(saved / "200" / "contents.json")
    with Checkpoints(saved) as checkpoints:
        fail_to_hash(monkeypatch)
        checkpoints.save(200, make_state(200), {"position": 200})
        with pytest.raises(UserError, match="step 200"):
            checkpoints.wait()
        assert (saved / "200" / "contents.json").exists()
        monkeypatch.undo()
        checkpoints.save(200, make_state(200), {"position": 200})
    assert_step(restore_quietly(saved), 200)


# Retention


def test_the_newest_steps_are_kept(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path, 0, 5, 10, 15, keep=2)
    assert Checkpoints(tmp_path).steps() == [10, 15]
    assert_step(restore_quietly(tmp_path), 15)


def test_damaged_steps_do_not_count_as_kept_ones(tmp_path: pathlib.Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    truncate(tmp_path / "3" / "contents.json")
    save_steps(tmp_path, 4, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "4"]
    save_steps(tmp_path, 5, keep=2)  # now the damaged one is older than all that are kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ["4", "5"]


def test_a_step_that_fails_deletes_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {"position": 1})
        checkpoints.wait()
        fail_to_hash(monkeypatch)
        checkpoints.save(2, make_state(2), {"position": 2})
        with pytest.raises(UserError, match="No space left"):
            checkpoints.wait()
        checkpoints.wait()  # reported once
        monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    assert_step(restore_quietly(tmp_path), 1)


def fail_to_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hashlib.file_digest", fail)


@pytest.mark.parametrize("call", ["save", "wait", "close", "restore", "steps"])
def test_a_failure_in_the_background_shows_at_the_next_call(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    fail_to_hash(monkeypatch)
    checkpoints.save(1, make_state(1), {})
    arguments = {"save": (2, make_state(2), {}), "restore": (ABSTRACT,)}.get(call, ())
    with pytest.raises(UserError, match=r"step 1 .*No space left on device"):
        getattr(checkpoints, call)(*arguments)
    checkpoints.close()
    checkpoints.close()


# Disks and crashes


def test_a_full_disk_is_a_user_error_and_the_saved_step_stays(tiny_disk: pathlib.Path) -> None:
    with Checkpoints(tiny_disk / "run") as checkpoints:
        checkpoints.save(1, make_state(1), {"position": 1})
        big = {"w": jax.random.normal(jax.random.key(0), (512, 1024))}
        with pytest.raises(UserError, match="No space left on device"):
            checkpoints.save(2, big, {})
        assert_step(checkpoints.restore(ABSTRACT), 1)
        checkpoints.save(2, make_state(2), {"position": 2})
    assert_step(restore_quietly(tiny_disk / "run"), 2)


def test_a_disk_that_fails_halfway_is_a_user_error_without_tracebacks(
    tmp_path: pathlib.Path,
) -> None:
    code = """
import resource, sys, jax
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.checkpoints import Checkpoints
state = {str(i): jax.random.normal(jax.random.key(i), (100, 500)) for i in range(8)}
like = jax.eval_shape(lambda: state)
with Checkpoints(sys.argv[1]) as c:
    c.save(1, state, {})
    c.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    c.save(2, state, {})
    try:
        c.wait()
    except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert c.restore(like).step == 1
    c.save(2, state, {})
    assert c.restore(like).step == 2
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=subprocess_env(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "step 2" in done.stdout
    assert "File too large" in done.stdout


@pytest.mark.parametrize("blocked", ["file", "file/below"])
def test_a_path_that_is_a_file_is_a_user_error(tmp_path: pathlib.Path, blocked: str) -> None:
    (tmp_path / "file").write_text("")
    with Checkpoints(tmp_path / blocked) as checkpoints:
        with pytest.raises(UserError, match="file"):
            checkpoints.save(1, make_state(1), {})
        with pytest.raises(UserError, match="file"):
            checkpoints.restore(ABSTRACT)


SAVE_FOREVER = """
import sys, warnings, jax, jax.numpy as jnp
from jaxopt_suite.experiments.checkpoints import Checkpoints
warnings.simplefilter("ignore")
make_state = lambda step: {
    "w": jnp.full((8, 16), step, jnp.float32), "count": jnp.asarray(step, jnp.int32)
}
with Checkpoints(sys.argv[1], keep=2) as c:
    restored = c.restore(jax.eval_shape(lambda: make_state(0)))
    step = restored.step if restored else 0
    while True:
        step += 1
        c.save(step, make_state(step), {"position": step})
        print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_there_is_an_intact_step_to_go_on_from(tmp_path: pathlib.Path) -> None:
    rng = random.Random(0)
    interrupted = 0
    for _ in range(6):
        command = [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)]
        process = subprocess.Popen(command, env=subprocess_env(), stdout=subprocess.PIPE)
        assert process.stdout is not None
        begun = [int(process.stdout.readline()) for _ in range(3)][-1]
        time.sleep(rng.random() * 0.2)  # about two saves
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        interrupted += any(p.suffix == ".partial" for p in tmp_path.iterdir())
        with Checkpoints(tmp_path) as checkpoints, warnings.catch_warnings():
            warnings.simplefilter("ignore", DamagedCheckpointWarning)
            restored = checkpoints.restore(ABSTRACT)
        assert restored is not None
        assert_step(restored, restored.step)
        assert restored.step >= begun - 1  # a save begins when the one before it is complete
    assert interrupted  # else this has not tested what it is for


def test_a_normal_end_after_close_leaves_nothing_on_stderr(tmp_path: pathlib.Path) -> None:
    code = """
import sys, jax.numpy as jnp
from jaxopt_suite.experiments.checkpoints import Checkpoints
with Checkpoints(sys.argv[1]) as c:
    c.save(1, {"w": jnp.ones(3)}, {})
"""
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=subprocess_env(), capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert Checkpoints(tmp_path).steps() == [1]


def test_the_package_itself_does_not_import_orbax() -> None:
    code = "import sys, jaxopt_suite; assert not any('orbax' in name for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=subprocess_env(), check=True)
