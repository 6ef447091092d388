"""Files of results: rows are complete, appending keeps what is there, damage is refused."""

import json
import subprocess

import pytest

from benchmarks import _results
from jaxopt_suite.core.errors import UserError

STAMP = {"command", "date", "our_commit", "hardware", "load", "versions"}
OWN = {
    "parity.json": {"method", "repository", "commit", "steps", "shapes", "dtype", "cases"}
    | {"largest_relative_difference", "limit", "departures"},
    "step_time.json": {"preset", "parameters", "optimizers"},
    "step_time_kernels.json": {"preset", "parameters", "optimizers"},
    "kernels_leaves.json": {"chip", "leaves", "entries", "tree", "packed"},
    "train_memory.json": {"preset", "steps", "optimizers"},
    "plan.json": {"plan", "preset", "optimizer", "topology", "mesh", "seconds", "memory_bytes"}
    | {"memory_total", "compiler_bytes", "flops"},
    "compile_time.json": {"preset", "steps"},
    "communication_task.json": {"name", "optimizer", "words", "learning_rate", "sweep", "losses"}
    | {"mean", "wire_bytes", "times_fewer", "over_dense", "mesh", "steps"},
    "compressed_bytes.json": {"topology", "mesh", "entries"},
    "recipe_collectives.json": {"topology", "mesh", "entries"},
    "outer_loop_bytes.json": {"topology", "mesh", "parameters", "sync_every", "entries"},
    "outer_loop_task.json": {"name", "optimizer", "words", "learning_rate", "sweep", "losses"}
    | {"mean", "wire_bytes", "times_fewer", "over_dense", "away", "steps"},
    "compression_overhead.json": {"preset", "batch_size", "seq_len", "limit", "entries"},
    "scaling_speed.json": {"name", "starts", "resamples", "seconds", "seconds_every_start_refined"}
    | {"compile_seconds", "scipy_differences", "scipy_gradient", "times_faster", "objective"}
    | {"times_faster_than_gradient", "status"},
    "shampoo_times.json": {"part", "preset"},
    "roots.json": {"order", "damping", "accuracy", "times"},
    "claims.json": {"name", "claim", "source", "how", "figure", "verdict", "quick", "numbers"},
}


@pytest.mark.parametrize("name", OWN)
def test_every_row_of_a_results_file_has_its_fields_and_no_machine_path(name):
    for row in _results.load(_results.RESULTS / name):
        assert row.keys() >= OWN[name] | STAMP
        assert row["command"].startswith("python -m benchmarks.")
        assert "/" not in row["command"]


def test_the_newest_parity_row_of_each_method_is_within_its_limit():
    rows = _results.latest(_results.load(_results.RESULTS / "parity.json"), "method")
    assert {"grams", "subset_norm", "subspace_momentum", "adam_snsm", "soap"} <= rows.keys()
    for name, row in rows.items():
        if name != "shampoo":
            assert row["largest_relative_difference"] < row["limit"] <= 1e-5, name
        assert row["steps"] == (30 if name in ("shampoo", "soap", "adamw_8bit") else 25)


def test_shampoo_agrees_to_1e_minus_5_before_its_first_root_and_to_1e_minus_4_after():
    rows = _results.latest(_results.load(_results.RESULTS / "parity.json"), "method")
    limits = {}
    for case in rows["shampoo"]["cases"]:
        assert max(case["updates"], case["parameters"]) < case["limit"]
        limits[case["case"]] = case["limit"]
    settings = [case["settings"] for case in rows["shampoo"]["cases"]]
    for graft in ("adam", "none"):
        assert limits[f"graft {graft}, before the first root"] == 1e-5
        every = {found["refresh_every"] for found in settings if found["graft"] == graft}
        assert {1, 5} <= every
    assert max(limits.values()) == 1e-4


def test_appending_keeps_earlier_rows_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "new" / "rows.json"
    _results.append(path, {"n": 1})
    _results.append(path, {"n": 2})
    assert _results.load(path) == [{"n": 1}, {"n": 2}]
    assert [file.name for file in path.parent.iterdir()] == ["rows.json"]


def test_a_number_json_does_not_have_is_refused_and_nothing_is_lost(tmp_path):
    path = tmp_path / "rows.json"
    _results.append(path, {"n": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        _results.append(path, {"n": float("nan")})
    assert _results.load(path) == [{"n": 1}]


@pytest.mark.parametrize("text", ["[{", "{}", "[1]"])
def test_a_damaged_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"rows\.json"):
        _results.load(path)


def test_the_latest_row_of_each_kind_wins():
    rows = [{"k": "a", "n": 1}, {"k": "b", "n": 2}, {"k": "a", "n": 3}]
    assert _results.latest(rows, "k") == {"a": rows[2], "b": rows[1]}


def test_a_commit_is_marked_dirty_by_changed_code_but_not_by_new_results(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True)

    assert _results.git_commit(tmp_path) is None
    results = tmp_path / "benchmarks" / "results" / "x.json"
    results.parent.mkdir(parents=True)
    results.write_text("[]")
    code = tmp_path / "code.py"
    code.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    commit = _results.git_commit(tmp_path)
    assert len(commit) == 40
    results.write_text(json.dumps([{}]))
    assert _results.git_commit(tmp_path) == commit
    code.write_text("2")
    assert _results.git_commit(tmp_path) == f"{commit}-dirty"


def test_the_stamp_is_json():
    stamp = _results.stamp("python -m benchmarks.x")
    assert stamp.keys() == STAMP
    assert json.loads(json.dumps(stamp)) == stamp
