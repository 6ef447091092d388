"""Pools of data: the recursion by hand, both variants, mixtures, and pools that share a floor."""

import numpy as np
import pytest

from jaxopt_suite.scaling_laws import laws
from jaxopt_suite.scaling_laws.double import in_double

FILTERING = laws.filtering
VALUES = {"a": 0.02, "b": -0.2, "tau": 3.0, "d": 0.1}


def _error(law, samples, pool, values=VALUES):
    inputs = {"samples": np.array([samples]), "pool": np.array([pool])}
    return float(in_double(law.predict)(values, inputs)[0])


def test_both_recursions_at_640_million_samples():
    """0.748 by the paper's, 0.726 by the released code's, which scales the floor too."""
    assert _error(laws.DataFiltering, 640e6, 12.8e6) == pytest.approx(0.748, abs=5e-4)
    assert _error(laws.DataFilteringAsReleased, 640e6, 12.8e6) == pytest.approx(0.726, abs=5e-4)


def test_two_and_a_half_passes_by_hand():
    log_gap = -0.2 * np.log(0.02 * 128)
    log_gap += -0.2 * 2 ** (-1 / 3) * np.log(2)
    log_gap += -0.2 * 2 ** (-2 / 3) * np.log(2.5 / 2)
    assert _error(laws.DataFiltering, 32e6, 12.8e6) == pytest.approx(0.1 + np.exp(log_gap))


def test_within_one_pass_both_are_the_power_law():
    expected = 0.1 + (0.02 * 50) ** -0.2
    for law in (laws.DataFiltering, laws.DataFilteringAsReleased):
        assert _error(law, 5e6, 12.8e6) == pytest.approx(expected)


def test_more_passes_than_are_summed_give_nan_and_as_many_do_not():
    assert np.isfinite(_error(laws.DataFiltering, 64e6, 1e6))
    assert np.isnan(_error(laws.DataFiltering, 64.5e6, 1e6))


def test_a_mixture_of_one_pool_and_of_equal_pools():
    alone = FILTERING.mixture_error([VALUES], np.array([32e6]), 12.8e6, a=0.02, d=0.1)
    assert alone[0] == pytest.approx(_error(laws.DataFiltering, 32e6, 12.8e6))
    twice = FILTERING.mixture_error([VALUES, VALUES], 64e6, 12.8e6, a=0.02, d=0.1)
    doubled = {**VALUES, "tau": 6.0}
    assert float(twice) == pytest.approx(_error(laws.DataFiltering, 64e6, 25.6e6, doubled))


def test_a_mixtures_exponent_is_the_mean_of_the_pools_at_every_pass():
    pools = [{"b": -0.3, "tau": 2.0}, {"b": -0.1, "tau": 8.0}]
    found = float(FILTERING.mixture_error(pools, 60e6, 10e6, a=0.05, d=0.1))
    log_gap = -0.2 * np.log(0.05 * 200)
    for j, ratio in ((2, 2.0), (3, 1.5)):
        decayed = [p["b"] * 2 ** (-(j - 1) / (2 * p["tau"])) for p in pools]
        log_gap += np.mean(decayed) * np.log(ratio)
    assert found == pytest.approx(0.1 + np.exp(log_gap))


def test_pools_that_share_scale_and_floor_have_their_own_use_and_half_life():
    law = FILTERING.pools_law(2)
    values = {"a": 0.02, "d": 0.1, "b_0": -0.2, "b_1": -0.1, "tau_0": 3.0, "tau_1": 6.0}
    inputs = {
        "samples": np.array([32e6, 32e6]),
        "pool": np.array([12.8e6, 6.4e6]),
        "pool_index": np.array([0.0, 1.0]),
    }
    found = in_double(law.predict)(values, inputs)
    second = {"a": 0.02, "d": 0.1, "b": -0.1, "tau": 6.0}
    assert float(found[0]) == pytest.approx(_error(laws.DataFiltering, 32e6, 12.8e6))
    assert float(found[1]) == pytest.approx(_error(laws.DataFiltering, 32e6, 6.4e6, second))


def test_bad_pools_are_refused():
    with pytest.raises(ValueError, match="at least one pool"):
        FILTERING.mixture_error([], 1e6, 1e6, a=1, d=0)
    with pytest.raises(ValueError, match="samples and pool"):
        FILTERING.mixture_error([VALUES], 0, 1e6, a=1, d=0)
    with pytest.raises(ValueError, match="count"):
        FILTERING.pools_law(1)
