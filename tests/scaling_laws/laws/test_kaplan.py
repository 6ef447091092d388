"""The identities and worked figures of Kaplan et al. (2020)."""

import numpy as np
import pytest

from jaxopt_suite.scaling_laws import laws
from jaxopt_suite.scaling_laws.double import in_double

KAPLAN = laws.kaplan
PF_DAY = KAPLAN.PF_DAY


def test_the_example_of_ten_petaflop_days():
    """The paper's: 7.0e9 parameters, a loss of 2.37, a critical batch of 3.4 to 3.5 million."""
    found = KAPLAN.allocation(10 * PF_DAY)
    assert found.n == pytest.approx(7.0e9, rel=0.01)
    values = laws.KaplanCompute.presets["kaplan_min"].values
    loss = float(in_double(laws.KaplanCompute.predict)(values, {"C": np.array(10 * PF_DAY)}))
    assert loss == pytest.approx(2.37, abs=0.005)
    assert 3.4e6 <= KAPLAN.critical_batch(loss) <= 3.5e6


def test_the_joint_law_tends_to_the_law_of_size_with_unlimited_data():
    values = laws.Kaplan.presets["kaplan"].values
    loss = in_double(laws.Kaplan.predict)(values, {"N": np.array([1e9]), "D": np.array([1e30])})
    assert float(loss[0]) == pytest.approx((6.4e13 / 1e9) ** 0.076, rel=1e-9)


def test_overfitting_is_the_joint_law_over_its_limit():
    values = laws.Kaplan.presets["kaplan"].values
    inputs = {"N": np.array([3e8, 3e8]), "D": np.array([1e9, 1e30])}
    some, unlimited = in_double(laws.Kaplan.predict)(values, inputs)
    assert KAPLAN.overfitting(3e8, 1e9) == pytest.approx(float(some / unlimited) - 1, rel=1e-9)


def test_two_percent_of_overfitting_needs_the_data_of_the_papers_rule():
    """D = 5e3 N^0.74 for 0.02; with its rounded factor the law gives 0.021."""
    n = np.array([1e7, 1e9, 1e11])
    np.testing.assert_allclose(KAPLAN.overfitting(n, 5e3 * n**0.74), 0.021, atol=0.002)


def test_at_the_critical_batch_steps_and_compute_are_twice_their_minima():
    batch = KAPLAN.critical_batch(3.0)
    assert KAPLAN.minimum_steps(1e4, batch, 3.0) == pytest.approx(5e3)
    assert KAPLAN.minimum_compute(1e20, batch, 3.0) == pytest.approx(5e19)
    # A large batch wastes compute and few steps, a small one the other way round.
    assert KAPLAN.minimum_steps(1e4, 1e3 * batch, 3.0) == pytest.approx(1e4, rel=2e-3)
    assert KAPLAN.minimum_compute(1e20, 1e-3 * batch, 3.0) == pytest.approx(1e20, rel=2e-3)


def test_the_exponent_of_compute_is_the_harmonic_sum_of_the_others():
    assert KAPLAN.compute_exponent() == pytest.approx(0.0524, abs=1e-4)
    small, large = (KAPLAN.optimal_allocation(c * PF_DAY) for c in (1e-3, 1e3))
    assert np.log(large.n / small.n) / np.log(1e6) == pytest.approx(
        KAPLAN.compute_exponent() / 0.077, rel=1e-9
    )


def test_the_closed_allocation_is_the_best_of_a_search():
    """Minimises L(N, S_min) over N under C = 6 N B_crit(L) S_min, the root in L by bisection."""
    flops, steps = PF_DAY, KAPLAN.STEPS
    log_n = np.linspace(np.log(1e7), np.log(1e11), 40001)
    size = (steps["N_c"] / np.exp(log_n)) ** steps["alpha_N"]
    low, high = size.copy(), np.full_like(size, 50.0)
    for _ in range(100):
        loss = 0.5 * (low + high)
        count = flops / (6 * np.exp(log_n) * KAPLAN.critical_batch(loss))
        above = size + (steps["S_c"] / count) ** steps["alpha_S"] > loss
        low, high = np.where(above, loss, low), np.where(above, high, loss)
    found = KAPLAN.optimal_allocation(flops)
    assert found.n == pytest.approx(np.exp(log_n[np.argmin(loss)]), rel=1e-3)
    best = (steps["N_c"] / found.n) ** 0.077 * (1 + 0.077 / 0.76)
    assert best == pytest.approx(loss.min(), rel=1e-8)
    assert 6 * found.n * found.batch_tokens * found.steps == pytest.approx(flops, rel=1e-12)


def test_the_least_stopping_step_is_where_the_learning_curve_meets_the_overfitted_loss():
    n, d = 1e8, 1e9
    excess = (6.4e13 / n) ** 0.076 * KAPLAN.overfitting(n, d)
    assert (2.1e3 / KAPLAN.least_stopping_step(n, d)) ** 0.76 == pytest.approx(excess)
