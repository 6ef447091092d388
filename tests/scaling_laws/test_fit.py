"""What a fit is used for, and what it refuses."""

import json
import math
import types

import numpy as np
import pytest

from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import comparison

CHINCHILLA = scaling_laws.laws.Chinchilla


@pytest.fixture(scope="module")
def runs(noisy_runs):
    return noisy_runs


@pytest.fixture(scope="module")
def fit(runs):
    return scaling_laws.fit(CHINCHILLA, runs, starts=16, bootstrap=200)


def _fit(runs, **options):
    return scaling_laws.fit(CHINCHILLA, runs, **{"starts": 13, "bootstrap": 0} | options)


def test_a_law_of_ten_lines_is_fitted(runs):
    law = scaling_laws.Law(
        name="mine",
        formula="L = E + (A / N + B / D)^alpha",
        inputs=("N", "D"),
        parameters=(
            scaling_laws.floor("E"),
            scaling_laws.coefficient("A", unit="", start=(1e3, 1e9)),
            scaling_laws.coefficient("B", unit="", start=(1e3, 1e9)),
            scaling_laws.exponent("alpha"),
        ),
        predict=lambda p, x: p["E"] + (p["A"] / x["N"] + p["B"] / x["D"]) ** p["alpha"],
    )
    truth = {"E": 1.5, "A": 3e7, "B": 9e7, "alpha": 0.3}
    loss = law.predict(truth, {k: v for k, v in runs.items() if k != "loss"})
    found = scaling_laws.fit(law, {**runs, "loss": loss}, starts=16, bootstrap=0)
    for name, value in truth.items():
        # The losses of this line are float32: a law outside of `fit` follows the global setting.
        assert found.coefficients[name] == pytest.approx(value, rel=1e-3), name


def test_predictions_have_bands_that_hold_the_curve(fit):
    band = fit.predict({"N": [[1e9], [1e10]], "D": [1e10, 1e11, 1e12]}, level=0.9)
    assert band.value.shape == band.low.shape == (2, 3)
    assert np.all((band.low < band.value) & (band.value < band.high))
    at = fit.coefficients
    by_hand = at["E"] + at["A"] * 1e9 ** -at["alpha"] + at["B"] * 1e11 ** -at["beta"]
    assert band.value[0, 1] == pytest.approx(by_hand, rel=1e-12)
    with pytest.raises(ValueError, match="reads N, D"):
        fit.predict({"N": 1e9})


def test_the_search_for_an_optimum_agrees_with_the_closed_form(fit):
    closed = fit.compute_optimal([1e19, 1e21])
    searched = fit.compute_optimal([1e19, 1e21], rule=lambda n, d: 6.0 * n * d)
    # A minimum is flat: its place is known to the root of the rounding error.
    np.testing.assert_allclose(searched.n, closed.n, rtol=1e-6)
    np.testing.assert_allclose(searched.intervals["n"], closed.intervals["n"], rtol=1e-6)
    np.testing.assert_allclose(searched.a, closed.a, atol=1e-4)
    np.testing.assert_allclose(closed.n * closed.d * 6, closed.flops, rtol=1e-12)
    assert np.all(closed.intervals["n"][:, 0] < closed.n)
    assert np.all(closed.n < closed.intervals["n"][:, 1])


def test_another_count_of_flops_moves_the_optimum_as_its_derivative_says(fit):
    """With inference on D' tokens, 6ND + 2ND', the gradients of loss and cost are parallel."""
    served = 1e12
    found = fit.compute_optimal(1e22, rule=lambda n, d: 6 * n * d + 2 * n * served)
    at, n, d = fit.coefficients, found.n[0], found.d[0]
    assert 6 * n * d + 2 * n * served == pytest.approx(1e22, rel=1e-9)
    fall_n = at["alpha"] * at["A"] * n ** -at["alpha"]
    fall_d = at["beta"] * at["B"] * d ** -at["beta"]
    assert fall_n / fall_d == pytest.approx((6 * d + 2 * served) / (6 * d), rel=1e-5)


def test_the_extrapolation_is_named(fit, runs):
    largest = float(np.max(6 * runs["N"] * runs["D"]))
    frontier = fit.compute_optimal([largest, 1000 * largest])
    np.testing.assert_allclose(frontier.extrapolation, [1, 1000])
    assert "DOUBTFUL" in str(frontier)
    assert "DOUBTFUL" not in str(fit.compute_optimal(largest))


def test_an_optimum_at_the_edge_is_refused(fit):
    with pytest.raises(scaling_laws.NoInteriorOptimum, match="edge"):
        fit.compute_optimal(1e20, rule=lambda n, d: 6 * d * n**0 * 1e6)  # size costs nothing


@pytest.mark.parametrize("flops", [0, -1.0, np.inf, [[1e20]]])
def test_budgets_are_positive_numbers(fit, flops):
    with pytest.raises(ValueError, match="flops must be positive"):
        fit.compute_optimal(flops)


def test_intervals_of_three_kinds_agree_in_size(fit):
    widths = [np.diff(fit.interval("alpha", method=m))[0] for m in scaling_laws.fit_result.METHODS]
    assert max(widths) < 2.5 * min(widths)  # 36 runs; a mistaken factor would be larger
    with pytest.raises(ValueError, match="'bootstrap', 'covariance', 'profile', got 'guess'"):
        fit.interval("alpha", method="guess")
    with pytest.raises(ValueError, match="got 'gamma'"):
        fit.interval("gamma")
    assert fit.interval("E", 0.5)[0] > fit.interval("E", 0.9)[0]


def test_a_stored_fit_comes_back_whole(fit):
    text = fit.to_json()
    again = scaling_laws.Fit.from_json(text)
    assert again.to_json() == text
    assert again.interval("alpha") == fit.interval("alpha")
    assert again.compute_optimal(1e21).n == fit.compute_optimal(1e21).n
    stored = json.loads(text)
    assert stored["certificate"]["status"] == "converged"
    stored["runs"]["observed"][0] += 1e-9
    with pytest.raises(ValueError, match="were changed"):
        scaling_laws.Fit.from_json(json.dumps(stored))
    stored["law"]["name"] = "other"
    with pytest.raises(ValueError, match="a fit of 'other'"):
        scaling_laws.Fit.from_json(json.dumps(stored))
    for wrong in ("{", "[]", '{"format": 99}'):
        with pytest.raises(ValueError, match="not a stored fit"):
            scaling_laws.Fit.from_json(wrong)


def test_what_is_infinite_is_stored_too(runs):
    found = _fit(runs, objective=scaling_laws.squares())
    assert scaling_laws.Fit.from_json(found.to_json()).objective == found.objective
    assert found.objective.delta == math.inf


def test_held_out_errors_are_those_of_a_fit_without_them(fit, runs):
    (split,) = fit.holdout("N", largest=0.1)
    kept = runs["N"] < runs["N"].max()
    alone = _fit(runs, weights=kept.astype(float))
    assert (split.trained, split.held_out) == (30, 6)  # the six of the largest size, together
    assert split.parameters["alpha"] == pytest.approx(alone.coefficients["alpha"], rel=1e-6)
    at = {name: runs[name][~kept] for name in ("N", "D")}
    error = np.abs(alone.predict(at) / runs["loss"][~kept] - 1)
    np.testing.assert_allclose(split.relative_error, error, rtol=1e-5)
    assert len(fit.holdout("N")) == 6
    with pytest.raises(scaling_laws.TooFewRuns, match="fit and 1 to predict"):
        fit.holdout("N", largest=0.9)
    with pytest.raises(ValueError, match="got both"):
        fit.holdout("N", largest=0.1, cuts=[1e9])
    with pytest.raises(ValueError, match="by must be one of N, D or 36 numbers"):
        fit.holdout("width")


def test_zero_weights_leave_runs_out(runs):
    broken = {**runs, "loss": runs["loss"].copy(), "w": np.ones(36)}
    broken["loss"][7], broken["w"][7] = 9.0, 0.0
    with_weights = _fit(broken, weights="w").coefficients
    without = {name: np.delete(column, 7) for name, column in runs.items()}
    for name, value in _fit(without).coefficients.items():
        assert with_weights[name] == pytest.approx(value, rel=1e-6), name


def test_the_likelihood_is_the_normal_and_the_laplace_one_in_the_limits():
    n, total = 50.0, 0.02
    normal = -n / 2 * (math.log(2 * math.pi * 2 * total / n) + 1)
    assert comparison.log_likelihood(scaling_laws.squares(), total, n) == pytest.approx(normal)
    # Sum of delta |r| for a small delta: Laplace's with the mean absolute value as its scale.
    delta, mean = 1e-7, 0.01
    laplace = -n * (math.log(2 * mean) + 1)
    found = comparison.log_likelihood(scaling_laws.huber(delta), delta * mean * n, n)
    assert found == pytest.approx(laplace, rel=1e-4)  # delta over the scale is 1e-5


def test_a_law_without_the_needed_term_loses_the_comparison(runs, fit):
    law = scaling_laws.Law(
        name="size only",
        formula="L = E + A N^-alpha",
        inputs=("N",),
        parameters=(
            scaling_laws.floor("E"),
            scaling_laws.coefficient("A", of={"N": "-alpha"}),
            scaling_laws.exponent("alpha"),
        ),
        predict=lambda p, x: p["E"] + p["A"] * scaling_laws.power(x["N"], -p["alpha"]),
    )
    poor = scaling_laws.fit(law, runs, starts=16, bootstrap=0)
    best, worst = scaling_laws.compare([poor, fit])
    assert (best.law, worst.law) == ("chinchilla", "size only")
    assert best.bic - best.aic == pytest.approx(6 * (math.log(36) - 2))  # five and the scale
    other = _fit(runs, objective=scaling_laws.squares())
    with pytest.raises(ValueError, match="under one objective"):
        scaling_laws.compare([fit, other])
    with pytest.raises(ValueError, match="at least one"):
        scaling_laws.compare([])


def test_runs_are_a_mapping_or_have_one(runs):
    expected = _fit(runs).coefficients
    assert _fit(types.SimpleNamespace(columns=runs)).coefficients == expected
    pandas = pytest.importorskip("pandas")
    assert _fit(pandas.DataFrame(runs)).coefficients == expected
    with pytest.raises(TypeError, match="got list"):
        _fit([1, 2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": None}, ValueError, "no column 'loss'; there are: N, D"),
        ({"loss": np.full(36, np.nan)}, ValueError, "'loss' must be finite, got nan in row 0"),
        ({"loss": np.zeros(36)}, ValueError, "'loss' must be positive, got 0.0"),
        ({"N": np.ones((36, 1))}, ValueError, "'N' must be a list of numbers"),
        ({"N": np.ones(35)}, ValueError, "'N' has 35 rows, 'loss' 36"),
        ({"D": np.array(["1"] * 36)}, ValueError, "'D' must be a list of numbers"),
        ({"N_rule": ["body"] * 35 + ["total"]}, scaling_laws.MixedRuns, "got body, total"),
    ],
)
def test_bad_columns_are_refused_by_name(runs, change, error, message):
    changed = {k: v for k, v in {**runs, **change}.items() if v is not None}
    with pytest.raises(error, match=message):
        _fit(changed)


def test_runs_that_cannot_tell_the_exponents_apart_are_refused(runs):
    line = {**runs, "D": 20 * runs["N"]}
    with pytest.raises(scaling_laws.NotSeparable, match="lie on one line in logarithms"):
        _fit(line)
    found = _fit(line, allow=("collinear",))
    assert "the check of collinear was left out" in found.summary()


def test_too_few_runs_are_refused_unless_allowed(runs):
    six = np.isin(np.arange(36), [0, 5, 9, 20, 26, 33]).astype(float)
    with pytest.raises(scaling_laws.TooFewRuns, match="at least 7 runs, got 6"):
        _fit(runs, weights=six)
    found = _fit(runs, weights=six, allow=("few_runs",))
    assert "6 runs leave 1 degrees of freedom" in found.summary()
    assert "(1 d.o.f.)" in found.summary()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": -np.ones(36)}, "weights must be 36 finite numbers not below 0"),
        ({"weights": np.ones(3)}, "got shape"),
        ({"weights": "w"}, "no column 'w'"),
        ({"fixed": {"gamma": 1.0}}, "got 'gamma'"),
        ({"fixed": {"A": -1.0}}, "A can be fixed at a positive and finite value, got -1.0"),
        ({"starts": 0}, "starts must be an int of at least 1, got 0"),
        ({"starts": {"A": [1.0]}}, "chinchilla needs A, B, E, alpha, beta, got A"),
        ({"bootstrap": -1}, "bootstrap must be an int of at least 0"),
        ({"bootstrap": 5, "resample": "run"}, "resample must be 'rows' or a column"),
        ({"allow": ("anything",)}, "few_runs, collinear, mixed, got 'anything'"),
    ],
)
def test_bad_arguments_are_refused_by_name(runs, options, message):
    with pytest.raises(ValueError, match=message):
        _fit(runs, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scaling_laws.huber(0.0), r"delta must be in \(0, inf\), got 0.0"),
        (lambda: scaling_laws.squares(space="sqrt"), "'log', 'linear', got 'sqrt'"),
        (lambda: scaling_laws.quantile(1.0), r"q must be in \(0, 1\), got 1.0"),
        (lambda: scaling_laws.exponent("a", start=(1, 0)), r"start of a .* got \(1, 0\)"),
        (lambda: scaling_laws.exponent("a", bounds=(1, 1)), r"bounds of a must rise"),
        (lambda: scaling_laws.coefficient("A", start=(0, 1)), "positive numbers"),
    ],
)
def test_bad_objectives_and_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_law_is_checked_when_it_is_made():
    floor, a = scaling_laws.floor("E"), scaling_laws.coefficient("A", of={"N": "-alpha"})
    law = lambda *parameters, **more: scaling_laws.Law(
        "x", "", ("N",), parameters, lambda p, x: p["E"], **more
    )
    with pytest.raises(ValueError, match="different names"):
        law(floor, floor)
    with pytest.raises(ValueError, match="got 'N': '-alpha'"):
        law(floor, a)
    preset = scaling_laws.Preset({"A": 1.0}, "nobody")
    with pytest.raises(ValueError, match="preset 'p' of x must give E, got A"):
        law(floor, presets={"p": preset})


def test_every_preset_of_every_law_has_a_source():
    for name, law in scaling_laws.laws.registry().items():
        assert name == law.name
        assert all(preset.source for preset in law.presets.values())
