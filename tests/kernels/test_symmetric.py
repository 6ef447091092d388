"""Products by one triangle: as accurate as whole ones, alone and in the iterations for roots."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import psd_matrices as psd
import pytest
import symmetric_pairs as pairs
from jax.sharding import PartitionSpec as P

from jaxopt_suite import kernels, parallel
from jaxopt_suite.kernels import triangles_gpu, triangles_tpu
from jaxopt_suite.optimizers import roots
from jaxopt_suite.optimizers.roots import newton_db

kernel = functools.partial(kernels.symmetric_product, impl="interpret")
definition = functools.partial(kernels.symmetric_product, impl="xla")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(triangles_tpu, "_TILES", {"float32": 8})
    monkeypatch.setattr(triangles_tpu, "_DEPTH", 16)


def assert_as_accurate(found, a, b):
    """Against float64: no worse than the plain product, but for the order of sums."""
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    exact = 0.5 * (exact + exact.swapaxes(1, 2))
    error = lambda x: np.max(np.abs(np.asarray(x, np.float64) - exact))
    assert error(found) <= 2 * error(definition(a, b)) + 2.0**-23 * np.max(np.abs(exact))


@pytest.mark.parametrize(("k", "n"), [(1, 520), (2, 130)])
def test_it_is_as_accurate_as_the_definition_at_the_tiles_of_hardware(k, n):
    a, b = pairs.commuting(k, n)
    assert_as_accurate(kernel(a, b), a, b)


@pytest.mark.parametrize(("k", "n"), [(2, 16), (3, 17), (1, 33), (4, 1), (2, 7)])
def test_every_tile_is_where_it_belongs_and_the_product_symmetric(k, n, small_tiles):
    a, b = pairs.commuting(k, n)
    found = kernel(a, b)
    assert_as_accurate(found, a, b)
    np.testing.assert_array_equal(found, found.mT)
    assert (found.shape, found.dtype) == (a.shape, jnp.float32)


def test_where_the_factors_do_not_commute_the_lower_triangle_counts(small_tiles):
    a, b = pairs.not_commuting(2, 21)
    np.testing.assert_allclose(kernel(a, b), pairs.in_float64(a, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-22, 2.5e19])
def test_zeros_denormal_and_huge_products_are_what_the_definition_makes_of_them(scale, small_tiles):
    a, b = (scale * x for x in pairs.commuting(2, 12))
    found, plain = (np.tril(f(a, b)) for f in (kernel, definition))
    for product in (found, plain):
        assert np.isfinite(product).all() == (scale < 1)
        pairs.assert_overflow_where_they_must(product, a, b)
    finite = np.isfinite(plain) & np.isfinite(found)
    # 1e-22 squared has a bit or two left in float32, and may be flushed.
    atol = 1e-5 * np.abs(plain[finite]).max() + 1.2e-38
    np.testing.assert_allclose(found[finite], plain[finite], rtol=0, atol=atol)


def test_what_is_not_a_number_spoils_its_rows_and_no_other_matrix(small_tiles):
    a, b = pairs.commuting(3, 20)
    bad = a.at[1, 4, 9].set(jnp.nan).at[1, 9, 4].set(jnp.nan)
    spoiled = np.zeros((3, 20, 20), bool)
    for row in (4, 9):  # up to the diagonal, and the mirror image of that
        spoiled[1, row, : row + 1] = spoiled[1, : row + 1, row] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(kernel(bad, b))), spoiled)


def test_inside_shard_map_and_under_vmap_every_matrix_has_its_own_product(small_tiles):
    a, b = pairs.commuting(4, 20)
    mesh = parallel.make_mesh({"data": 2}, devices=jax.devices()[:2])
    spread = jax.shard_map(kernel, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(jax.jit(spread)(a, b), kernel(a, b))
    mapped = jax.vmap(kernel)(a.reshape(2, 2, 20, 20), b.reshape(2, 2, 20, 20))
    np.testing.assert_array_equal(mapped.reshape(4, 20, 20), kernel(a, b))


def test_on_a_cpu_auto_is_the_definition():
    a, b = pairs.commuting(1, 4)
    text = lambda impl: jax.jit(functools.partial(kernel, impl=impl)).lower(a, b).as_text()
    assert text("auto") == text("xla")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"impl": "triton"}, ValueError, "impl must be one of 'auto', 'xla', 'pallas'"),
        ({"a": jnp.ones((3, 3))}, ValueError, r"stacks \[k, n, n\] alike, got \(3, 3\) and"),
        ({"b": jnp.ones((2, 3, 4))}, ValueError, r"got \(2, 3, 3\) and \(2, 3, 4\)"),
        ({"b": jnp.ones((2, 3, 3), jnp.bfloat16)}, TypeError, "takes b of float32, got bfloat16"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        kernel(**{"a": jnp.ones((2, 3, 3)), "b": jnp.ones((2, 3, 3))} | change)


def by_one_triangle(a, b, *, impl):
    """What the kernel for TPUs computes, in a time in which an iteration can be seen to its end."""
    assert impl == "pallas"
    product = definition(a, b)
    return jnp.tril(product) + jnp.tril(product, -1).mT


def by_parts(a, b, *, impl):
    """What the kernel for GPUs computes, but for the order of sums."""
    left, right = triangles_gpu.split(a), triangles_gpu.split(b)
    widened = lambda i, j: (x.astype(jnp.float32) for x in (left[i], right[j]))
    products = [definition(*widened(i, j)) for i, j in triangles_gpu._PRODUCTS[3]]
    total = functools.reduce(jnp.add, products)
    return jnp.tril(total) + jnp.tril(total, -1).mT


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (roots.CoupledNewton, 4),
        (roots.CoupledHigherOrder, Fraction(5, 2)),
        (roots.Chebyshev, 2),
    ],
)
@pytest.mark.parametrize("product", [by_one_triangle, by_parts])
@pytest.mark.parametrize("condition", [1e2, 1e6, 1e12])
def test_roots_by_one_triangle_are_less_accurate_by_a_factor_of_four_at_most(
    make, order, condition, product, monkeypatch
):
    matrices = psd.stack_of(condition)
    plain = roots.inverse_root(matrices, order, solver=make())
    monkeypatch.setattr(kernels, "symmetric_product", product)
    found = roots.inverse_root(matrices, order, solver=make(product_impl="pallas"))
    assert found.ok.all()
    assert (jnp.abs(found.iterations - plain.iterations) <= 1).all()
    assert (found.error <= 8 * plain.error + 1e-5).all()
    for a, x, y in zip(matrices, found.root, plain.root, strict=True):
        exact = psd.exact_root(a, order, relative=1e-6)
        assert psd.relative_error(x, exact) <= 4 * psd.relative_error(y, exact)


@pytest.mark.parametrize("symmetric", [False, True])
def test_newton_db_would_diverge_with_products_of_one_triangle(symmetric, monkeypatch):
    """Why it has no ``product_impl``."""
    if symmetric:
        one_triangle = functools.partial(by_one_triangle, impl="pallas")
        monkeypatch.setattr(newton_db, "product", one_triangle)
    (a,) = matrices = psd.stack_of(1e6, scales=(1.0,))
    found = roots.inverse_root(matrices, 4, solver=roots.NewtonDB())
    error = psd.relative_error(found.root[0], psd.exact_root(a, 4, relative=1e-6))
    assert error > 0.05 if symmetric else error < 1e-3


def test_an_iteration_multiplies_by_the_kernel(small_tiles):
    settings = {"max_iterations": 2, "tolerance": None, "max_residual": 1e3}
    matrices = psd.stack_of(10.0, n=12)[1:2]
    solve = jax.jit(roots.inverse_root, static_argnames=("order", "solver"))
    plain = solve(matrices, 2, solver=roots.CoupledNewton(**settings))
    by_kernel = solve(matrices, 2, solver=roots.CoupledNewton(product_impl="interpret", **settings))
    np.testing.assert_allclose(by_kernel.root, plain.root, rtol=1e-4, atol=1e-5)
    spread = jnp.abs(by_kernel.root - plain.root).max()
    assert spread > 0  # or it would be the same program


def test_a_solver_refuses_an_implementation_that_there_is_not():
    with pytest.raises(ValueError, match="product_impl must be one of 'auto'"):
        roots.Chebyshev(product_impl="triton")
