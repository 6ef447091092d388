"""Trade-off curves of steps and examples, and the published critical batches."""

import numpy as np
import pytest

from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import laws

CRITICAL = laws.critical_batch
BATCHES = 64 * 2.0 ** np.arange(9)
# Steps to a target loss with these batches, arXiv:2410.21676, in sequences of 512 tokens.
STEPS = {
    85e6: (46000, 23000, 13282, 7000, 3840, 2528, 1917, 1600, 1600),
    151e6: (96000, 49000, 24000, 12000, 7128, 4350, 2940, 2400, 2300),
    302e6: (196000, 90000, 46000, 23400, 13300, 7224, 4980, 3400, 2879),
    604e6: (311000, 166000, 81000, 37440, 21320, 11400, 7199, 4700, 3800),
    1200e6: (642000, 331000, 176000, 94000, 46500, 25000, 15360, 8900, 6500),
}


@pytest.fixture(scope="module")
def curves():
    fits = {}
    for n, steps in STEPS.items():
        runs = {"batch": BATCHES, "steps": np.array(steps)}
        fits[n] = scaling_laws.fit(
            laws.StepsToTarget, runs, objective=scaling_laws.squares(), starts=16, bootstrap=0
        )
    return fits


def test_the_five_published_critical_batches(curves):
    found = [CRITICAL.overhead_batch(fit.coefficients) for fit in curves.values()]
    np.testing.assert_allclose(found, [745.3, 955.2, 1393.7, 1888.5, 2533.4], rtol=1e-3)
    noise_scale = [CRITICAL.critical_batch(fit.coefficients) for fit in curves.values()]
    np.testing.assert_allclose(noise_scale, [2191, 3240, 5433, 7907, 11131], rtol=1e-3)
    assert all(fit.converged for fit in curves.values())


def test_their_trend_in_size_is_the_published_one(curves):
    batches = [CRITICAL.overhead_batch(fit.coefficients) for fit in curves.values()]
    runs = {"N": np.array(list(STEPS)), "critical_batch": np.array(batches)}
    fit = scaling_laws.fit(
        laws.CriticalBatchBySize, runs, objective=scaling_laws.squares(), starts=8, bootstrap=0
    )
    assert fit.coefficients["p"] == pytest.approx(0.46828, rel=1e-3)
    at_million = fit.predict({"N": 1e6})
    assert float(at_million) == pytest.approx(93.197, rel=1e-3)
    published = laws.CriticalBatchBySize.presets["zhang"].values
    assert published["c"] * 1e9 ** published["p"] == pytest.approx(93.20 * 1000**0.47)


def test_the_closed_form_is_where_steps_exceed_linear_scaling_by_theta():
    values = {"S_min": 1500.0, "E_min": 4e6}
    steps = lambda batch: values["S_min"] + values["E_min"] / batch
    for theta in (0.1, 0.2, 0.5):
        at = CRITICAL.overhead_batch(values, theta=theta)
        assert steps(at) == pytest.approx((1 + theta) * steps(256) * 256 / at)


def test_at_the_critical_batch_both_costs_are_twice_their_least():
    values = {"S_min": 1500.0, "E_min": 4e6}
    at = CRITICAL.critical_batch(values)
    steps = values["S_min"] + values["E_min"] / at
    assert steps / 1500 == pytest.approx(2)
    assert steps * at / 4e6 == pytest.approx(2)
    assert (steps / 1500 - 1) * (steps * at / 4e6 - 1) == pytest.approx(1)
    assert CRITICAL.both_sides(values, [64, 1e5])
    assert not CRITICAL.both_sides(values, [64, 256])


def test_draws_go_through_and_bad_arguments_do_not():
    drawn = {"S_min": np.array([1e3, 2e3]), "E_min": np.array([1e6, 1e6])}
    np.testing.assert_allclose(CRITICAL.overhead_batch(drawn), [507.2, 407.2])
    with pytest.raises(ValueError, match="theta"):
        CRITICAL.overhead_batch(drawn, theta=0.0)
