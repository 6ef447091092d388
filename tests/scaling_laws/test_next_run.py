"""Which run to make next: what is predicted is what happens when it is made."""

import dataclasses

import numpy as np
import pytest

from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import coordinates
from jaxopt_suite.scaling_laws.batch import Batch
from jaxopt_suite.scaling_laws.solver import Rows

LAW = scaling_laws.laws.Chinchilla
TRUTH = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
NOISE = 1e-3  # small enough that first order is enough


def _loss(n, d):
    return TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * d ** -TRUTH["beta"]


@pytest.fixture(scope="module")
def fit():
    """Sixteen runs that leave out small models on many tokens."""
    n = np.repeat(np.geomspace(1e8, 3e9, 4), 4)
    d = n * np.tile(np.geomspace(5, 80, 4), 4)
    noise = np.random.default_rng(0).standard_normal(16)
    runs = {"N": n, "D": d, "loss": _loss(n, d) * np.exp(NOISE * noise)}
    return scaling_laws.fit(LAW, runs, objective=scaling_laws.squares(), starts=32, bootstrap=0)


def _simulated_error(fit, extra, at, *, weight, replicates=400):
    """Spread of ``ln N*`` over fits of new losses for the same runs, and one more of a weight."""
    columns = {k: np.append(v, extra[k]) for k, v in fit.table.inputs.items()}
    mean = np.asarray(LAW.predict(fit.coefficients, columns))
    noise = np.random.default_rng(1).standard_normal((replicates, len(mean)))
    rows = Rows(
        {k: np.tile(v, (replicates, 1)) for k, v in columns.items()},
        mean * np.exp(NOISE * noise),
    )
    low, high = coordinates.box(LAW, {})
    weights = np.append(np.ones(len(mean) - 1), weight)
    batch = Batch(LAW, fit.objective, rows, coordinates.centring(LAW, columns), weights, low, high)
    found = batch.solve(np.tile(fit.theta, (replicates, 1)), batch.problems(replicates))
    assert found.solved.all()
    n, _ = LAW.optimum(coordinates.from_theta(LAW, found.theta), at)
    return np.std(np.log(n))


def test_the_predicted_reduction_is_the_one_that_simulated_runs_give(fit):
    """The runs that are shared have the same noise, so that ratios scatter by 3 % or so."""
    at = 1e22
    plan = fit.next_run(1e20, at=at)
    candidate = lambda i: {"N": plan.n[i], "D": plan.d[i]}
    now = _simulated_error(fit, candidate(plan.best), at, weight=0.0)
    assert plan.reduction[plan.best] > 0.1  # or there is nothing to tell apart
    for i in (plan.best, 64):
        then = _simulated_error(fit, candidate(i), at, weight=1.0)
        assert then / now == pytest.approx(plan.after[i] / plan.before, abs=0.05), i
    # The noise is estimated from 11 degrees of freedom.
    assert plan.before == pytest.approx(now, rel=0.5)


def test_the_best_candidate_is_the_smallest_of_all_and_costs_the_budget(fit):
    plan = fit.next_run(1e20)
    assert plan.best == np.argmin(plan.after)
    assert np.all(plan.after <= plan.before * (1 + 1e-12))
    np.testing.assert_allclose(6 * plan.n * plan.d, 1e20, rtol=1e-12)
    assert plan.at == 1e20
    assert f"{plan.n[plan.best]:.3g}" in str(plan)


def test_the_gradient_of_the_optimum_is_the_same_by_search_and_by_the_closed_form(fit):
    closed = fit.next_run(1e20, at=1e22)
    searched = fit.next_run(1e20, at=1e22, rule=lambda n, d: 6.0 * n * d)
    np.testing.assert_allclose(searched.after, closed.after, rtol=1e-2)  # a flat minimum's place


def test_a_run_made_twice_and_a_parameter_that_is_held_count_as_they_should(fit):
    wide = fit.next_run(1e20, at=1e22, sizes=(1e8, 1e9), candidates=3)
    assert wide.n[[0, -1]] == pytest.approx([1e8, 1e9])
    runs = {**fit.table.inputs, "loss": fit.table.observed}
    held = scaling_laws.fit(
        LAW, runs, objective=fit.objective, starts=32, bootstrap=0, fixed={"alpha": 0.34}
    )
    assert held.next_run(1e20, at=1e22).before < 0.8 * fit.next_run(1e20, at=1e22).before


def test_illegal_questions_are_refused(fit):
    with pytest.raises(ValueError, match="budget"):
        fit.next_run(-1.0)
    with pytest.raises(ValueError, match="needs N, D"):
        fit.next_run(1e20, lr=1e-3)
    exact = dataclasses.replace(fit, table=dataclasses.replace(fit.table, weights=np.eye(16)[0]))
    with pytest.raises(scaling_laws.FitRefused, match="do not determine"):
        exact.next_run(1e20)
