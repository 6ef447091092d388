"""Compile times: both steps are the same step, and a measurement is a row."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.compile_time import __main__ as command
from benchmarks.compile_time import steps
from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import registry
from jaxopt_suite.parallel.layout import TrainState
from jaxopt_suite.parallel.meshes import make_mesh

TINY = model.ModelConfig(d_model=8, n_layers=2, n_heads=2, d_ff=16)


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr(model, "PRESETS", model.PRESETS | {"nano": TINY})
    tokens = jax.ShapeDtypeStruct((8, 9), jnp.int32)
    return steps.Task(TINY, make_mesh({"data": 8}), tokens, scan_layers=False)


def test_the_two_steps_compute_the_same(task):
    graphdef, abstract = task.model()
    tx = registry()["adamw"].make(steps.LEARNING_RATE)
    tokens = np.random.default_rng(0).integers(0, 256, (8, 9)).astype(np.int32)
    results = []
    for program in (steps.ours, steps.by_hand):
        _, params = model.build(TINY, seed=0)
        assert jax.tree.structure(params) == jax.tree.structure(abstract)
        compiled = program(task, graphdef, abstract)().compile()
        state = (params, tx.init(params))
        arguments = state if program is steps.by_hand else (TrainState(*state),)
        placed = jax.device_put((*arguments, tokens), compiled.input_shardings[0])
        results.append([np.asarray(x) for x in jax.tree.leaves(compiled(*placed))])
    assert len(results[0]) == len(results[1])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.exhaustive
def test_a_measurement_is_printed_and_a_row(task, tmp_path, capsys):
    results = tmp_path / "rows.json"
    words = ["--preset", "nano", "--seq-len", "8", "--rounds", "1", "--results", str(results)]
    assert command.main(words) in (0, 1)  # tiny programs: the ratio says nothing
    assert capsys.readouterr().out.count("ratio") == 2
    (row,) = json.loads(results.read_text())
    assert (
        row["command"] == "python -m benchmarks.compile_time --preset nano --rounds 1 --clock wall"
    )
    assert [step["layers"] for step in row["steps"]] == ["written out", "in a loop"]
    for step in row["steps"]:
        assert step["ms"] > 0
        assert step["reached"] == (step["ms"] / step["baseline_ms"] <= command.TARGET)


def test_a_bad_preset_is_refused(capsys):
    assert command.main(["--preset", "huge"]) == 2
    assert "--preset must be one of nano" in capsys.readouterr().err
