"""Derivatives, objectives and bounds of the solver against hand computation in NumPy."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import coordinates, objectives, starts
from jaxopt_suite.scaling_laws.batch import Batch
from jaxopt_suite.scaling_laws.solver import Rows

CHINCHILLA = scaling_laws.laws.Chinchilla
THETA = np.array([6.0, 6.1, 1.7, 0.34, 0.28])
OBJECTIVES = [
    scaling_laws.huber(0.05),
    scaling_laws.squares(),
    scaling_laws.squares(space="linear"),
    scaling_laws.quantile(0.2, delta=0.03),
]


@pytest.fixture
def batch(grid_runs):
    """Builds a batch for an objective; losses are 10 % off the curve of THETA, by turns."""

    def build(objective):
        a, b, e, alpha, beta = THETA
        curve = e + np.exp(a - alpha * np.log(grid_runs["N"]))
        curve += np.exp(b - beta * np.log(grid_runs["D"]))
        observed = curve * np.exp(0.1 * np.sin(np.arange(36) + 0.5))
        return Batch(
            CHINCHILLA,
            objective,
            Rows(grid_runs, observed),
            coordinates.centring(CHINCHILLA, grid_runs),
            np.linspace(0.5, 1.5, 36),
            *coordinates.box(CHINCHILLA, {}),
        )

    return build


def _value(batch, theta):
    """The objective in plain NumPy."""
    a, b, e, alpha, beta = theta
    x = batch.rows.inputs
    predicted = e + np.exp(a) * x["N"] ** -alpha + np.exp(b) * x["D"] ** -beta
    y, delta, q = batch.rows.observed, batch.objective.delta, batch.objective.q
    r = np.log(predicted / y) if batch.objective.space == "log" else predicted - y
    inside = np.minimum(np.abs(r), delta)
    beyond = np.where(np.abs(r) > delta, np.abs(r) - delta, 0.0)
    linear = np.where(beyond > 0, delta if np.isfinite(delta) else 0.0, 0.0) * beyond
    weight = np.where(r > 0, 2 * (1 - q), 2 * q)
    return float(batch.weights @ (weight * (0.5 * inside**2 + linear)))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_value_gradient_and_hessian_are_those_of_numpy(batch, objective):
    made = batch(objective)
    local = made.view(THETA[None], made.problems(1)).take(0).local
    assert local.value == pytest.approx(_value(made, THETA), rel=1e-12)
    steps = 1e-6 * np.eye(5)
    central = [(_value(made, THETA + s) - _value(made, THETA - s)) / 2e-6 for s in steps]
    # Central differences: step squared times third derivatives of up to (ln D)**3, 20,000.
    np.testing.assert_allclose(local.gradient, central, rtol=1e-6, atol=1e-7)
    ahead = made.view(THETA + steps, made.problems(5)).local.gradient
    behind = made.view(THETA - steps, made.problems(5)).local.gradient
    np.testing.assert_allclose(local.hessian, (ahead - behind) / 2e-6, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_majoriser_touches_the_objective_and_lies_above_it(objective):
    delta, q = objective.delta, objective.q
    with jax.enable_x64(True):
        at = np.array([[-0.4, -0.02, 0.01, 0.3]])
        away = np.linspace(-1, 1, 401)[:, None]
        curve = objectives.majoriser(at, delta, q)
        touching = objectives.rho(at, delta, q) + curve / 2 * (away**2 - at**2)
        same_side = np.sign(away) == np.sign(at)
        assert np.all((touching >= objectives.rho(away, delta, q) - 1e-15) | ~same_side)
        np.testing.assert_allclose(objectives.psi(at, delta, q), curve * at, rtol=1e-15)


def test_least_squares_of_a_line_in_logarithms_is_the_normal_equations(grid_runs):
    law = scaling_laws.Law(
        name="power",
        formula="L = A N^-alpha",
        inputs=("N",),
        parameters=(
            scaling_laws.coefficient("A", of={"N": "-alpha"}),
            scaling_laws.exponent("alpha"),
        ),
        predict=lambda p, x: p["A"] * x["N"] ** -p["alpha"],
    )
    n = grid_runs["N"]
    loss = 30 * n**-0.1 * np.exp(0.03 * np.cos(np.arange(36.0)))
    objective = scaling_laws.squares()
    fit = scaling_laws.fit(law, {"N": n, "loss": loss}, objective=objective, starts=8, bootstrap=0)
    design = np.stack([np.ones(36), -np.log(n)], axis=1)
    expected, squares, *_ = np.linalg.lstsq(design, np.log(loss), rcond=None)
    np.testing.assert_allclose(fit.theta, expected, rtol=1e-9)
    assert fit.certificate.objective == pytest.approx(squares[0] / 2, rel=1e-12)
    # The covariance with leverages, written out.
    residual, inverse = design @ expected - np.log(loss), np.linalg.inv(design.T @ design)
    leverage = np.einsum("ij,jk,ik->i", design, inverse, design)
    meat = (design.T * (residual / (1 - leverage)) ** 2) @ design
    np.testing.assert_allclose(fit.covariance, inverse @ meat @ inverse, rtol=1e-6)
    # The profile of a linear problem is Student's interval.
    error = np.sqrt(squares[0] / 34 * inverse[1, 1])
    reach = 1.6909242551868542 * error  # 95 % point of Student's t, 34 degrees, from a table
    low, high = fit.interval("alpha", 0.9, method="profile")
    np.testing.assert_allclose([low, high], expected[1] + [-reach, reach], rtol=1e-6)


def test_absolute_values_of_a_constant_give_the_median_and_quantiles(grid_runs):
    law = scaling_laws.Law(
        name="constant",
        formula="L = E",
        inputs=("N",),
        parameters=(scaling_laws.floor("E"),),
        predict=lambda p, x: p["E"] + 0 * x["N"],
    )
    loss = np.random.default_rng(0).permutation(np.arange(1.0, 37.0))[:36]
    runs = {"N": grid_runs["N"], "loss": loss}
    fit = lambda objective: scaling_laws.fit(law, runs, objective=objective, starts=4, bootstrap=0)
    assert 18 <= fit(scaling_laws.absolute(space="linear")).coefficients["E"] <= 19
    # A share of 0.26 of 36 runs below: the tenth from below, within the rounding of the corner.
    tenth = fit(scaling_laws.quantile(0.26, space="linear")).coefficients["E"]
    assert tenth == pytest.approx(10, abs=1e-5)


def test_a_floor_that_the_runs_do_not_have_ends_at_its_bound(grid_runs):
    """Losses that fall faster than a power law: the best floor is 0, and that is no convergence."""
    loss = 20 * grid_runs["N"] ** -0.1 + 30 * grid_runs["D"] ** -0.2 - 0.8
    runs = {**grid_runs, "loss": loss}
    fit = scaling_laws.fit(CHINCHILLA, runs, starts=12, bootstrap=0)
    assert fit.coefficients["E"] == 0.0
    assert fit.certificate.status == "bound"
    assert fit.certificate.bounds == ("E",)
    assert not fit.converged
    assert "E is at a bound" in fit.summary()
    assert fit.covariance[2].tolist() == [0.0] * 5
    with pytest.raises(scaling_laws.FitRefused, match="E is held or at a bound"):
        fit.profile("E")


def test_a_parameter_the_runs_do_not_determine_is_named(grid_runs):
    law = scaling_laws.Law(
        name="product",
        formula="L = A B N^-alpha",
        inputs=("N",),
        parameters=(
            scaling_laws.coefficient("A"),
            scaling_laws.coefficient("B"),
            scaling_laws.exponent("alpha"),
        ),
        predict=lambda p, x: p["A"] * p["B"] * scaling_laws.power(x["N"], -p["alpha"]),
    )
    loss = 30 * grid_runs["N"] ** -0.1 * np.exp(0.03 * np.cos(np.arange(36.0)))
    runs = {"N": grid_runs["N"], "loss": loss}
    fit = scaling_laws.fit(law, runs, starts=8, bootstrap=0)
    assert fit.certificate.status == "flat"
    assert fit.certificate.flat == (("A", "B"),)
    assert "do not determine A with B" in fit.summary()


def test_held_parameters_stay_and_the_others_are_fitted(grid_runs):
    loss = 1.7 + 400 * grid_runs["N"] ** -0.34 + 410 * grid_runs["D"] ** -0.28
    runs = {**grid_runs, "loss": loss}
    held = {"E": 1.7, "A": 400.0}
    fit = scaling_laws.fit(CHINCHILLA, runs, fixed=held, starts=12, bootstrap=0)
    assert fit.coefficients["A"] == pytest.approx(400, rel=1e-14)  # exp of a logarithm
    assert fit.coefficients["E"] == 1.7
    assert fit.coefficients["beta"] == pytest.approx(0.28, rel=1e-9)
    assert fit.converged
    assert "held" in fit.summary()


def test_halton_points_are_the_radical_inverses_shifted():
    points = starts.halton(4, 2, seed=0)
    plain = np.array([[1 / 2, 1 / 3], [1 / 4, 2 / 3], [3 / 4, 1 / 9], [1 / 8, 4 / 9]])
    shift = (points - plain) % 1
    np.testing.assert_allclose(shift, np.broadcast_to(shift[0], (4, 2)), atol=1e-15)
    with pytest.raises(ValueError, match="at most 16 parameters, got 17"):
        starts.halton(4, 17, seed=0)


def test_a_grid_is_every_combination():
    grid = scaling_laws.grid(A=[1, 2], alpha=[0.1, 0.2, 0.3])
    assert grid["A"].tolist() == [1, 1, 1, 2, 2, 2]
    assert grid["alpha"].tolist() == [0.1, 0.2, 0.3] * 2


def test_a_centred_coefficient_is_the_size_of_its_term_in_the_middle_of_the_runs(batch):
    made = batch(scaling_laws.squares())
    z = made.centring @ THETA
    middle = np.exp(np.mean(np.log(made.rows.inputs["D"])))
    assert z[1] == pytest.approx(np.log(np.exp(6.1) * middle**-0.28), rel=1e-12)
    np.testing.assert_array_equal(z[2:], THETA[2:])


def test_each_finding_alone_denies_convergence():
    good = scaling_laws.Certificate(1.0, 1e-10, 1e-9, 0.01, 1.0, 0.0, True, 1e3, (), ())
    status = lambda **found: dataclasses.replace(good, **found).status
    assert status() == "converged"
    assert status(gradient=1e-5) == "not a minimum"
    assert status(restart_gain=1e-5) == "not a minimum"
    assert status(curved=False) == "not a minimum"
    assert status(bounds=("E",)) == "bound"
    assert status(flat=(("A", "B"),)) == "flat"
    # Nothing left over: gradients and values are round-off and mean nothing.
    assert status(residual=1e-13, gradient=0.9, restart_gain=0.5) == "converged"
