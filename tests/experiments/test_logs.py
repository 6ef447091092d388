"""The run folder: what it refuses, what a crash leaves, and what every reader may rely on."""

import json
import math
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.core.files import write_atomically
from jaxopt_suite.experiments.logs import RunFolder

CONFIG = {"optimizer": "adamw", "seed": 0, "set": ["b2=0.95"], "learning_rate": None}


@pytest.fixture
def run(tmp_path: pathlib.Path) -> RunFolder:
    folder = RunFolder(tmp_path / "a" / "run")
    assert folder.create_or_open(CONFIG) == "new"
    return folder


@pytest.fixture
def tiny_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    mount = tmp_path / "tiny"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_the_same_config_opens_the_folder_again(run: RunFolder) -> None:
    run.append({"step": 1, "loss": 2.0})
    assert RunFolder(run.path).create_or_open({**CONFIG, "set": ("b2=0.95",)}) == "existing"
    assert run.read() == [{"step": 1, "loss": 2.0}]


def test_another_config_is_refused_with_every_differing_key_and_both_values(run: RunFolder) -> None:
    other = {**CONFIG, "optimizer": "grams", "preset": "tiny"}
    del other["seed"]
    with pytest.raises(UserError) as caught:
        run.create_or_open(other)
    message = str(caught.value)
    assert 'optimizer is "adamw" there and "grams" here' in message
    assert 'preset is absent there and "tiny" here' in message
    assert "seed is 0 there and absent here" in message
    assert "learning_rate" not in message


@pytest.mark.parametrize("there", ["0", "false", '"0"', "null"])
def test_values_of_another_type_differ_even_where_python_calls_them_equal(
    run: RunFolder, there: str
) -> None:
    run.config_path.write_text(f'{{"x": {there}}}')
    with pytest.raises(UserError, match="x is"):
        run.create_or_open({"x": 0.0})


@pytest.mark.parametrize("text", ["", '{"seed": 0', "[]", "7"])
def test_a_broken_config_file_is_refused_by_name(run: RunFolder, text: str) -> None:
    run.config_path.write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        run.create_or_open(CONFIG)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_a_folder_with_results_but_no_config_is_refused(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=name):
        RunFolder(tmp_path).create_or_open(CONFIG)


def test_a_path_that_is_a_file_or_below_one_is_refused(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "run"):
        with pytest.raises(UserError, match="file"):
            RunFolder(path).create_or_open(CONFIG)


def test_an_unwritable_folder_is_refused(
    run: RunFolder, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions do not stop root, so the operating system's answer is put in its mouth.
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "run")

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        run.create_or_open(CONFIG)
    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        RunFolder(tmp_path / "new").create_or_open(CONFIG)


def test_a_failed_atomic_write_leaves_the_old_file_and_no_other(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # Lone surrogates included: JSON escapes them.
    | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
RECORDS = st.builds(
    lambda extra, step: {**extra, "step": step},
    st.dictionaries(st.text().filter(lambda key: key != "nonfinite"), JSON_VALUES, max_size=4),
    st.integers(0, 2**63),
)


@hypothesis.settings(deadline=None, max_examples=50, derandomize=True)
@hypothesis.given(st.lists(RECORDS, max_size=5))
def test_what_is_appended_is_read_back(records: list[dict[str, object]]) -> None:
    with tempfile.TemporaryDirectory() as path:
        run = RunFolder(path)
        for record in records:
            run.append(record)
        assert run.read() == records
        if records:
            assert run.metrics_path.read_bytes().count(b"\n") == len(records)


def test_scalar_arrays_are_stored_as_the_numbers_they_are(run: RunFolder) -> None:
    run.append({"step": np.int64(3), "a": jnp.float32(0.1), "b": jnp.bfloat16(1.5), "c": np.True_})
    assert run.read() == [{"step": 3, "a": float(np.float32(0.1)), "b": 1.5, "c": True}]


def test_values_that_are_not_finite_become_null_and_are_named(run: RunFolder) -> None:
    run.append({"step": 7, "loss": math.nan, "norm": jnp.float32(-jnp.inf), "lr": 0.1, "x": None})
    (line,) = run.metrics_path.read_text().splitlines()
    expected = {"step": 7, "loss": None, "norm": None, "lr": 0.1, "x": None}
    assert json.loads(line) == {**expected, "nonfinite": {"loss": "nan", "norm": "-inf"}}
    assert run.read() == [json.loads(line)]


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"loss": 1.0}, ValueError),
        ({"step": 1.0}, ValueError),
        ({"step": True}, ValueError),
        ({"step": 1, "nonfinite": {}}, ValueError),
        ({"step": 1, "nested": [math.nan]}, ValueError),
        ({"step": 1, 2: 3}, TypeError),
        ({"step": 1, "x": {1, 2}}, TypeError),
        ({"step": 1, "x": np.ones(2)}, TypeError),
    ],
)
def test_a_bad_record_is_refused_and_nothing_is_written(
    run: RunFolder, record: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        run.append(record)
    assert run.metrics_path.read_bytes() == b""


def test_every_append_is_whole_for_another_reader_at_once(run: RunFolder) -> None:
    for step in range(3):
        run.append({"step": step, "text": "x" * 100_000})
        assert [r["step"] for r in RunFolder(run.path).read()] == list(range(step + 1))


@pytest.mark.parametrize("bad", ["", "{", "[]", "\xff", '{"step": 1, "loss": NaN}', '{"loss": 1}'])
def test_a_corrupt_line_in_the_middle_is_an_error_with_file_and_number(
    run: RunFolder, bad: str
) -> None:
    run.metrics_path.write_bytes(b'{"step": 1}\n' + bad.encode("latin1") + b'\n{"step": 3}\n')
    for action in (run.read, lambda: run.truncate_to(1)):
        with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl"):
            action()


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2, "lo\n', "{"])
def test_a_torn_last_line_is_dropped_with_a_warning(run: RunFolder, torn: str) -> None:
    run.metrics_path.write_text('{"step": 1}\n' + torn)
    with pytest.warns(UserWarning, match=r"line 2 of .*metrics\.jsonl"):
        assert run.read() == [{"step": 1}]


def test_appending_after_a_torn_line_does_not_spoil_the_file(run: RunFolder) -> None:
    run.metrics_path.write_text('{"step": 1}\n{"step": 2, "lo')
    with pytest.warns(UserWarning, match="line 2"):
        run.append({"step": 2, "loss": 1.0})
    assert run.read() == [{"step": 1}, {"step": 2, "loss": 1.0}]


def test_a_whole_last_line_without_its_newline_is_kept(run: RunFolder) -> None:
    run.metrics_path.write_text('{"step": 1}\n{"step": 2}')
    run.append({"step": 3})
    assert [r["step"] for r in run.read()] == [1, 2, 3]


def test_truncation_keeps_records_up_to_the_step(run: RunFolder) -> None:
    for step in (0, 10, 20, 30):
        run.append({"step": step, "loss": math.inf})
    run.truncate_to(20)
    assert [r["step"] for r in run.read()] == [0, 10, 20]
    assert run.read()[0]["nonfinite"] == {"loss": "inf"}
    run.truncate_to(-1)
    assert run.read() == []


def test_a_folder_without_metrics_reads_as_empty(tmp_path: pathlib.Path) -> None:
    assert RunFolder(tmp_path).read() == []


def test_metrics_that_cannot_be_read_are_a_user_error(run: RunFolder) -> None:
    run.metrics_path.unlink()
    run.metrics_path.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        run.read()


def test_a_full_disk_is_a_user_error_and_loses_no_record(tiny_disk: pathlib.Path) -> None:
    run = RunFolder(tiny_disk / "run")
    run.create_or_open(CONFIG)
    run.append({"step": 1})
    (tiny_disk / "filler").write_bytes(b"")
    with pytest.raises(UserError, match="No space left"):
        run.append({"step": 2, "text": "x" * 100_000})
    with pytest.warns(UserWarning, match="cut short"):
        assert run.read() == [{"step": 1}]
    with pytest.raises(UserError, match="No space left"):
        RunFolder(tiny_disk / "other").create_or_open({"text": "x" * 100_000})
