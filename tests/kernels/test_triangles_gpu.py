"""What the kernels for Hopper share: numbers in three parts, cut-off sums, and a train step."""

import gpu_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import symmetric_pairs as pairs
from jax.sharding import PartitionSpec as P

from jaxopt_suite import kernels, parallel
from jaxopt_suite.kernels import gram, triangles_gpu
from jaxopt_suite.optimizers import roots
from jaxopt_suite.optimizers.shampoo import shampoo
from jaxopt_suite.parallel import topologies


@pytest.mark.parametrize("power", [0, 30, 100, -90])
def test_three_bfloat16_numbers_are_a_float32_number_and_get_smaller(power):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(50, 40)) * 2.0**power, jnp.float32)
    x = x.at[0, 0].set(jnp.finfo(jnp.float32).max).at[0, 1].set(0)
    parts = jax.jit(triangles_gpu.split)(x)
    assert [part.dtype for part in parts] == [jnp.bfloat16] * 3
    high, middle, low = (np.asarray(part, np.float64) for part in parts)
    np.testing.assert_array_equal(high + middle + low, np.asarray(x, np.float64))
    assert np.all(np.abs(high) <= np.abs(x))
    assert np.all(np.abs(middle) <= 2.0**-7 * np.abs(high))
    assert np.all(np.abs(low) <= 2.0**-16 * np.abs(high))


def test_what_is_not_finite_is_in_the_first_part_alone_and_bfloat16_is_its_own_only_part():
    bad = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    high, middle, low = triangles_gpu.split(bad)
    np.testing.assert_array_equal(high.astype(jnp.float32), bad)
    np.testing.assert_array_equal(jnp.stack([middle, low]), 0)
    (only,) = triangles_gpu.split(bad.astype(jnp.bfloat16))
    np.testing.assert_array_equal(only.astype(jnp.float32), bad)


def cut(x, quantum):
    """To a multiple of the quantum, toward zero."""
    return np.trunc(x / quantum) * quantum


def as_tensor_cores_add(total, left, right):
    """A model of an instruction, at its worst: each of 16 products and the sum are cut to 24 bits.

    What is cut off is below the last bit of the largest of them.
    """
    terms = np.concatenate([total[..., None], left[:, None] * right[None]], axis=-1)
    last_bit = lambda x: 2.0 ** (np.frexp(np.where(x == 0, 1e-30, np.abs(x)))[1] - 24)
    added = np.sum(cut(terms, last_bit(np.max(np.abs(terms), axis=-1))[..., None]), axis=-1)
    return cut(added, last_bit(added))


def by_model(x, y, depth):
    """The products of the rows of x with those of y, by the products and steps of the kernel."""
    left, right = ([np.asarray(p, np.float64) for p in triangles_gpu.split(z)] for z in (x, y))
    total = np.zeros((len(x), len(y)), np.float32)
    for step in range(0, x.shape[1], depth):
        added = np.zeros(total.shape)
        for i, j in triangles_gpu._PRODUCTS[len(left)]:
            for first in range(step, min(step + depth, x.shape[1]), 16):
                columns = slice(first, first + 16)
                added = as_tensor_cores_add(added, left[i][:, columns], right[j][:, columns])
        total = total + added.astype(np.float32)
    return total


@pytest.mark.parametrize(("dtype", "spread"), [("float32", 0), ("float32", 6), ("bfloat16", 0)])
def test_cut_off_sums_of_a_step_are_as_accurate_as_float32_and_those_of_all_steps_are_not(
    dtype, spread
):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 1024)) * 10 ** rng.uniform(-spread, spread, size=(60, 1024))
    x = jnp.asarray(x, dtype)
    wide = np.asarray(x, np.float64)
    exact, size = wide @ wide.T, np.abs(wide) @ np.abs(wide).T
    error = lambda found: (np.asarray(found, np.float64) - exact) / size
    plain = gram.gram_update_definition(jnp.zeros((1, 60, 60)), x[None], 0.0, 1.0, 0)[0]
    depth = triangles_gpu._Plan.of(x[None], 2, adds=False).depth
    stepwise, at_once = (error(by_model(x, x, steps)) for steps in (depth, 1024))
    assert np.mean(stepwise**2) <= np.mean(error(plain) ** 2)
    assert np.max(np.abs(stepwise)) <= 2.0**-20
    assert np.mean(np.diag(at_once)) < 5 * np.mean(np.diag(stepwise)) < 0  # too small, both


def test_cut_off_sums_of_a_step_are_as_accurate_as_float32_where_the_factors_commute():
    a, b = pairs.commuting(1, 500)
    rows = a[0, :60], b[0, 250:310]
    wide = [np.asarray(x, np.float64) for x in rows]
    exact, size = wide[0] @ wide[1].T, np.abs(wide[0]) @ np.abs(wide[1]).T
    error = lambda found: (np.asarray(found, np.float64) - exact) / size
    stepwise = error(by_model(*rows, triangles_gpu._Plan.of(a, 2, adds=False).depth))
    plain = error(kernels.symmetric_product(a, b, impl="xla")[0, :60, 250:310])
    assert np.mean(stepwise**2) <= np.mean(plain**2)
    assert np.max(np.abs(stepwise)) <= 2.0**-20


def compile_for(gpu):
    devices = topologies.describe(f"{gpu}:1x4x1").devices
    mesh = parallel.make_mesh({"data": 2, "model": 2}, devices=devices)
    params = {"w": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}
    solver = roots.CoupledNewton(product_impl="pallas")
    settings = {"block_size": 256, "solver": solver, "stack_multiple": 4}
    tx = shampoo(0.1, gram_impl="pallas", **settings)
    loss = lambda p, batch: jnp.mean(jnp.square(batch @ p["w"]))
    step = parallel.make_train_step(loss, tx, mesh, param_specs={"w": P(None, "model")})
    program = step.lower(params, jax.ShapeDtypeStruct((64, 256), jnp.float32)).compile()
    calls = [line for line in program.as_text().splitlines() if "mosaic_gpu_v2" in line]
    assert sum("gram_update" in line for line in calls) == 2  # one a side
    assert sum("symmetric_product" in line for line in calls) == 4  # a step of Newton's has as many
    assert len(calls) == 6


@gpu_kernels.compiled
def test_a_train_step_on_four_chips_has_the_kernels_of_shampoo_on_every_one(tmp_path):
    reports = gpu_kernels.reports(__file__, "h100", tmp_path)
    for name in ("gram_update", "symmetric_product"):
        assert any(name in report for report in reports)
    for report in reports:
        gpu_kernels.assert_nothing_spilled(report, "sm_90a")
