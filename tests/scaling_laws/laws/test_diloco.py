"""Local updates: published predictions, Student's intervals, and the communication model."""

import numpy as np
import pytest
from scipy import stats

from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import laws
from jaxopt_suite.scaling_laws.double import in_double

COMMUNICATION = laws.communication
SIZES = np.array([35e6, 90e6, 180e6, 335e6, 550e6, 1.3e9, 2.4e9])


def test_the_joint_law_agrees_with_that_of_each_number_of_replicas_at_the_sizes_fitted():
    """Both fit the same losses; the paper has the two off by about 0.012 in the logarithm."""
    joint, keys = laws.DiLoCoLoss.presets["charles"].values, laws.DiLoCoLossAlone.presets
    for m, key in ((1, "one_replica"), (2, "two_replicas"), (4, "four_replicas")):
        alone = in_double(laws.DiLoCoLossAlone.predict)(keys[key].values, {"N": SIZES})
        both = in_double(laws.DiLoCoLoss.predict)(joint, {"N": SIZES, "M": np.full(7, m * 1.0)})
        np.testing.assert_allclose(both, alone, rtol=0.012)


def test_the_data_parallel_losses_of_an_early_version():
    """Read from a transcription: 3.485 at 35M to 2.326 at 2.4B; the line is within 2 %."""
    losses = np.array([3.485, 3.167, 2.950, 2.784, 2.653, 2.460, 2.326])
    values = laws.DiLoCoLossAlone.presets["data_parallel"].values
    found = in_double(laws.DiLoCoLossAlone.predict)(values, {"N": SIZES})
    np.testing.assert_allclose(found, losses, rtol=0.02)


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


def test_a_group_has_its_own_level_and_slope():
    values = {"A": 18.0, "alpha": -0.095, "shift": 0.02, "slope": 0.01}
    inputs = {"N": np.array([1e8, 1e8]), "local": np.array([0.0, 1.0])}
    found = in_double(laws.LocalSteps.predict)(values, inputs)
    expected = [18 * 1e8**-0.095, 18 * np.exp(0.02) * 1e8**-0.085]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


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
