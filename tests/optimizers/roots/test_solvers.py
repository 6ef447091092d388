"""Facts of each solver: recursions by hand, limits in which one is another, steps and programs."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import psd_matrices as psd
import pytest
from jax.sharding import AxisType, PartitionSpec
from numpy.polynomial import chebyshev

from jaxopt_suite.optimizers import roots
from jaxopt_suite.optimizers.roots.chebyshev import coefficients
from jaxopt_suite.optimizers.roots.estimates import power_iteration
from jaxopt_suite.optimizers.roots.products import power, residual

solve = jax.jit(roots.inverse_root, static_argnames=("order", "solver", "damping"))
UNDAMPED = roots.Absolute(0.0)
VALUES = np.array([1.0, 1e-2, 1e-4])


def newton_by_hand(x, p, steps, scale):
    """The coupled iteration for a number."""
    z = (p + 1) / (2 * scale)
    root, m = z ** (1 / p), z * x
    for _ in range(steps):
        n = 1 + (1 - m) / p
        root, m = root * n, n**p * m
    return root


def newton_db_by_hand(x, steps, scale, roots_left):
    y, z = x / scale, 1.0
    for _ in range(steps):
        e = 1.5 - 0.5 * z * y
        y, z = y * e, e * z
    if roots_left == 1:
        return z / scale**0.5
    return newton_db_by_hand(y * scale**0.5, steps, scale**0.5, roots_left - 1)


def diagonal_roots(order, solver):
    found = solve(np.diag(VALUES).astype(np.float32)[None], order, solver=solver, damping=UNDAMPED)
    return np.diagonal(found.root[0]), found


@pytest.mark.parametrize("p", [1, 3])
def test_a_few_steps_of_coupled_newton_are_the_recursion_by_hand(p):
    solver = roots.CoupledNewton(max_iterations=6, tolerance=None)
    got, found = diagonal_roots(p, solver)
    scale = np.linalg.norm(VALUES)
    expected = [newton_by_hand(x, p, 6, scale) for x in VALUES]
    np.testing.assert_allclose(got, expected, rtol=3e-6)  # six steps of float32
    assert found.iterations.tolist() == [6]
    assert found.error[0] > 0.5  # 1e-4 is far from inverted
    assert not found.ok[0]


@pytest.mark.parametrize(("p", "stages"), [(2, 1), (4, 2)])
def test_five_steps_of_newton_db_are_the_recursion_by_hand(p, stages):
    solver = roots.NewtonDB(max_iterations=5, tolerance=None, max_residual=100.0)
    got, found = diagonal_roots(p, solver)
    expected = [newton_db_by_hand(x, 5, np.linalg.norm(VALUES), stages) for x in VALUES]
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # five steps of each stage
    assert found.iterations.tolist() == [5 * stages]


def test_a_higher_order_takes_the_terms_of_the_binomial_series():
    """With order 4 and p = 2: 1 + e/2 + 3/8 e² + 5/16 e³, after one step of Newton."""
    solver = roots.CoupledHigherOrder(order=4, max_iterations=2, tolerance=None)
    got, _ = diagonal_roots(2, solver)
    expected = []
    for x in VALUES:
        z = 1 / VALUES.sum()
        root, m = z**0.5, z * x
        for terms in ([1, 1 / 2], [1, 1 / 2, 3 / 8, 5 / 16]):
            n = sum(c * (1 - m) ** i for i, c in enumerate(terms))
            root, m = root * n, n**2 * m
        expected.append(root)
    np.testing.assert_allclose(got, expected, rtol=3e-6)


def test_order_two_is_newton_from_another_scale():
    higher, _ = diagonal_roots(
        4, roots.CoupledHigherOrder(order=2, max_iterations=5, tolerance=None)
    )
    scale = (4 + 1) / 2 * VALUES.sum()  # so that z is 1 / trace
    expected = [newton_by_hand(x, 4, 5, scale) for x in VALUES]
    np.testing.assert_allclose(higher, expected, rtol=3e-6)


@pytest.mark.parametrize("order", [4, Fraction(5, 2)])
def test_chebyshev_is_the_series_at_the_eigenvalues_times_the_scale(order):
    got, found = diagonal_roots(order, roots.Chebyshev(degree=7, epsilon=0.1))
    series, scale = coefficients(7, 0.1, Fraction(order)), np.linalg.norm(VALUES)
    expected = chebyshev.chebval(2 * VALUES / scale - 1, series) * scale ** (-1 / float(order))
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # float32, values of order one
    assert found.iterations.tolist() == [7]


def test_chebyshev_coefficients_interpolate_the_function():
    x = np.linspace(0, 1, 50)
    got = chebyshev.chebval(2 * x - 1, coefficients(60, 0.1, Fraction(4)))
    # The truncation's error is exp(-2 * 0.3 * 60) = 2e-16.
    np.testing.assert_allclose(got, (x + 0.1) ** -0.25, rtol=1e-9)


def test_each_matrix_stops_by_itself_and_its_steps_do_not_depend_on_its_company():
    easy, hard = np.eye(8, dtype=np.float32), psd.of_spectrum(np.logspace(0, -5, 8))
    both = solve(np.stack([easy, hard]), 4, solver="newton_db")
    assert both.iterations[0] < both.iterations[1]
    for i, a in enumerate((easy, hard)):
        twice = solve(np.stack([a, a]), 4, solver="newton_db")
        assert both.iterations[i] == twice.iterations[0]
        np.testing.assert_array_equal(both.root[i], twice.root[0])


@pytest.mark.parametrize("name", ["coupled_newton", "chebyshev"])
def test_the_scale_of_power_iteration_gives_the_same_root(name):
    a = psd.stack_of(1e2)
    kind = roots.SOLVERS[name]
    options = {"degree": 200} if name == "chebyshev" else {}
    norm = solve(a, 4, solver=kind(scale="frobenius", **options))
    tight = solve(a, 4, solver=kind(scale="power", **options))
    for x, y in zip(norm.root, tight.root, strict=True):
        # Chebyshev: its damping of 1e-4 times two scales, a hundredth of the least eigenvalue.
        limit = 5e-3 if name == "chebyshev" else 1e-5
        assert psd.relative_error(x, np.asarray(y, np.float64)) < limit
    assert tight.ok.all()


def test_a_tighter_scale_saves_two_steps_on_a_wishart_spectrum():
    """Steps to 1e-3 for 256 rows and 1024 samples."""
    g = np.random.default_rng(0).standard_normal((256, 1024)).astype(np.float32)
    steps = {
        scale: solve(
            (g @ g.T)[None],
            4,
            solver=roots.CoupledNewton(tolerance=1e-3, scale=scale),
        ).iterations[0]
        for scale in ("frobenius", "power")
    }
    assert steps == {"frobenius": 6, "power": 4}


@pytest.mark.parametrize("p", [1, 2, 3, 4, 5, 8])
def test_power_and_residual_are_what_they_say(p):
    a = psd.stack_of(10.0, n=6, scales=(1.0, 1.0, 1.0))
    exact = np.stack([np.linalg.matrix_power(m.astype(np.float64), p) for m in a])
    np.testing.assert_allclose(power(jnp.asarray(a), p), exact, atol=1e-5)
    inside = jnp.ones((3, 6), bool)
    root = np.stack([psd.exact_root(m, p) for m in a]).astype(np.float32)
    assert residual(jnp.asarray(root), jnp.asarray(a), inside, p).max() < 1e-4  # condition 10
    wrong = 1.1 * root
    np.testing.assert_allclose(
        residual(jnp.asarray(wrong), jnp.asarray(a), inside, p), 1.1**p - 1, rtol=1e-3
    )


def test_power_iteration_lies_between_the_largest_diagonal_entry_and_eigenvalue():
    matrices = [psd.of_spectrum(np.logspace(0, -d, 30), seed) for seed, d in enumerate((1, 3, 9))]
    v = np.zeros(30)
    v[3] = v[17] = 2**-0.5
    rank_one = np.outer(v, v).astype(np.float32)
    a = jnp.asarray(np.stack([*matrices, rank_one, np.zeros((30, 30), np.float32)]))
    got = power_iteration(a, jnp.ones((5, 30), bool))
    largest = np.linalg.eigvalsh(np.asarray(a, np.float64))[:, -1]
    assert np.all(got <= largest * (1 + 1e-6))  # rounding
    assert np.all(got >= 0.9 * largest)  # ten steps, neighbours at ratios of 0.92 and less
    assert got[-1] == 0.0


def test_power_iteration_cannot_return_zero_where_its_random_columns_see_nothing(monkeypatch):
    monkeypatch.setattr(
        "jaxopt_suite.optimizers.roots.estimates._random_rows",
        lambda rows, dtype: jnp.zeros((rows, 15), dtype),
    )
    a = np.diag([0.0, 0.5, 0.25]).astype(np.float32)[None]
    assert power_iteration(jnp.asarray(a), jnp.ones((1, 3), bool))[0] == 0.5


@pytest.mark.parametrize("solver", ["eigh", "coupled_newton"])
def test_a_stack_spread_over_devices_gives_the_same_roots_without_communication(solver):
    a = np.concatenate([psd.stack_of(1e2, n=6), psd.stack_of(1e4, n=6), psd.stack_of(1e1, n=6)])[:8]
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("d")

    def one(a, previous, failures):
        return roots.keep_last_good(roots.inverse_root(a, 4, solver=solver), previous, failures)

    arguments = (a, np.zeros_like(a), np.zeros(8, np.int32))
    spread = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=spec, out_specs=spec))
    got, failures = spread(*arguments)
    expected, _ = jax.jit(one)(*arguments)
    assert not failures.any()
    # Batches of one and of eight are summed in other orders: rounding times the condition of 1e4.
    for x, y in zip(got, expected, strict=True):
        assert psd.relative_error(x, np.asarray(y, np.float64)) < 5e-4
    text = spread.lower(*arguments).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather", "collective-permute"))


def test_a_fixed_number_of_steps_is_a_loop_of_known_length():
    fixed = roots.CoupledNewton(max_iterations=7, tolerance=None)
    program = jax.jit(lambda a: roots.inverse_root(a, 4, solver=fixed).root)
    jaxpr = str(jax.make_jaxpr(program)(jnp.ones((2, 4, 4))))
    assert "while" not in jaxpr  # a fori_loop of known length traces to a scan


def test_every_product_asks_for_full_precision():
    for name in ["coupled_newton", "coupled_higher_order", "newton_db", "chebyshev"]:
        traced = jax.make_jaxpr(lambda a, n=name: roots.inverse_root(a, 4, solver=n).root)(
            jnp.ones((2, 4, 4))
        )
        text = str(traced)
        full = text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)")
        assert text.count("dot_general[") == full > 3, name


def test_solvers_compare_by_value_and_are_traced_once():
    assert roots.CoupledNewton() == roots.CoupledNewton(max_iterations=100)
    assert hash(roots.NewtonDB()) == hash(roots.make_solver("newton_db"))
    traces = []

    @jax.jit
    def program(a):
        traces.append(1)
        return roots.inverse_root(a, 4, solver="newton_db").root

    for seed in range(3):
        program(psd.stack_of(10.0 ** (seed + 1), n=5))
    assert len(traces) == 1


def test_a_solver_of_ones_own_is_taken():
    class Diagonal(roots.Solver):
        def solve(self, stack, order):
            damped = roots.damped(stack)
            values = jnp.diagonal(damped.matrices, axis1=1, axis2=2) ** (-1 / float(order))
            root = jnp.eye(values.shape[1])[None] * values[:, None, :]
            steps = jnp.zeros(len(values), jnp.int32)
            return roots.Solved(root, jnp.zeros(len(values)), steps, damped.largest)

    found = roots.inverse_root(np.diag([4.0, 9.0])[None].astype(np.float32), 2, solver=Diagonal())
    np.testing.assert_allclose(found.root[0], np.diag([1 / 2, 1 / 3]), rtol=1e-5)
