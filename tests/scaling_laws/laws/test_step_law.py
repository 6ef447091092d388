"""Step Law: stored fits, a refit of the released runs, and what its settings lose in them."""

import numpy as np
import pytest

from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import laws
from jaxopt_suite.scaling_laws.refusals import NoInteriorOptimum

STEP = laws.step_law


@pytest.fixture(scope="module")
def dense(public_columns):
    column = public_columns("steplaw_dense.csv")
    runs = {"N": column("N"), "D": column("D"), "lr": column("lr"), "loss": column("smooth loss")}
    runs["batch_tokens"] = 2048 * column("bs")
    runs["cell"] = np.unique(runs["N"] * 1e3 + runs["D"] / 1e9, return_inverse=True)[1]
    return runs


def test_the_mean_of_the_stored_fits(public_columns):
    column = public_columns("steplaw_fits.csv")
    rate = laws.StepLawRate.presets["step_law_stored"].values
    batch = laws.StepLawBatch.presets["step_law_stored"].values
    assert np.exp(column("lr_intercept").mean()) == pytest.approx(rate["c"], rel=1e-3)
    assert np.exp(column("bs_intercept").mean()) == pytest.approx(batch["d"], rel=1e-3)
    for name, value in (("lr_coefN", "p"), ("lr_coefD", "q")):
        assert column(name).mean() == pytest.approx(rate[value], rel=1e-3)
    assert column("bs_coefD").mean() == pytest.approx(batch["r"], rel=1e-3)


def test_the_released_runs_give_other_coefficients(dense):
    keep = STEP.near_best(dense["loss"], dense["cell"])
    runs = {name: values[keep] for name, values in dense.items()}
    assert keep.sum() == 129
    options = {"objective": scaling_laws.squares(), "starts": 8, "bootstrap": 0}
    rate = scaling_laws.fit(laws.StepLawRate, runs, **options).coefficients
    batch = scaling_laws.fit(laws.StepLawBatch, runs, **options).coefficients
    assert rate["c"] == pytest.approx(77.7, rel=5e-3)
    assert rate["p"] == pytest.approx(-0.766, rel=5e-3)
    assert rate["q"] == pytest.approx(0.197, rel=5e-3)
    assert batch["d"] == pytest.approx(0.209, rel=5e-3)
    assert batch["r"] == pytest.approx(0.613, rel=5e-3)


def test_its_settings_lose_little_in_the_released_cells(dense):
    excess = []
    for cell in range(17):
        at = dense["cell"] == cell
        rates, batches, losses = (dense[k][at] for k in ("lr", "batch_tokens", "loss"))
        rate, batch = STEP.settings(dense["N"][at][0], dense["D"][at][0])
        excess.append(100 * STEP.excess_loss(rates, batches, losses, (rate, batch)))
    assert np.mean(excess) == pytest.approx(0.126, abs=0.02)  # percent; of another interpolation
    assert np.max(excess) == pytest.approx(0.244, abs=0.02)


def test_settings_are_the_printed_formulas():
    rate, batch = STEP.settings(1e9, 1e11)
    assert rate == pytest.approx(1.79 * 1e9**-0.713 * 1e11**0.307)
    assert batch == pytest.approx(0.58 * 1e11**0.571)


def test_excess_is_interpolated_in_logarithms_and_exact_for_a_plane():
    rates, batches = (g.ravel() for g in np.meshgrid([1e-3, 2e-3, 4e-3], [128, 256, 512]))
    losses = 2 + 0.1 * np.log(rates / 1e-3) + 0.05 * np.log(batches / 128)
    at = (3e-3, 300.0)
    expected = (2 + 0.1 * np.log(3) + 0.05 * np.log(300 / 128)) / 2 - 1
    assert STEP.excess_loss(rates, batches, losses, at) == pytest.approx(expected)
    keep = ~((rates == 4e-3) & (batches == 512))  # one of the four around it
    found = STEP.excess_loss(rates[keep], batches[keep], losses[keep], at)
    assert found == pytest.approx(expected)
    assert STEP.excess_loss(rates, batches, losses, (1e-3, 128)) == pytest.approx(0, abs=1e-12)


def test_settings_outside_the_grid_or_beside_holes_are_refused():
    rates, batches = (g.ravel() for g in np.meshgrid([1e-3, 2e-3], [128, 256]))
    losses = np.array([2.0, 2.1, 2.2, 2.3])
    with pytest.raises(NoInteriorOptimum, match="outside the grid"):
        STEP.excess_loss(rates, batches, losses, (3e-3, 200))
    with pytest.raises(NoInteriorOptimum, match="fewer than three"):
        STEP.excess_loss(rates[[0, 3]], batches[[0, 3]], losses[[0, 3]], (1.5e-3, 200))


def test_near_best_is_per_cell_and_relative():
    found = STEP.near_best([2.0, 2.004, 2.006, 4.0, 4.009], [0, 0, 0, 1, 1])
    np.testing.assert_array_equal(found, [True, True, False, True, True])
