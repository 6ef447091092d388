"""Fine-tuning curves: limits of the law, its phases, and accepting points until one is off."""

import numpy as np
import pytest

from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import laws
from jaxopt_suite.scaling_laws.double import in_double

LAW = laws.Rectified
RECTIFIED = laws.rectified
VALUES = {"K": 800.0, "D_l": 300.0, "beta": 0.7, "E": 1.2}
SIZES = np.concatenate([[0.0], 200 * 2.0 ** np.arange(14)])


def _curve(values, sizes=SIZES):
    return np.asarray(in_double(LAW.predict)(values, {"D": sizes}))


def test_no_samples_give_the_loss_of_the_pretrained_model_and_many_the_floor():
    found = _curve(VALUES, np.array([0.0, 1e30]))
    np.testing.assert_allclose(found, [800 / 300 + 1.2, 1.2], rtol=1e-12)
    assert _curve(VALUES, np.array([1e4]))[0] == pytest.approx(800 / (300 + 1e4**0.7) + 1.2)


def test_a_curve_with_the_row_of_no_samples_is_recovered_from_the_papers_starts():
    losses = _curve(VALUES)
    starts = RECTIFIED.starts(SIZES, losses)
    assert len(starts["K"]) == 48
    fit = scaling_laws.fit(LAW, {"D": SIZES, "loss": losses}, starts=starts, bootstrap=0)
    for name, value in VALUES.items():
        assert fit.coefficients[name] == pytest.approx(value, rel=1e-8), name
    assert RECTIFIED.phase(fit.coefficients, SIZES) == "power"


def test_a_curve_that_has_not_reached_its_power_law_says_so():
    corner = VALUES["D_l"] ** (1 / VALUES["beta"])
    assert RECTIFIED.phase(VALUES, [0.5 * corner]) == "pre-power only"
    assert RECTIFIED.phase(VALUES, [0.5 * corner, 2 * corner]) == "power"


def test_accept_then_stop_takes_a_power_law_whole_and_extrapolates_it():
    sizes = 100 * 2.0 ** np.arange(8)
    noise = 1 + 1e-4 * np.array([1, -1, 1, -1, 1, -1, 1, -1])
    found = RECTIFIED.accept_then_stop(sizes, 5 * sizes**-0.2 * noise, 1e6)
    assert found.used == 8
    assert found.slope == pytest.approx(-0.2, abs=1e-3)
    assert found.loss == pytest.approx(5 * 1e6**-0.2, rel=1e-3)


def test_accept_then_stop_stops_at_the_first_phase():
    """Four points on a line, then three flat ones: the fit is that of the four alone."""
    sizes = 100 * 2.0 ** np.arange(7)
    losses = 5 * sizes**-0.2
    losses[3:] *= 1 + 1e-4 * np.array([-1, 1, -1, 1])
    losses[:3] = losses[3]
    found = RECTIFIED.accept_then_stop(sizes, losses, 1e6)
    line = np.polyfit(np.log(sizes[3:]), np.log(losses[3:]), 1)
    assert found.used == 4
    assert found.slope == pytest.approx(line[0], rel=1e-9)
    assert found.loss == pytest.approx(np.exp(np.polyval(line, np.log(1e6))), rel=1e-9)


def test_models_are_ranked_by_what_they_will_reach_not_by_what_they_have():
    sizes = 100 * 2.0 ** np.arange(6)
    curves = {"early": (sizes, 2 * sizes**-0.05), "late": (sizes, 5 * sizes**-0.15)}
    assert curves["late"][1][-1] > curves["early"][1][-1]
    assert [name for name, _ in RECTIFIED.rank_models(curves, 1e6)] == ["late", "early"]


def test_bad_curves_are_refused():
    with pytest.raises(scaling_laws.TooFewRuns, match="needs 3 sizes, got 2"):
        RECTIFIED.accept_then_stop([1, 2], [1, 2], 10)
    with pytest.raises(ValueError, match="positive"):
        RECTIFIED.accept_then_stop([0, 1, 2], [1, 2, 3], 10)
    with pytest.raises(ValueError, match="first"):
        RECTIFIED.accept_then_stop([1, 2, 3], [1, 2, 3], 10, first=2)
    with pytest.raises(ValueError, match=r"must be \[n\]"):
        RECTIFIED.starts([1, 2], [1])
