"""Over-training: two ways to write the law, its optimum, and errors fed from losses."""

import numpy as np

from jaxopt_suite.scaling_laws import laws
from jaxopt_suite.scaling_laws.double import in_double

LAW = laws.OverTraining
VALUES = LAW.presets["gadre_rpj"].values
ERROR = laws.DownstreamError.presets["gadre_46_tasks"].values


def test_the_form_in_compute_and_tokens_per_parameter_and_that_of_the_released_code():
    n, d = np.array([1.1e7, 1.4e9]), np.array([3.5e9, 2.8e10])
    m, c, eta = d / n, 6 * n * d, 0.27285 / 2
    ours = in_double(LAW.predict)(VALUES, {"N": n, "D": d})
    a, b = VALUES["a"], VALUES["b"]
    np.testing.assert_allclose(ours, 1.83665 + (a * m**eta + b * m**-eta) * c**-eta, rtol=1e-12)
    kappa = -0.27285
    released = 166.21 * n**kappa + 366.69 * 6 ** (kappa / 2) * (m * n) ** kappa + 1.83665
    np.testing.assert_allclose(ours, released, rtol=1e-12)


def test_the_optimum_has_equal_terms_and_spends_the_budget():
    n, d = LAW.optimum(VALUES, np.array([1e20, 1e23]))
    np.testing.assert_allclose(6 * n * d, [1e20, 1e23], rtol=1e-12)
    np.testing.assert_allclose(VALUES["a"] * n**-0.27285, VALUES["b"] * d**-0.27285, rtol=1e-12)
    near = [in_double(LAW.predict)(VALUES, {"N": f * n, "D": d / f}) for f in (0.9, 1.0, 1.1)]
    assert (np.asarray(near[1]) < np.minimum(near[0], near[2])).all()


def test_errors_are_fed_from_losses_alone_and_with_draws_of_both():
    n, d = np.array([1e8, 1e9]), np.array([2e9, 2e10])
    loss = np.asarray(in_double(LAW.predict)(VALUES, {"N": n, "D": d}))
    expected = 0.7608 - 1.3229 * np.exp(-0.8907 * loss)
    alone = laws.overtraining.downstream_error(VALUES, ERROR, n, d)
    np.testing.assert_allclose(alone, expected, rtol=1e-12)
    drawn = {k: np.array([v, 1.01 * v, v]) for k, v in VALUES.items()}
    errors = {k: np.array([v, v, 0.9 * v]) for k, v in ERROR.items()}
    many = laws.overtraining.downstream_error(drawn, errors, n, d)
    assert many.shape == (3, 2)
    np.testing.assert_allclose(many[0], expected, rtol=1e-12)
    one = {k: v[2] for k, v in errors.items()}
    again = laws.overtraining.downstream_error(VALUES, one, n, d)
    np.testing.assert_allclose(many[2], again, rtol=1e-12)
    only_loss = laws.overtraining.downstream_error(drawn, ERROR, n, d)
    np.testing.assert_allclose(only_loss[1], many[1], rtol=1e-12)
