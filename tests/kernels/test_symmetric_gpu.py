"""Products by one triangle on Hopper: interpreted, lowered and compiled, alone and in solvers."""

import functools
from fractions import Fraction

import gpu_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import symmetric_pairs as pairs
from gpu_kernels import lowered
from jax.sharding import PartitionSpec as P

from jaxopt_suite import kernels, parallel
from jaxopt_suite.kernels import triangles_gpu
from jaxopt_suite.optimizers import roots

definition = functools.partial(kernels.symmetric_product, impl="xla")


def kernel(a, b):
    return kernels.symmetric_product(a, b, impl="pallas")


def interpreted(a, b):
    interpret = gpu_kernels.looking_for_races()
    return triangles_gpu.symmetric("symmetric_product", a, b, contracted=2, interpret=interpret)


@gpu_kernels.interpreted
@pytest.mark.parametrize(
    ("k", "n"),
    [
        (1, 300),  # six tiles, one of 44 rows; ten steps, one of 12 entries
        (2, 130),
        (1, 128),
        (3, 17),
        (2, 1),
    ],
)
def test_interpreted_it_is_as_accurate_as_the_definition_and_symmetric_to_the_bit(k, n):
    a, b = pairs.commuting(k, n)
    found, exact = interpreted(a, b), pairs.in_float64(a, b)
    error = lambda x: np.max(np.abs(np.asarray(x, np.float64) - exact))
    plain = pairs.by_lower_triangle(definition(a, b))
    assert (found.shape, found.dtype) == (a.shape, jnp.float32)
    assert error(found) <= error(plain) + 2.0**-24 * np.max(np.abs(exact))
    np.testing.assert_array_equal(found, jnp.swapaxes(found, 1, 2))


@gpu_kernels.interpreted
def test_interpreted_the_lower_triangle_counts_where_the_factors_do_not_commute():
    a, b = pairs.not_commuting(2, 150)
    np.testing.assert_allclose(interpreted(a, b), pairs.in_float64(a, b), rtol=0, atol=1e-4)
    upper = jnp.swapaxes(definition(a, b), 1, 2)
    assert np.max(np.abs(np.tril(interpreted(a, b) - upper))) > 1


@gpu_kernels.interpreted
def test_interpreted_a_product_with_the_identity_is_the_other_factor_to_the_bit():
    a = pairs.commuting(1, 140)[0]
    identity = jnp.eye(140)[None]
    np.testing.assert_array_equal(interpreted(a, identity), a)
    np.testing.assert_array_equal(interpreted(identity, a), a)


@gpu_kernels.interpreted
@gpu_kernels.numpy_is_quiet
@pytest.mark.parametrize("scales", [(0.0, 0.0), (1e-22, 1e-22), (2.5e19, 2.5e19), (1e-38, 1e38)])
def test_interpreted_hard_numbers_give_what_the_definition_makes_of_them(scales):
    a, b = (scale * x for scale, x in zip(scales, pairs.commuting(2, 20), strict=True))
    found, plain = (np.tril(f(a, b)) for f in (interpreted, definition))
    for product in (found, plain):
        assert np.isfinite(product).all() == (max(scales) != 2.5e19)
        pairs.assert_overflow_where_they_must(product, a, b)
    finite = np.isfinite(plain) & np.isfinite(found)
    # Sums that cancel, and denormal numbers, which may be flushed: sums, entries, or their parts.
    flushed = 1.2e-38 * (1 + np.max(np.sum(np.abs(np.asarray([a, b], np.float64)), axis=2)))
    bound = 2.0**-21 * pairs.sizes(a, b) + 3 * flushed
    assert np.all(np.abs(found - plain)[finite] <= bound[finite])


@gpu_kernels.interpreted
@gpu_kernels.numpy_is_quiet
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_interpreted_what_is_not_finite_spoils_what_it_does_in_the_definition(bad, which):
    factors = pairs.commuting(3, 20)
    factors[which] = factors[which].at[1, 4, 9].set(bad).at[1, 9, 4].set(bad)
    spoiled = ~np.isfinite(np.asarray(interpreted(*factors)))
    plain = pairs.by_lower_triangle(np.where(np.isfinite(definition(*factors)), 0, 1))
    np.testing.assert_array_equal(spoiled, plain == 1)
    assert 0 < spoiled.sum() == spoiled[1].sum() < 100


@gpu_kernels.interpreted
def test_interpreted_in_a_loop_every_turn_multiplies_what_the_last_one_gave():
    a, b = (0.5 * x for x in pairs.commuting(1, 12))
    turn = lambda x, _: (interpreted(x, b), None)
    found, _ = jax.jit(lambda x: jax.lax.scan(turn, x, length=3))(a)
    np.testing.assert_array_equal(found, interpreted(interpreted(interpreted(a, b), b), b))


def programs(k=2, n=200):
    """What is lowered and compiled: of each function a name, itself, and its arguments."""
    stack = jax.ShapeDtypeStruct((k, n, n), jnp.float32)
    return {
        "two": (lambda a, b: kernel(a, b), (stack, stack)),  # a new function each time, for jit
        "square": (lambda a: kernel(a, a), (stack,)),
    }


@pytest.mark.parametrize("name", list(programs()))
def test_on_each_platform_its_own_kernel_and_no_other_is_in_the_program(name):
    fn, arguments = programs()[name]
    gpu_kernels.assert_its_own_kernel_on_each_platform(fn, arguments)


def test_inside_shard_map_and_under_vmap_it_lowers_for_gpus():
    mesh = parallel.make_mesh({"worker": 2}, devices=jax.devices()[:2])
    specs = {"in_specs": P("worker"), "out_specs": P("worker")}
    a, b = pairs.commuting(4, 20)
    assert lowered(jax.shard_map(kernel, mesh=mesh, **specs), a, b).count("@mosaic_gpu_v2") == 1
    fleet = lambda x: jnp.stack([x] * 3)
    assert lowered(jax.vmap(kernel), fleet(a), fleet(b)).count("@mosaic_gpu_v2") == 1
    # Of one factor the workers may have the same.
    specs["in_specs"] = P("worker"), P()
    on_mesh = jax.shard_map(kernel, mesh=mesh, **specs)
    assert lowered(on_mesh, a, b[:2]).count("@mosaic_gpu_v2") == 1


SOLVERS = [
    (roots.CoupledNewton, 4, {}),
    (roots.CoupledNewton, 4, {"tolerance": None, "max_iterations": 3}),
    (roots.CoupledHigherOrder, Fraction(5, 2), {}),
    (roots.Chebyshev, 2, {}),
]


@pytest.mark.parametrize(("make", "order", "settings"), SOLVERS)
def test_solvers_lower_for_gpus_with_the_kernel_in_their_loops(make, order, settings):
    solver = make(product_impl="pallas", **settings)
    solve = functools.partial(roots.inverse_root, order=order, solver=solver)
    matrices = jnp.stack([jnp.eye(24)] * 4)
    assert "@mosaic_gpu_v2" in lowered(solve, matrices)
    mesh = parallel.make_mesh({"worker": 2}, devices=jax.devices()[:2])
    on_mesh = jax.shard_map(solve, mesh=mesh, in_specs=P("worker"), out_specs=P("worker"))
    assert "@mosaic_gpu_v2" in lowered(on_mesh, matrices)


@pytest.mark.parametrize("platform", ["cpu", "rocm"])
def test_where_there_is_no_kernel_the_program_is_refused(platform):
    fn, arguments = programs()["two"]
    message = f"symmetric_product for the platform '{platform}'"
    with pytest.raises(NotImplementedError, match=message):
        lowered(fn, *arguments, platform=platform)


def test_for_a_gpu_that_is_not_hopper_the_program_is_refused(monkeypatch):
    class Blackwell:
        compute_capability = "10.0"

    monkeypatch.setattr(jax.extend.backend, "get_default_device", Blackwell)
    fn, arguments = programs()["two"]
    with pytest.raises(NotImplementedError, match="symmetric_product for GPUs is for Hopper"):
        lowered(fn, *arguments)
    lowered(fn, *arguments, platform="tpu")


def compile_for(gpu):
    shape = (2, 256)
    split = 6 * shape[0] * shape[1] ** 2  # a factor as bfloat16 numbers, once where it is both
    for name, program in programs(*shape).items():
        factors = {"two": 2, "square": 1}[name]
        gpu_kernels.compile_programs(gpu, {name: program}, temporary=factors * split + 600)
    # Of Newton's step N, X, M, the square of N and its fourth power: none is split twice.
    solver = roots.CoupledNewton(product_impl="pallas", tolerance=None, max_iterations=3)
    solve = functools.partial(roots.inverse_root, order=4, solver=solver)
    stack = jax.ShapeDtypeStruct((3, 256, 256), jnp.float32)
    text = gpu_kernels.program_for(gpu, solve, stack).as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 4
    assert text.count("bf16[3,256,256]{2,1,0} get-tuple-element") == 3 * 5


@gpu_kernels.compiled
@pytest.mark.parametrize(("gpu", "target"), gpu_kernels.TARGETS[:1])
def test_it_compiles_for_gpus_that_are_not_there_and_spills_no_registers(gpu, target, tmp_path):
    reports = gpu_kernels.reports(__file__, gpu, tmp_path)
    assert len(reports) == 2  # two pairs' and a square's are one; three pairs'
    for report in reports:
        gpu_kernels.assert_nothing_spilled(report, target)
        assert "wgmma" not in report  # the assembler warns where it makes them wait
