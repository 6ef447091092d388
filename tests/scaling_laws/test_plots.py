"""Pictures: every panel draws what the fit says."""

import numpy as np
import pytest

from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import plots

LAW = scaling_laws.laws.Chinchilla


@pytest.fixture(scope="module")
def runs(noisy_runs):
    return noisy_runs


@pytest.fixture(scope="module")
def fit(runs):
    return scaling_laws.fit(LAW, runs, starts=16, bootstrap=50)


def _line(axes, label):
    return next(line for line in axes.lines if line.get_label() == label)


def test_the_panels_show_the_runs_the_frontier_and_the_residuals(fit):
    figure = fit.plot()
    against_n, _, surface, frontier, residuals, beyond = figure.axes
    np.testing.assert_array_equal(against_n.collections[0].get_offsets()[:, 1], fit.table.observed)
    best = _line(frontier, "N*")
    expected = fit.compute_optimal(best.get_xdata()).n
    np.testing.assert_allclose(best.get_ydata(), expected, rtol=1e-12)
    assert best.get_xdata()[-1] == pytest.approx(100 * np.max(6 * _product(fit)))
    np.testing.assert_array_equal(residuals.lines[1].get_ydata(), fit.residuals)
    assert len(frontier.collections) == 2  # the two bands
    assert len(beyond.collections) == 1
    assert surface.get_xscale() == "log"
    assert all(axes.get_xlabel() for axes in figure.axes)


def _product(fit):
    return fit.table.inputs["N"] * fit.table.inputs["D"]


def test_a_fit_without_resamples_has_no_bands(runs):
    figure = scaling_laws.fit(LAW, runs, starts=16, bootstrap=0).plot()
    assert len(figure.axes[3].collections) == 0


def test_a_law_of_other_inputs_gets_residuals_against_each(runs):
    law = scaling_laws.Law(
        name="compute",
        formula="L = E + A C^-alpha",
        inputs=("C",),
        parameters=(
            scaling_laws.floor("E"),
            scaling_laws.coefficient("A", of={"C": "-alpha"}),
            scaling_laws.exponent("alpha"),
        ),
        predict=lambda p, x: p["E"] + p["A"] * scaling_laws.power(x["C"], -p["alpha"]),
    )
    given = {"C": 6 * runs["N"] * runs["D"], "loss": runs["loss"]}
    figure = scaling_laws.fit(law, given, starts=16, bootstrap=0).plot()
    assert [axes.get_xlabel() for axes in figure.axes] == ["loss, observed", "C"]


def test_slices_are_drawn_with_their_minima():
    budgets = np.geomspace(1e18, 1e20, 3)
    c = np.repeat(budgets, 7)
    n = np.sqrt(c / 120) * np.tile(np.geomspace(1 / 6, 6, 7), 3)
    loss = 1.7 + 400 * n**-0.34 + 410 * (c / 6 / n) ** -0.28
    found = scaling_laws.isoflop({"N": n, "C": c, "loss": loss}, noise=1e-3, draws=20)
    left, right = plots.plot_isoflop(found).axes
    minima = [line.get_xdata()[0] for line in left.lines if line.get_marker() == "v"]
    assert minima == pytest.approx([one.n for one in found.slices])
    assert right.get_xlabel() == "compute, FLOP"
