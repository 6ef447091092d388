"""Repeated data: published values, limits, and the best size under a fixed amount of data."""

import numpy as np
import pytest

from jaxopt_suite.scaling_laws import frontier, laws
from jaxopt_suite.scaling_laws.double import in_double

LAW = laws.DataConstrained
VALUES = LAW.presets["muennighoff"].values
predict = in_double(LAW.predict)


def _loss(n, d, u):
    one = lambda v: np.array([v], np.float64)
    return float(predict(VALUES, {"N": one(n), "D": one(d), "U": one(u)})[0])


def test_the_losses_of_the_authors_two_models():
    assert _loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256441, abs=1e-7)
    assert _loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634, abs=1e-7)


def test_one_pass_with_a_small_model_is_the_chinchilla_law():
    n, d = np.array([1e8, 1e9]), np.array([1e11, 1e11])
    base = laws.data_constrained.base(VALUES)
    plain = in_double(laws.Chinchilla.predict)(base, {"N": n, "D": d})
    np.testing.assert_allclose(predict(VALUES, {"N": n, "D": d, "U": d}), plain, rtol=1e-12)


def test_unused_tokens_do_not_help():
    """With 1e12 unique tokens and 1e10 seen, only those are unique data; 1e7 is a small model."""
    assert _loss(1e7, 1e10, 1e12) == pytest.approx(_loss(1e7, 1e10, 1e10), rel=1e-12)


def test_repeating_forever_is_worth_r_d_further_passes():
    effective = in_double(laws.data_constrained.effective)
    _, d = effective(VALUES, {"N": np.array([1e7]), "D": np.array([1e15]), "U": np.array([1e9])})
    assert float(d[0]) == pytest.approx(1e9 * (1 + VALUES["R_D"]), rel=1e-9)


def test_the_matching_size_is_chinchillas_for_as_much_data():
    matching = float(laws.data_constrained.matching_size(VALUES, np.float64(25e9)))
    n, d = laws.Chinchilla.optimum(laws.data_constrained.base(VALUES), 6 * matching * 25e9)
    assert float(n) == pytest.approx(matching, rel=1e-5)  # the helper is in float32 here
    assert float(d) == pytest.approx(25e9, rel=1e-5)


def test_the_best_size_under_fixed_data_beats_its_neighbours_and_is_smaller_than_without_limit():
    flops, unique = np.array([1e22]), 25e9
    n, d = frontier.optimum(LAW, VALUES, flops, None, {"U": unique})
    best = _loss(n[0], d[0], unique)
    for factor in (0.97, 1.03):
        assert _loss(factor * n[0], d[0] / factor, unique) > best
    free, _ = laws.Chinchilla.optimum(laws.data_constrained.base(VALUES), flops)
    assert n[0] < free[0]
