"""Benchmarks of communication: what they compute, by hand; what counts as a promise kept."""

import json
import math

import numpy as np
import pytest

from benchmarks.claims import error_feedback
from benchmarks.communication import __main__ as command
from benchmarks.communication import (
    outer_loops,
    outer_task,
    overhead,
    recipes,
    task,
    wire_bytes,
)
from jaxopt_suite import parallel
from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import registry
from jaxopt_suite.optimizers.compression import compressors


def top_one(x):
    kept = np.zeros_like(x)
    kept[np.argmax(np.abs(x))] = x[np.argmax(np.abs(x))]
    return kept


@pytest.mark.parametrize("rule", ["no memory", "EF", "EF21"])
def test_the_diverging_example_by_hand(rule):
    vectors = np.array([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])
    x, memory, estimate, norms = np.ones(3), np.zeros((3, 3)), np.zeros(3), []
    for _ in range(40):
        norms.append(np.linalg.norm(x))
        sent = np.zeros((3, 3))
        for w, a in enumerate(vectors):
            g = 2 * a * (a @ x) + 0.5 * x
            if rule == "EF":
                sent[w] = top_one(g + memory[w])
                memory[w] += g - sent[w]
            elif rule == "EF21":
                sent[w] = top_one(g - memory[w])
                memory[w] += sent[w]
            else:
                sent[w] = top_one(g)
        estimate = estimate + sent.mean(0) if rule == "EF21" else sent.mean(0)
        x = x - 0.01 * estimate
    np.testing.assert_allclose(error_feedback.diverging(rule, steps=40), norms, rtol=1e-4)


def test_heterogeneous_workers_without_noise_descend_as_their_mean_does():
    workers, steps = 10, 30
    rng = np.random.default_rng(5)
    index = np.arange(1, workers + 1)[:, None]
    scale, target = index / np.sqrt(workers), 100 / index * rng.standard_normal((workers, 200))
    x, norms = np.zeros(200), []
    for _ in range(steps):
        gradient = (scale * (scale * x - target)).mean(0)
        norms.append(np.sum(gradient**2))
        x = x - gradient / 512
    seen = error_feedback.heterogeneous("exact mean", workers=workers, steps=steps, seed=5, sigma=0)
    np.testing.assert_allclose(seen, norms, rtol=1e-4)


def test_a_curve_that_overflows_is_infinite_from_there_and_null_in_json():
    curve = error_feedback._finite(np.array([1.0] * 200 + [1e31] + [1.0] * 199))
    assert np.isinf(curve[200:]).all()
    assert error_feedback._windows(curve) == [1.0, None]


def test_bytes_of_an_entry_are_counted_in_a_program_and_beside_them_the_closed_form(monkeypatch):
    monkeypatch.setattr(wire_bytes, "WHOLE", {"up": (64, 256), "down": (256, 64), "scale": (512,)})
    mesh = parallel.make_mesh({"worker": 4, "model": 2})
    found = wire_bytes.entry(compressors.int8(256), "two_phase", mesh)
    matrix = 64 * 256 // 2  # on a device
    piece = 2 * (matrix // 4 + 4 * (matrix // 4 // 256))  # codes of both, and float32 scales
    codes = 2 * 3 * math.ceil(piece / 128) * 128
    vector = 2 * 3 / 4 * 4 * 512
    assert found["closed_form"] == pytest.approx(codes + vector + 2 * 7 / 8 * 4)
    assert found["off"] == pytest.approx(0, abs=1e-3)
    assert found["all_reduce"] == 2 * 3 / 4 * 4 * (2 * matrix + 512)
    assert found["largest_float"] == 4 * 512 < found["matrix_bytes"] == 4 * matrix
    assert wire_bytes.kept([{"entries": [{**found, "compressor": "int8()", "off": 0.0}]}])


def test_the_closed_form_counts_whole_lines_of_what_goes_to_each_worker():
    assert wire_bytes._whole_lines(2 * 3 * 704, 4, "two_phase") == 2 * 3 * 768
    assert wire_bytes._whole_lines(3 * 128, 4, "gather") == 3 * 128
    assert wire_bytes._whole_lines(100.0, 4, "mean") == 100.0


def test_a_whole_matrix_on_the_wire_or_a_wrong_sum_breaks_the_promise():
    good = {"compressor": "sign()", "off": 0.019, "largest_float": 8, "matrix_bytes": 9}
    assert wire_bytes.kept([{"entries": [good]}])
    assert not wire_bytes.kept([{"entries": [good | {"off": 0.021}]}])
    assert not wire_bytes.kept([{"entries": [good | {"largest_float": 9}]}])


def test_a_recipe_that_sends_a_whole_matrix_of_floats_breaks_the_promise_unless_it_warms_up_so():
    entry = {"recipe": "demo", "largest_float": 8, "matrix_bytes": 9}
    assert recipes.kept([{"entries": [entry]}])
    assert not recipes.kept([{"entries": [entry | {"largest_float": 9}]}])
    assert recipes.kept([{"entries": [entry | {"largest_float": 9, "recipe": "onebit_adam"}]}])


def test_an_outer_loop_s_entry_has_its_round_s_bytes_and_none_of_every_step():
    mesh = parallel.make_mesh({"worker": 4, "model": 2})
    sizes = model.ModelConfig(d_model=32, n_layers=1, n_heads=2, d_ff=32)
    method = outer_loops.Method("DiLoCo", "diloco", {"sync_every": 5}, 5)
    found = outer_loops.entry(method, sizes, mesh)
    assert found["always"] == []
    assert found["per_step"] == pytest.approx(found["largest_step"] / 5)
    own = found["parameter_bytes"]
    assert 4 * model.n_params(sizes) / 2 < own < 4 * model.n_params(sizes)  # matrices are halved
    # Two numbers with them, and one over all devices: whether what is left out is finite.
    assert own <= found["largest_step"] / (2 * 3 / 4) <= own + 16
    assert 5 * own < found["arguments"] < 5.2 * own
    good = found | {"times_fewer": 5.0, "arguments": 5 * own}
    assert outer_loops.kept([{"entries": [good]}])
    for bad in ({"times_fewer": 4.5}, {"arguments": 6 * own}, {"always": [["x", 1, 1]]}):
        assert not outer_loops.kept([{"entries": [good | bad]}])


def test_only_what_is_promised_has_to_be_quick():
    entries = [{"compressor": "sign()", "ratio": 0.15}, {"compressor": "low_rank(4)", "ratio": 9.0}]
    assert overhead.kept([{"entries": entries}])
    assert not overhead.kept([{"entries": [{"compressor": "int8()", "ratio": 0.16}]}])


def test_runs_of_a_variant_are_reduced_to_a_row_and_a_diverged_one_has_no_mean():
    run = {"learning_rate": 0.1, "steps": [100, 200], "val_loss": [3.0, 2.0], "diverged_at": None}
    run |= {"wire_bytes": 7.0, "state_bytes": 8, "n_params": 9}
    row = task._row([run, run | {"val_loss": [3.0, 1.0]}], [run])
    assert (row["mean"], row["losses"], row["steps"]) == (1.5, [2.0, 1.0], 200)
    assert row["sweep"] == {"0.1": 2.0}
    assert task._row([run, run | {"diverged_at": 3}], [])["mean"] is None
    assert json.loads(json.dumps(row)) == row


def test_the_target_needs_one_variant_near_and_one_small():
    near, small = {"over_dense": 1.01, "times_fewer": 30}, {"over_dense": 1.03, "times_fewer": 100}
    assert task.kept([near, small])
    assert not task.kept([near])
    assert not task.kept([small])
    assert not task.kept([{"over_dense": None, "times_fewer": 1000}])


def test_variants_are_of_the_registry_and_have_names_of_their_own():
    assert {variant.optimizer for variant in task.VARIANTS} <= registry().keys()
    assert len({variant.name for variant in task.VARIANTS}) == len(task.VARIANTS)


def test_an_unknown_part_is_refused_with_the_list(capsys):
    with pytest.raises(SystemExit):
        command.main(["wires"])
    err = capsys.readouterr().err
    assert all(part in err for part in command.PARTS)


def test_an_unknown_variant_is_refused_with_the_list(capsys):
    assert command.main(["task", "SGD, dense"]) == 2
    assert "AdamW, dense" in capsys.readouterr().err
    assert command.main(["wire", "worker=3"]) == 2
    assert "worker=256" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["overhead", "sign()"])


def test_two_of_eight_workers_are_away_at_every_step_and_others_later():
    weights = outer_task.absences(200, seed=1)
    assert weights.shape == (200, 8)
    np.testing.assert_array_equal(weights.sum(axis=1), 6)
    assert len(np.unique(weights, axis=0)) > 4
    assert (weights != outer_task.absences(200, seed=2)).any()


def test_the_disturbed_runs_have_the_seeds_of_the_calm_ones_and_are_judged_against_them(
    monkeypatch,
):
    monkeypatch.setattr(outer_task, "_train", lambda variant, calm, seed: 2.0 + 0.1 * seed)
    calm = {"name": "DiLoCo", "losses": [2.0, 2.0, 2.0], "mean": 2.0, "wire_bytes": 1.0}
    found = outer_task.disturbed(outer_task.VARIANTS[1], calm)
    assert (found["losses"], found["away"]) == ([2.0, 2.1, 2.2], 2)
    assert found["over_calm"] == pytest.approx(1.05)
    assert not outer_task.kept([calm, found])
    assert outer_task.kept([calm, found | {"over_calm": 1.02}])
    assert not outer_task.kept([calm | {"mean": None}])
