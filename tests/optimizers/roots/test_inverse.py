"""Inverse roots of stacks: against float64, at every scale, padded, broken, and their guards."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import psd_matrices as psd
import pytest

from jaxopt_suite.optimizers import roots
from jaxopt_suite.optimizers.roots.inverse import RootResult

solve = jax.jit(roots.inverse_root, static_argnames=("order", "solver", "damping"))

EXACT = ["eigh", "coupled_newton", "coupled_higher_order", "newton_db"]
ALL = [*EXACT, "chebyshev"]
ORDERS = {
    "eigh": [4, Fraction(5, 2)],
    "coupled_newton": [1, 3, 4],
    "coupled_higher_order": [4, Fraction(5, 2)],
    "newton_db": [2, 4, 8],
}
CASES = [(name, order) for name, orders in ORDERS.items() for order in orders]


@pytest.mark.parametrize(("solver", "order"), CASES)
def test_roots_agree_with_float64_at_every_scale(solver, order):
    a = psd.stack_of(1e3, scales=(1e-9, 1.0, 1e6))
    found = solve(a, order, solver=solver)
    for x, matrix in zip(found.root, a, strict=True):
        expected = psd.exact_root(matrix, order, relative=1e-6)
        # Rounding of 6e-8 times the condition of 1e3, times 1/p, is 6e-5 / p; margin of five.
        assert psd.relative_error(x, expected) < 3e-4 / float(order)
    assert found.ok.all()
    assert found.error.max() < 1e-2


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("condition", [1e6, 1e12])
def test_ill_conditioned_roots_are_those_of_the_damped_matrix(solver, condition):
    a = psd.stack_of(condition)
    found = solve(a, 4, solver=solver)
    for x, matrix in zip(found.root, a, strict=True):
        # With a damping of 1e-6 an eigenvalue is known to 0.3 in float32, and its root to 0.08.
        assert psd.relative_error(x, psd.exact_root(matrix, 4, relative=1e-6)) < 0.08
    assert found.ok.all()


@pytest.mark.parametrize("solver", ALL)
def test_a_rank_deficient_statistic_has_a_root_that_is_accepted(solver):
    g = np.random.default_rng(0).standard_normal((3, 24, 5)).astype(np.float32)
    a = g @ g.transpose(0, 2, 1)
    found = solve(a, 4, solver=solver)
    assert found.ok.all()
    if solver != "chebyshev":  # whose damping is 1e-3
        expected = psd.exact_root(a[0], 4, relative=1e-6)
        assert psd.relative_error(found.root[0], expected) < 0.08  # as above


@pytest.mark.parametrize("order", [2, Fraction(5, 2)])
def test_chebyshev_is_the_root_of_the_matrix_plus_its_epsilon_and_has_its_scale(order):
    a = psd.stack_of(1e2)
    solver = roots.Chebyshev(degree=100, epsilon=1e-2)
    found = solve(a, order, solver=solver, damping=roots.Absolute(0.0))
    for x, matrix in zip(found.root, a, strict=True):
        damping = 1e-2 * np.linalg.norm(matrix)
        # The truncation's error is exp(-2 * sqrt(1e-2) * 100) = 2e-9: rounding remains.
        assert psd.relative_error(x, psd.exact_root(matrix, order, absolute=damping)) < 1e-5


@pytest.mark.parametrize("solver", ALL)
def test_a_scaled_matrix_has_the_scaled_root(solver):
    a = psd.stack_of(1e2, scales=(1.0, 1.0, 1.0))
    by = np.float32([1e-24, 1.0, 1e36])
    found = solve(a, 4, solver=solver)
    scaled = solve(a * by[:, None, None], 4, solver=solver)
    np.testing.assert_allclose(
        scaled.root * by[:, None, None].astype(np.float64) ** 0.25,
        found.root,
        rtol=0,
        atol=2e-4 * float(np.abs(found.root).max()),  # the products round anew at condition 1e2
    )
    np.testing.assert_allclose(scaled.largest, found.largest * by, rtol=1e-5)  # power iteration


@pytest.mark.parametrize("solver", ALL)
def test_padding_changes_nothing_whatever_it_holds(solver):
    sizes = np.array([5, 0, 24])
    rng = np.random.default_rng(3)
    padded = rng.standard_normal((3, 24, 24)).astype(np.float32)
    padded[0, 7, 7] = np.nan
    parts = []
    for i, n in enumerate(sizes):
        g = rng.standard_normal((n, 60))
        parts.append((g @ g.T).astype(np.float32))
        padded[i, :n, :n] = parts[-1]
    found = solve(padded, 4, solver=solver, sizes=sizes)
    assert found.ok.all()
    for i, n in enumerate(sizes):
        assert not np.any(found.root[i, n:]), i
        assert not np.any(found.root[i, :, n:]), i
        if n:
            alone = solve(np.stack([parts[i]] * 3), 4, solver=solver)
            # Sums of other lengths round otherwise: some units of 6e-8 times a condition below 50.
            np.testing.assert_allclose(
                found.root[i, :n, :n], alone.root[0], atol=1e-5 * np.abs(alone.root).max()
            )
            assert abs(int(found.iterations[i] - alone.iterations[0])) <= 1, i


def test_a_broken_matrix_fails_alone_and_its_root_is_zeros():
    a = psd.stack_of(1e2)
    broken = a.copy()
    broken[1, 2, 3] = np.nan
    for solver in ALL:
        whole = solve(a, 4, solver=solver)
        found = solve(broken, 4, solver=solver)
        assert found.ok.tolist() == [True, False, True], solver
        assert found.error[1] == np.inf
        assert not found.root[1].any()
        np.testing.assert_array_equal(found.root[::2], whole.root[::2])


def _hostile(n):
    """Ten thousand small matrices: random, rank-one, zero, denormal, tiny, huge, near-singular."""
    rng = np.random.default_rng(11)
    k = 10_000
    g = rng.standard_normal((k, n, n))
    g[::4, :, 1:] = 0.0  # rank one
    a = g @ g.transpose(0, 2, 1) * 10.0 ** rng.uniform(-20, 20, (k, 1, 1))
    a[1::8] = 0.0
    a[2::8] *= 1e-50  # below the least normal float32, or zero
    a[3::8] = np.eye(n) * 10.0 ** rng.uniform(-44, 37, (len(a[3::8]), 1, 1))
    a[5::16, 0] = a[5::16, :, 0] = 0.0  # a dead coordinate
    return a.astype(np.float32)


@pytest.mark.parametrize("solver", ALL)
def test_ten_thousand_matrices_give_finite_roots_and_none_fails(solver):
    a = _hostile(4)
    assert (np.abs(a[a != 0]).min() < np.finfo(np.float32).tiny) & (a.max() > 1e20)
    found = solve(a, 4, solver=solver)
    assert np.isfinite(found.root).all()
    assert np.isfinite(found.error).all()
    assert found.ok.all()


def test_a_zero_matrix_has_a_multiple_of_the_identity_for_a_root():
    found = solve(jnp.zeros((1, 3, 3)), 4, solver="coupled_newton")
    expected = (1e-6 * 1e-25) ** -0.25 * np.eye(3)
    np.testing.assert_allclose(found.root[0], expected, rtol=1e-5)  # of converged iterations


def test_without_damping_a_singular_matrix_fails_and_says_so():
    a = np.diag([1.0, 1.0, 0.0]).astype(np.float32)[None]
    for solver in ["eigh", "newton_db"]:
        found = solve(a, 4, solver=solver, damping=roots.Absolute(0.0))
        assert not found.ok.any(), solver
        assert np.isfinite(found.root).all(), solver


@pytest.mark.parametrize("solver", ["eigh", "coupled_newton"])
def test_absolute_damping_is_added_in_the_unit_of_the_matrix(solver):
    a = 1e-6 * psd.stack_of(1e2, scales=(1.0, 3.0, 1e-9))
    found = solve(a, 4, solver=solver, damping=roots.Absolute(1e-7))
    for x, matrix in zip(found.root, a, strict=True):
        assert (
            psd.relative_error(x, psd.exact_root(matrix, 4, absolute=1e-7)) < 1e-5
        )  # condition 60


def test_damping_relative_to_the_norm_is_relative_to_the_largest_row_sum():
    a = psd.stack_of(1e2)
    found = solve(a, 4, damping=roots.Relative(1e-2, estimate="norm"))
    for x, matrix in zip(found.root, a, strict=True):
        damping = 1e-2 * np.abs(matrix).sum(1).max()
        assert psd.relative_error(x, psd.exact_root(matrix, 4, absolute=damping)) < 1e-5


def test_a_pseudo_inverse_has_zeros_where_there_is_nothing_to_invert():
    values = np.array([4.0, 1.0, 0.25, 0.0, 0.0])
    a = psd.of_spectrum(values)[None]
    found = solve(a, 2, damping=roots.PseudoInverse())
    a64, q = np.linalg.eigh(a[0].astype(np.float64))
    powers = np.where(a64 > 1e-3, np.abs(a64) ** -0.5, 0.0)
    np.testing.assert_allclose(found.root[0], (q * powers) @ q.T, atol=2e-6)  # values of order 2
    assert found.ok.all()
    cut = solve(a, 2, damping=roots.PseudoInverse(atol=0.5))
    powers = np.where(a64 > 0.5, np.abs(a64) ** -0.5, 0.0)
    np.testing.assert_allclose(cut.root[0], (q * powers) @ q.T, atol=2e-6)


def test_negative_eigenvalues_are_clipped_or_shifted():
    a = np.diag([1.0, 0.5, -0.01]).astype(np.float32)[None]
    damping = roots.Absolute(0.001)
    clipped = solve(a, 2, solver=roots.Eigh(negative="clip"), damping=damping)
    shifted = solve(a, 2, solver=roots.Eigh(negative="shift"), damping=damping)
    of = lambda *values: np.diag(np.array(values) ** -0.5)
    np.testing.assert_allclose(clipped.root[0], of(1.001, 0.501, 0.001), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(shifted.root[0], of(1.011, 0.511, 0.001), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_low_precision_matrices_are_worked_on_in_float32(dtype):
    a = jnp.asarray(psd.stack_of(1e2, scales=(1.0, 2.0, 3.0)), dtype)
    found = solve(a, 4, solver="newton_db")
    assert found.root.dtype == found.error.dtype == jnp.float32
    exact = solve(a.astype(jnp.float32), 4, solver="newton_db")
    np.testing.assert_array_equal(found.root, exact.root)


def test_float64_matrices_are_solved_to_float64():
    with jax.enable_x64(True):
        values = np.logspace(0, -3, 20)
        q = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 20)))[0]
        a = (q * values) @ q.T
        for solver in ["eigh", "newton_db"]:
            found = solve(jnp.asarray(a)[None], 4, solver=solver)
            expected = psd.exact_root(a, 4, relative=1e-6)
            assert found.root.dtype == jnp.float64
            # Power iteration finds the largest eigenvalue to 1e-2, and the damping is 1e-3 of the
            # least eigenvalue: 1e-5. The loop's tolerance of 1e-6 is met by far: Newton squares it.
            assert psd.relative_error(found.root[0], expected) < 1e-5, solver


@pytest.mark.parametrize(
    ("words", "arguments", "options"),
    [
        ("stack", (np.eye(3), 4), {}),
        ("stack", (np.ones((2, 3, 4)), 4), {}),
        ("order must be above 0", (np.eye(3)[None], 0), {}),
        ("powers of two", (np.eye(3)[None], 3), {"solver": "newton_db"}),
        ("powers of two", (np.eye(3)[None], 1), {"solver": "newton_db"}),
        (
            r"integer orders, got 5/2 \(exponent -2/5\)",
            (np.eye(3)[None], Fraction(5, 2)),
            {"solver": "coupled_newton"},
        ),
        ("solver must be one of 'eigh'", (np.eye(3)[None], 4), {"solver": "svd"}),
        (
            "PseudoInverse needs the eigenvalues",
            (np.eye(3)[None], 4),
            {"solver": "newton_db", "damping": roots.PseudoInverse()},
        ),
        ("sizes must be 1 integers", (np.eye(3)[None], 4), {"sizes": np.array([1, 2])}),
        ("sizes must be from 0 to 3.*got 4", (np.eye(3)[None], 4), {"sizes": np.array([4])}),
    ],
)
def test_a_wrong_value_is_refused_by_name(words, arguments, options):
    with pytest.raises(ValueError, match=words):
        roots.inverse_root(*arguments, **options)


@pytest.mark.parametrize(
    ("words", "arguments", "options"),
    [
        ("order must be an int", (np.eye(3)[None], 4.0), {}),
        ("solver must be a name", (np.eye(3)[None], 4), {"solver": roots.Eigh}),
        ("damping must be", (np.eye(3)[None], 4), {"damping": 1e-6}),
        ("real floating", (np.eye(3, dtype=int)[None], 4), {}),
    ],
)
def test_a_wrong_type_is_refused_by_name(words, arguments, options):
    with pytest.raises(TypeError, match=words):
        roots.inverse_root(*arguments, **options)


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("max_iterations must be an int of at least 1", lambda: roots.NewtonDB(max_iterations=0)),
        ("tolerance must be in", lambda: roots.CoupledNewton(tolerance=-1.0)),
        ("scale must be one of", lambda: roots.CoupledNewton(scale="trace")),
        ("order must be an int of at least 2", lambda: roots.CoupledHigherOrder(order=1)),
        ("degree must be", lambda: roots.Chebyshev(degree=1)),
        ("epsilon must be in", lambda: roots.Chebyshev(epsilon=0.0)),
        ("negative must be one of", lambda: roots.Eigh(negative="abs")),
        ("max_residual must be in", lambda: roots.Eigh(max_residual=0.0)),
        ("epsilon must be in", lambda: roots.Relative(0.0)),
        ("epsilon must be in", lambda: roots.Absolute(-1.0)),
        ("rtol must be in", lambda: roots.PseudoInverse(rtol=-1.0)),
    ],
)
def test_settings_are_checked_when_they_are_given(words, make):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_failed_root_keeps_the_last_good_one_and_is_counted():
    new = jnp.stack([jnp.eye(2), jnp.full((2, 2), jnp.nan), 3 * jnp.eye(2)])
    result = RootResult(
        root=new,
        error=jnp.array([0.0, jnp.nan, 9.0]),
        ok=jnp.array([True, False, False]),
        iterations=jnp.zeros(3, jnp.int32),
        largest=jnp.ones(3),
        finite=jnp.ones(3, bool),
    )
    previous = 7 * jnp.ones((3, 2, 2))
    kept, failures = roots.keep_last_good(result, previous, jnp.array([4, 0, 2], jnp.int32))
    np.testing.assert_array_equal(kept[0], np.eye(2))
    np.testing.assert_array_equal(kept[1:], previous[1:])
    assert failures.tolist() == [0, 1, 3]
    assert failures.dtype == jnp.int32
    most = jnp.iinfo(jnp.int32).max
    _, failures = roots.keep_last_good(result, previous, jnp.full(3, most, jnp.int32))
    assert failures.tolist() == [0, most, most]
