"""Our own run folders, found however deep, and what their configurations add."""

import json

import numpy as np
import pytest

from jaxopt_suite.experiments import model
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.experiments.data import Corpus
from jaxopt_suite.experiments.loop import train
from jaxopt_suite.scaling_laws import load_runs
from jaxopt_suite.scaling_laws.conventions import FLOP_RULES, Shape
from jaxopt_suite.scaling_laws.runs import BadRuns

SIZES = {"d_model": 96, "n_layers": 2, "n_heads": 3, "d_ff": 256, "vocab_size": 256}
BODY = 2 * (4 * 96**2 + 3 * 96 * 256)


def run_folder(path, records, *, torn="", **config):
    """A run of 20 steps of 4 x 32 tokens, as the loop writes it."""
    path.mkdir(parents=True)
    facts = {
        "preset": "nano", "steps": 20, "batch_size": 4, "seq_len": 32, "optimizer": "adamw",
        "learning_rate": 0.01, "seed": 0, "n_params": 270816, "model": SIZES,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(facts | config))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (path / "metrics.jsonl").write_text(lines + torn)
    (path / "starts.jsonl").write_text('{"step": 0}\n')
    return path


def record(step, val_loss=None, loss=3.0, **more):
    found = {"step": step, "tokens": step * 128, "seconds": 1.0, "loss": loss, "lr": 1e-5, **more}
    return found if val_loss is None else found | {"val_loss": val_loss}


FINISHED = [
    {"step": 0, "tokens": 0, "seconds": 0.0, "val_loss": 5.5},
    record(5), record(10, 2.9), record(15), record(20, 2.8),
]  # fmt: skip


def test_a_run_that_was_trained_is_read_as_it_is(tmp_path, monkeypatch):
    """The formats are the loop's own, so the loop writes this one."""
    small = model.ModelConfig(8, 1, 1, 16)  # compiles sooner than a real preset
    monkeypatch.setattr(model, "PRESETS", {"nano": small})
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 20, np.uint8)
    config = TrainConfig(
        steps=4, eval_every=2, log_every=1, batch_size=2, seq_len=16, eval_batches=1,
        learning_rate=0.004, seed=3, out=str(tmp_path / "sweep" / "one"),
    )  # fmt: skip
    result = train(config, corpus=Corpus("sentences", text, text))
    runs = load_runs(tmp_path, flops="6ND")
    records = result.run.read()
    assert list(runs["run_id"]) == ["sweep/one"]
    expected = {
        "N": result.n_params, "D": 4 * 2 * 16, "loss": records[-1]["val_loss"], "lr": 0.004,
        "seed": 3, "steps": 4, "batch_tokens": 32, "width": 8, "depth": 1, "vocab": 256,
        "C": 6 * result.n_params * 128,
    }  # fmt: skip
    assert {name: runs[name][0] for name in expected} == expected
    assert runs.conventions.n_rule == "total"
    assert runs.conventions.loss_kind == "val"
    curve = load_runs(tmp_path, mode="curve")
    assert list(curve["step"]) == [2, 4]
    assert [each.reason for each in curve.dropped] == ["before the first step (D is 0)"]


def test_runs_are_found_in_nested_folders_and_nothing_inside_a_run(tmp_path):
    for name in ("adamw/seed-0", "adamw/sweep/lr-0.01", "muon/seed-0"):
        run_folder(tmp_path / name, FINISHED, optimizer=name.split("/")[0])
    (tmp_path / "adamw" / "seed-0" / "extra.csv").write_text("N,D,loss\n1,1,1\n")
    (tmp_path / "table.csv").write_text("N,D,loss\n1,1,1\n")
    runs = load_runs(tmp_path)
    assert list(runs["run_id"]) == ["adamw/seed-0", "adamw/sweep/lr-0.01", "muon/seed-0"]
    assert list(runs["optimizer"]) == ["adamw", "adamw", "muon"]
    assert list(runs["loss"]) == [2.8] * 3


def test_runs_that_stopped_or_diverged_are_left_out_with_the_reason(tmp_path):
    run_folder(tmp_path / "a", FINISHED)
    run_folder(tmp_path / "b", FINISHED[:3])
    diverged = record(12, loss=None, nonfinite={"loss": "nan"})
    run_folder(tmp_path / "c", [*FINISHED[:3], diverged])
    run_folder(tmp_path / "d", FINISHED[:3], torn='{"step": 15, "to')
    runs = load_runs(tmp_path)
    assert list(runs["run_id"]) == ["a"]
    reasons = {each.where.removeprefix(str(tmp_path)): each.reason for each in runs.dropped}
    assert "had not finished" in reasons["/b/metrics.jsonl:3"]
    assert reasons["/c/metrics.jsonl:4"] == "diverged at step 12: loss is nan"
    assert "ends with an unusable record" in reasons["/c/metrics.jsonl:3"]
    assert reasons["/d/metrics.jsonl:4"].startswith("cut short")
    kept = load_runs(tmp_path, unfinished="keep")
    assert list(kept["run_id"]) == ["a", "b", "d"]
    assert len(load_runs(tmp_path, mode="curve")) == 5


def test_a_damaged_line_inside_a_run_is_bad(tmp_path):
    path = run_folder(tmp_path / "a", FINISHED)
    text = (path / "metrics.jsonl").read_text().splitlines()
    text[1] = text[1][:20]
    (path / "metrics.jsonl").write_text("\n".join(text) + "\n")
    with pytest.raises(BadRuns, match=r"metrics\.jsonl:2: not JSON"):
        load_runs(tmp_path)


def test_the_training_loss_is_read_if_asked_for(tmp_path):
    run_folder(tmp_path / "a", [*FINISHED[:4], record(20, 2.8, loss=2.5)])
    runs = load_runs(tmp_path, columns="loss=loss", loss_kind="train")
    assert runs["loss"][0] == 2.5
    assert runs.conventions.loss_kind == "train"


def test_n_and_c_follow_from_the_sizes_by_the_named_rules(tmp_path):
    run_folder(tmp_path / "a", FINISHED)
    runs = load_runs(tmp_path, n_rule="body", flops="body_head_attention")
    assert runs["N"][0] == BODY
    per_token = 6 * (BODY + 256 * 96) + 6 * 32 * 96 * 2
    assert runs["C"][0] == per_token * 2560
    assert runs.conventions.n_rule == "body"
    assert set(runs.conventions.derived) == {"N", "C"}
    shape = Shape(width=96, depth=2, vocab=256, seq_len=32, heads=3, ff_width=256, ff_matrices=3)
    full = load_runs(tmp_path, flops="full_sum")["C"]
    np.testing.assert_allclose(full, FLOP_RULES["full_sum"].of(shape) * 2560, rtol=1e-15)


def test_a_size_of_ones_own_is_not_said_to_be_the_total(tmp_path):
    run_folder(tmp_path / "a", FINISHED, active_params=1000)
    runs = load_runs(tmp_path, columns="N=active_params")
    assert runs["N"][0] == 1000
    assert runs.conventions.n_rule is None


def test_what_a_run_of_an_older_version_lacks_is_named(tmp_path):
    path = run_folder(tmp_path / "a", FINISHED)
    config = json.loads((path / "config.json").read_text())
    del config["model"]
    (path / "config.json").write_text(json.dumps(config))
    assert load_runs(tmp_path)["N"][0] == 270816
    with pytest.raises(ValueError, match="'body' needs width, depth, ff_width, ff_matrices"):
        load_runs(tmp_path, n_rule="body")


def test_a_configuration_that_is_none_is_refused(tmp_path):
    path = run_folder(tmp_path / "a", FINISHED)
    for text, told in (("[]", "must hold a JSON object"), ("{", "is not JSON")):
        (path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json {told}"):
            load_runs(tmp_path)
