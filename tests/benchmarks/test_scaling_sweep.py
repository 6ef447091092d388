"""The sweep of small models: its grid, two tiny runs, and what is read back from its rows."""

import json

import pytest

from benchmarks.scaling_laws import sweep
from jaxopt_suite import scaling_laws
from jaxopt_suite.experiments import model


@pytest.fixture
def tiny(monkeypatch):
    """Two runs of three steps or so on windows of eight bytes."""
    for name, value in (("BATCH", 2), ("SEQ_LEN", 8), ("LEAST_STEPS", 1), ("EVAL_BATCHES", 1)):
        monkeypatch.setattr(sweep, name, value)
    return sweep.points(shapes=((16, 1),), budgets=(2e6, 3e6))


def test_the_grid_has_more_than_thirty_runs_in_slices_of_equal_compute():
    points = sweep.points()
    assert len(points) >= 30
    assert len({point.name for point in points}) == len(points)
    runs = {
        "N": [float(p.n) for p in points],
        "D": [float(p.tokens) for p in points],
        "loss": [1.0 + i * 1e-3 for i in range(len(points))],
    }
    by_budget = [
        [p for p in points if abs(6 * p.n * p.tokens / budget - 1) < 0.02]
        for budget in sweep.BUDGETS
    ]
    assert sum(map(len, by_budget)) == len(runs["N"])  # steps are whole: within 1 in 60, halved
    assert sum(len({p.n for p in group}) >= 4 for group in by_budget) >= 4
    assert all(p.steps >= sweep.LEAST_STEPS for p in points)
    assert all(p.tokens <= sweep.MOST_TOKENS for p in points)


def test_parameters_are_those_of_the_model_without_the_embedding_and_the_norms():
    sizes = model.sized(32, 2, 16)
    table, norms = 256 * 32, 5 * 32
    (point,) = sweep.points(((32, 2),), (2e10,))
    assert point.n == model.n_params(sizes) - table - norms


def test_runs_are_made_once_and_their_rows_can_be_fitted(tiny, tmp_path):
    rows = tmp_path / "results" / "sweep.jsonl"
    first, second = tiny
    assert sweep.measure([first], rows, tmp_path / "runs") == 0
    before = rows.read_text()
    assert sweep.measure(tiny, rows, tmp_path / "runs") == 0
    assert rows.read_text().startswith(before)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["run_id"] for row in found] == [first.name, second.name]
    assert found[0]["steps"] == first.steps
    runs = scaling_laws.load_runs(rows)
    assert runs["N"].tolist() == [first.n, second.n]
    assert runs["C"].tolist() == [6 * p.n * p.tokens for p in tiny]
    assert runs.conventions.n_rule == "body_head"
    # The folder of a run says the same.
    folder = scaling_laws.load_runs(tmp_path / "runs", n_rule="body_head", flops="6ND")
    for name in ("N", "D", "C", "loss", "lr"):
        assert sorted(folder[name]) == pytest.approx(sorted(runs[name]), rel=1e-12), name


def test_a_run_that_a_signal_stopped_has_no_row_and_ends_the_sweep(tiny, tmp_path, monkeypatch):
    rows = tmp_path / "sweep.jsonl"
    monkeypatch.setattr(sweep, "run", lambda *args: _Stopped())
    assert sweep.measure(tiny, rows, tmp_path / "runs") == 128 + 2
    assert not rows.exists()


class _Stopped:
    stopped, signum, message = "signal", 2, "stopped by SIGINT"
