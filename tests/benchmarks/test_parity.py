"""The parity harness: its measure finds what is planted, it refuses what is no reference."""

import dataclasses
import functools
import subprocess

import numpy as np
import pytest

from benchmarks.parity import __main__ as command
from benchmarks.parity import compare, reference
from jaxopt_suite.optimizers import grams


def test_a_planted_difference_is_found_with_its_leaf_and_step():
    arrays = [{"a": np.full((2, 3), 4.0), "b": np.ones(5)} for _ in range(3)]
    changed = [{name: x.copy() for name, x in step.items()} for step in arrays]
    changed[1]["a"][0, 2] += 1e-3
    found = compare.largest_difference(changed, arrays)
    assert (found.leaf, found.step) == ("a", 2)
    assert found.value == pytest.approx(1e-3 / 4.0)  # over the largest magnitude of that leaf
    assert compare.largest_difference(arrays, arrays).value == 0.0


@pytest.mark.parametrize(
    ("ours", "official", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1e-9], [0.0, 0.0], np.inf),
        ([np.nan, 1.0], [np.nan, 1.0], np.inf),
        ([1.0, np.inf], [1.0, 1.0], np.inf),
        ([1.5, -2.0], [1.0, -2.0], 0.25),
        ([], [], 0.0),
    ],
)
def test_relative_difference_by_hand(ours, official, expected):
    assert compare.relative_difference(np.array(ours), np.array(official)) == expected


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        compare.relative_difference(np.ones((2, 3)), np.ones((3, 2)))


def test_gradients_change_sign_hold_zeros_and_have_separated_singular_values():
    grads = compare.gradients()
    assert len(grads) == compare.STEPS
    for name, shape in compare.SHAPES.items():
        stacked = np.stack([g[name] for g in grads])
        assert stacked.shape == (compare.STEPS, *shape)
        assert stacked.dtype == np.float32
        flips = np.sign(stacked[1:]) != np.sign(stacked[:-1])
        assert flips.mean() > 0.3
        assert (stacked[4] == 0).any()
        if len(shape) == 2:
            values = np.linalg.svd(stacked[0], compute_uv=False)
            assert (values[:3] / values[1:4] > 1.05).all()  # far above float32's rounding
            assert values[compare.RANK - 1] > 3 * values[compare.RANK]


def test_full_rank_gradients_have_a_statistic_of_full_rank_in_the_dtype_asked_for():
    shapes = {"square": (8, 8), "tensor": (6, 5, 4)}
    grads = compare.full_rank_gradients(shapes, steps=7, dtype="float64")
    assert len(grads) == 7
    for step in grads:
        for name, shape in shapes.items():
            assert step[name].shape == shape
            assert step[name].dtype == np.float64
            for mode, size in enumerate(shape):
                unfolded = np.moveaxis(step[name], mode, 0).reshape(size, -1)
                assert np.linalg.matrix_rank(unfolded, tol=1e-3) == size
    largest = [np.abs(step["square"]).max() for step in grads]
    assert max(largest) > 3 * min(largest)  # the scale changes


def _clone(tmp_path, method):
    for mark in method.marks:
        (tmp_path / mark).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / mark).write_text("")
    return tmp_path


@pytest.mark.parametrize("name", command.METHODS)
def test_a_path_that_is_not_the_reference_is_an_error_with_status_2(name, tmp_path, capsys):
    results = tmp_path / "rows.json"
    words = [name, "--results", str(results), "--reference"]
    method = command.METHODS[name]

    assert command.main([*words, str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    assert command.main([*words, str(tmp_path / "empty")]) == 2
    err = capsys.readouterr().err
    assert method.repository in err
    assert method.marks[0] in err

    (tmp_path / "copy").mkdir()
    assert command.main([*words, str(_clone(tmp_path / "copy", method))]) == 2
    assert "git clone" in capsys.readouterr().err
    assert not results.exists()


def test_a_missing_package_of_the_official_code_is_named(tmp_path):
    method = compare.Method("x", "o/n", (), ("jax", "no_such_package"), "x.py", lambda module: ())
    with pytest.raises(reference.UserError, match="pip install no_such_package"):
        reference.load(method, tmp_path)


def test_the_repository_is_taken_from_the_remote_then_from_the_table(tmp_path):
    method = command.METHODS["grams"]
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert reference.repository(method, tmp_path, None) == "Gunale0926/Grams"
    remote = ["git", "-C", tmp_path, "remote", "add", "origin", "git@github.com:some.one/fork.git"]
    subprocess.run(remote, check=True)
    assert reference.repository(method, tmp_path, None) == "some.one/fork"
    assert reference.repository(method, tmp_path, "a/b") == "a/b"
    with pytest.raises(reference.UserError, match="owner/name"):
        reference.repository(method, tmp_path, "a")


def _against_torch_adam(torch):
    return compare.Case(
        name="Adam",
        settings={},
        ours=lambda weight_decay: grams(0.01, weight_decay=weight_decay, kappa=1.0),  # Adam
        official=lambda params, weight_decay: torch.optim.AdamW(
            params.values(), lr=0.01, weight_decay=weight_decay
        ),
        transposed=False,
    )


def test_a_case_with_gradients_in_float64_is_run_in_float64_on_both_sides():
    torch = pytest.importorskip("torch", reason="runs PyTorch's AdamW")
    make = functools.partial(compare.full_rank_gradients, {"w": (4, 3)}, steps=5, dtype="float64")
    case = dataclasses.replace(_against_torch_adam(torch), gradients=make)
    assert compare.difference_of_updates(case).value < 1e-12  # float64 over 5 steps
    assert torch.get_default_dtype() == torch.float32
    assert compare.difference_of_parameters(case, weight_decay=0.1).value < 1e-12


def test_our_adam_agrees_with_pytorchs_and_one_with_a_wrong_beta_does_not():
    torch = pytest.importorskip("torch", reason="runs PyTorch's AdamW")
    case = _against_torch_adam(torch)
    assert compare.difference_of_updates(case).value < 1e-5  # float32 over 25 steps
    assert compare.difference_of_parameters(case, weight_decay=0.1).value < 1e-5
    wrong = grams(0.01, b1=0.901, kappa=1.0)
    assert compare.difference_of_updates(case, wrong).value > 1e-3
