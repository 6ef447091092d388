"""Local updates: published predictions, Student's intervals, and the communication model."""

import numpy as np
import pytest
from scipy import stats

from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import laws
from jaxopt_suite.scaling_laws.double import in_double

COMMUNICATION = laws.communication
SIZES = np.array([35e6, 90e6, 180e6, 335e6, 550e6, 1.3e9, 2.4e9])


def test_the_extrapolated_losses_of_the_paper():
    """4 and 10 billion parameters; three digits of the exponent leave a few units of the last."""
    n = np.array([4e9, 10e9])
    alone = laws.DiLoCoLossAlone.presets["data_parallel"].values
    found = in_double(laws.DiLoCoLossAlone.predict)(alone, {"N": n})
    np.testing.assert_allclose(found, [2.224, 2.090], rtol=6e-3)
    joint = laws.DiLoCoLoss.presets["charles"].values
    for m, expected in ((1, (2.219, 2.086)), (2, (2.220, 2.086)), (4, (2.230, 2.096))):
        found = in_double(laws.DiLoCoLoss.predict)(joint, {"N": n, "M": np.full(2, float(m))})
        np.testing.assert_allclose(found, expected, rtol=0.02)


def test_profile_intervals_of_a_line_are_students():
    """Seven sizes and two coefficients: ordinary least squares in logs on 5 degrees of freedom."""
    noise = 0.01 * np.random.default_rng(0).standard_normal(7)
    loss = 18.129 * SIZES**-0.0953 * np.exp(noise)
    fit = scaling_laws.fit(
        laws.DiLoCoLossAlone,
        {"N": SIZES, "loss": loss},
        objective=scaling_laws.squares(),
        starts=4,
        bootstrap=0,
    )
    line = stats.linregress(np.log(SIZES), np.log(loss))
    reach = stats.t.ppf(0.95, 5) * line.stderr
    assert fit.degrees == 5
    assert fit.coefficients["alpha"] == pytest.approx(line.slope, rel=1e-9)
    found = fit.interval("alpha", 0.9, method="profile")
    # The profile is a parabola, read between 41 points by straight lines.
    np.testing.assert_allclose(found, (line.slope - reach, line.slope + reach), rtol=1e-3)


def test_a_difference_of_slopes_is_told_from_one_of_levels():
    n, local = np.tile(SIZES, 2), np.repeat([0.0, 1.0], 7)
    loss = 18 * n**-0.095 * np.where(local == 1, 1.02, 1.0)
    loss *= np.exp(1e-3 * np.random.default_rng(1).standard_normal(14))
    fit = scaling_laws.fit(
        laws.LocalSteps,
        {"N": n, "local": local, "loss": loss},
        objective=scaling_laws.squares(),
        starts=8,
        bootstrap=0,
    )
    low, high = fit.interval("slope", method="profile")
    assert low < 0 < high
    middle = float(np.log(SIZES).mean())
    level = fit.coefficients["shift"] + fit.coefficients["slope"] * middle
    assert level == pytest.approx(np.log(1.02), abs=2e-3)


def test_an_all_reduce_by_hand():
    network = COMMUNICATION.Network(1e9, 0.5)
    assert network.all_reduce(1e9, 4) == pytest.approx(2 * 0.75 + 0.5)
    assert network.all_reduce(1e9, 1) == 0


def test_a_run_by_hand_with_and_without_replicas():
    n, d, batch, chips = 1e9, 2e10, 2e6, 16
    steps, bits = 1e4, 1.6e10
    slow, fast = COMMUNICATION.LOW, COMMUNICATION.HIGH
    plain = COMMUNICATION.training_time(n, d, batch, chips)
    assert plain.compute == pytest.approx(6 * n * d / (16 * 300e12))
    assert plain.communication == pytest.approx(steps * (2 * bits * 15 / 16 / 10e9 + 1e-2))
    local = COMMUNICATION.training_time(n, d, batch, chips, replicas=4, every=30)
    expected = steps * (
        (2 * bits * 0.75 / fast.bandwidth + fast.latency)
        + (2 * bits * 0.75 / slow.bandwidth + slow.latency) / 30
    )
    assert local.communication == pytest.approx(expected)
    assert local.total == pytest.approx(plain.compute + expected)


def test_more_replicas_than_chips_are_refused():
    with pytest.raises(ValueError, match="chips must be at least"):
        COMMUNICATION.training_time(1e9, 1e10, 1e6, 2, replicas=4)
    with pytest.raises(ValueError, match="bandwidth"):
        COMMUNICATION.Network(0.0, 0.0)
