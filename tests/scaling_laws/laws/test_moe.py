"""Joint law of mixtures of experts: the paper's tables, and budgets against plain search."""

import numpy as np
import pytest

from jaxopt_suite.scaling_laws import laws
from jaxopt_suite.scaling_laws.refusals import NoInteriorOptimum

VALUES = laws.moe.VALUES
BUDGETS = laws.moe_budgets
# Table 4: m, |mu|, n, |nu| for each number of experts.
REDUCED = {
    1: (30.364, 0.1817, 53.984, 0.1965),
    2: (27.798, 0.1780, 66.840, 0.2065),
    4: (24.846, 0.1731, 87.702, 0.2192),
    8: (21.833, 0.1676, 119.913, 0.2338),
    16: (19.016, 0.1617, 167.507, 0.2494),
    32: (16.542, 0.1557, 234.673, 0.2652),
}


def test_one_expert_has_the_effective_number_e_start():
    found = float(laws.moe.effective_experts(VALUES, 1.0))
    assert found == pytest.approx(VALUES["E_start"], rel=1e-6)  # float32 outside a fit
    assert float(laws.moe.effective_experts(VALUES, 1e9)) == pytest.approx(290.4521, rel=1e-5)


@pytest.mark.parametrize("experts", list(REDUCED))
def test_the_reduced_coefficients_of_table_4(experts):
    found = [float(v) for v in laws.moe.reduced(VALUES, float(experts))]
    np.testing.assert_allclose(found, REDUCED[experts], rtol=0.01)  # table 3 is rounded
    if experts == 1:  # recomputed from the rounded table 3
        np.testing.assert_allclose(found, (30.40, 0.1818, 53.84, 0.1964), rtol=0.005)


def test_the_optimum_uses_magnitudes_of_exponents():
    """The printed formula with signed ones would give 5e10 parameters."""
    n, d = BUDGETS.optimum(1e20, np.array([1, 32]))
    np.testing.assert_allclose(n, [1.73e9, 6.74e8], rtol=0.005)
    np.testing.assert_allclose(d, [9.65e9, 2.47e10], rtol=0.005)


@pytest.mark.parametrize(
    ("flops", "experts", "n", "d"),
    [
        (1e20, 1, 1.7e9, 9.7e9),
        (1e20, 32, 6.69e8, 2.49e10),
        (1e21, 1, 5.7e9, 2.93e10),
        (1e21, 32, 2.85e9, 5.84e10),
        (1e22, 1, 1.88e10, 8.86e10),
        (1e22, 32, 1.22e10, 1.369e11),
    ],
)
def test_the_allocations_of_the_paper(flops, experts, n, d):
    found = BUDGETS.optimum(flops, experts)
    np.testing.assert_allclose(found, (n, d), rtol=0.02)  # printed to two or three digits


def test_without_limits_the_search_finds_the_closed_optimum():
    found = BUDGETS.best_mixture(1e20, experts=[4])
    n, d = BUDGETS.optimum(1e20, 4)
    assert found.n == pytest.approx(float(n), rel=1e-4)
    assert found.d == pytest.approx(float(d), rel=1e-4)
    assert not found.limited
    assert not found.extrapolated


def test_memory_holds_parameters_and_cache_and_prefers_fewer_experts():
    """The paper's choice at 1e22 FLOPs: 4, 16 and 32 experts in 24, 80 and 640 GB."""
    best = [
        BUDGETS.best_mixture(1e22, memory=gigabytes * 1e9, cache=16384)
        for gigabytes in (24, 80, 640)
    ]
    assert [mixture.experts for mixture in best] == [4, 16, 32]
    small = best[0]
    layers = small.width / 64
    bytes_used = 2 * (small.n_total + 2 * 16384 * layers * small.width)
    assert bytes_used == pytest.approx(24e9, rel=1e-6)
    assert small.limited
    tables = 2 * 50257 * small.width
    assert small.n_total == pytest.approx(tables + 40 * layers * small.width**2, rel=1e-12)
    assert small.n == pytest.approx(tables + 13 * layers * small.width**2, rel=1e-12)


def test_inference_takes_its_share_of_the_budget_and_makes_models_smaller():
    plain = BUDGETS.best_mixture(1e21, experts=[8])
    served = BUDGETS.best_mixture(1e21, experts=[8], inference=1e12)
    assert 6 * served.n * served.d + 2 * served.n * 1e12 == pytest.approx(1e21, rel=1e-9)
    assert served.n < plain.n
    assert served.loss > plain.loss


def test_a_budget_that_nothing_fits_is_refused():
    with pytest.raises(NoInteriorOptimum, match="fits in 1e\\+06 bytes"):
        BUDGETS.best_mixture(1e20, memory=1e6)
    with pytest.raises(ValueError, match="flops must be in"):
        BUDGETS.best_mixture(0.0)
    with pytest.raises(ValueError, match="experts must be"):
        BUDGETS.best_mixture(1e20, experts=[])
