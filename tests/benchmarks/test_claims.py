"""Claims: the helpers they rest on, by hand; the command's bad input."""

import jax
import numpy as np

from benchmarks.claims import __main__ as command
from benchmarks.claims import quadratic, state_bytes, training
from benchmarks.claims.claim import verdict
from jaxopt_suite.experiments.model import PRESETS, abstract_params


def test_a_verdict_is_what_its_conditions_say():
    assert verdict(True, True) == "holds"
    assert verdict(True, False) == "holds in part"
    assert verdict(False, False) == "does not hold"


def test_rises_are_counted_until_the_floor_and_not_after():
    assert quadratic.rises(np.array([1.0, 0.5, 0.6, 0.4, 1e-7, 1.0, 2.0])) == 1
    assert quadratic.rises(np.array([1.0, 0.5, 0.25])) == 0


def test_the_quadratic_has_the_curvatures_it_claims_in_either_orientation():
    for rotated in (False, True):
        found = np.linalg.eigvalsh(quadratic.hessian(rotated=rotated))
        np.testing.assert_allclose(found, np.logspace(0, 3, 20), rtol=1e-9)  # float64


def test_a_descent_starts_at_one_and_falls():
    seen = quadratic.losses(quadratic.hessian(rotated=False), kappa=-1.0, rate=0.01, steps=50)
    assert seen[0] == 1.0
    assert seen[-1] < 0.5


def test_state_bytes_of_adamw_are_two_moments_and_its_counters():
    params = abstract_params(PRESETS["nano"])
    elements = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert 0 <= state_bytes.bytes_of("adamw", params) - 2 * 4 * elements <= 16


def test_the_full_scale_is_the_default_task():
    scale = training.Scale.of(False)
    assert (scale.steps, scale.seeds) == (200, 3)
    assert training.Scale.of(True).steps < scale.steps


def test_mean_and_spread_by_hand():
    assert training.mean_and_spread([1.0]) == "1.000"
    assert training.mean_and_spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"


def test_an_unknown_claim_is_refused_with_the_list(capsys):
    assert command.main(["no-such-claim"]) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in command.CLAIMS)


def test_a_claim_that_needs_no_training_is_measured_in_full_even_if_quickly(tmp_path, capsys):
    path = tmp_path / "claims.json"
    assert command.main(["snsm-state", "--quick", "--results", str(path)]) == 0
    (row,) = command._results.load(path)
    assert (row["name"], row["quick"]) == ("snsm-state", False)
    assert row["verdict"] in ("holds", "holds in part", "does not hold")
    assert row["figure"] in capsys.readouterr().out
