"""Gram matrices by the kernel for Hopper: interpreted, lowered, and compiled, without a GPU."""

import functools

import gpu_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_kernels import lowered
from jax.sharding import PartitionSpec as P

from jaxopt_suite import kernels, parallel
from jaxopt_suite.kernels import gram, triangles_gpu

B, W = 0.9, 0.1
HARD = {"huge": 3.4e38, "small": 1e-22, "infinite": -np.inf, "nan": np.nan}


def given(shape, mode, dtype="float32", seed=0):
    """A symmetric statistic for a mode of blocks of this shape, and the blocks."""
    rng = np.random.default_rng(seed)
    d = shape[mode + 1]
    half = rng.normal(size=(shape[0], d, d))
    statistics = jnp.asarray(half + np.swapaxes(half, 1, 2), jnp.float32)
    return statistics, jnp.asarray(rng.normal(size=shape), dtype)


def interpreted(statistics, blocks, decay=B, weight=W, mode=0):
    matrices, contracted = gram._unfolded(blocks, mode)
    mean = gram.Mean(statistics, jnp.asarray([decay, weight], jnp.float32))
    return triangles_gpu.symmetric(
        "gram_update",
        matrices,
        matrices,
        contracted=contracted,
        mean=mean,
        interpret=gpu_kernels.looking_for_races(),
    )


def in_float64(statistics, blocks, mode=0):
    matrices, contracted = gram._unfolded(blocks, mode)
    rows = np.asarray(matrices if contracted == 2 else jnp.swapaxes(matrices, 1, 2), np.float64)
    decay, weight = np.float64(np.float32([B, W]))
    return decay * np.asarray(statistics, np.float64) + weight * rows @ np.swapaxes(rows, 1, 2)


@gpu_kernels.interpreted
@pytest.mark.parametrize(
    ("shape", "mode", "dtype"),
    [
        ((2, 300, 70), 0, "float32"),  # six tiles, one of 44 rows; three steps, one of 6 entries
        ((1, 70, 136), 1, "float32"),
        ((1, 136, 70), 0, "bfloat16"),
        ((1, 70, 136), 1, "bfloat16"),
        ((2, 5, 9, 6), 1, "float32"),
        ((3, 11), 0, "float32"),
    ],
)
def test_interpreted_it_is_as_accurate_as_the_definition(shape, mode, dtype):
    statistics, blocks = given(shape, mode, dtype)
    found = interpreted(statistics, blocks, mode=mode)
    plain = gram.gram_update_definition(statistics, blocks, B, W, mode)
    exact = in_float64(statistics, blocks, mode)
    error = lambda x: np.max(np.abs(np.asarray(x, np.float64) - exact))
    assert found.dtype == plain.dtype == jnp.float32
    assert error(found) <= error(plain) + 2.0**-24 * np.max(np.abs(exact))


@gpu_kernels.interpreted
def test_interpreted_a_statistic_may_be_kept_in_bfloat16():
    statistics, blocks = given((1, 136, 40), 0)
    narrow = statistics.astype(jnp.bfloat16)
    found = interpreted(narrow, blocks)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(found, np.float64), in_float64(narrow, blocks), rtol=2**-8
    )
    np.testing.assert_array_equal(found, jnp.swapaxes(found, 1, 2))


@gpu_kernels.interpreted
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interpreted_it_is_symmetric_to_the_bit_and_what_lies_above_is_not_read(dtype):
    statistics, blocks = given((1, 150, 40), 0, dtype)
    above = np.triu(np.ones((150, 150), bool), 1)
    found = interpreted(jnp.where(above, jnp.nan, statistics), blocks)
    np.testing.assert_array_equal(found, jnp.swapaxes(found, 1, 2))
    np.testing.assert_array_equal(found, interpreted(statistics, blocks))


@gpu_kernels.interpreted
def test_interpreted_a_decay_of_one_and_a_weight_of_nothing_leave_the_statistic():
    statistics, blocks = given((1, 20, 40), 0)
    np.testing.assert_array_equal(interpreted(statistics, blocks, 1.0, 0.0), statistics)


@gpu_kernels.interpreted
@gpu_kernels.numpy_is_quiet
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_interpreted_what_is_not_finite_spoils_its_row_and_column_and_no_other_block(dtype):
    statistics, blocks = given((3, 12, 20), 0, dtype)
    blocks = blocks.at[0, 3, 5].set(HARD["nan"]).at[1, 9, 18].set(HARD["infinite"])
    found, plain = interpreted(statistics, blocks), kernels.gram_update(statistics, blocks, B, W)
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(plain))
    assert np.sum(~np.isfinite(found)) == 2 * 23


@gpu_kernels.interpreted
@gpu_kernels.numpy_is_quiet
def test_interpreted_huge_and_tiny_entries_are_what_the_definition_makes_of_them():
    blocks = given((3, 12, 20), 0)[1]
    # Of the first block a row is near float32's maximum and its products with others are not.
    row, others = HARD["huge"] * jnp.sign(blocks[0, 4]), 1e-30 * blocks[0]
    blocks = jnp.stack([others.at[4].set(row), HARD["small"] * blocks[1], 0 * blocks[2]])
    zeros = jnp.zeros((3, 12, 12))
    found, plain = (np.asarray(f(zeros, blocks, B, W)) for f in (interpreted, kernels.gram_update))
    finite = np.isfinite(plain)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    assert np.sum(~finite) == 1
    # Sums that cancel, and denormal ones, which may be flushed.
    size = np.einsum("kan,kbn->kab", *[np.abs(np.asarray(blocks, np.float64))] * 2)
    assert np.all(np.abs(found - plain)[finite] <= (2.0**-22 * size + 1.2e-38)[finite])


def programs(shape=(2, 200, 300)):
    """What is lowered and compiled: of each function a name, itself, and its arguments."""
    update = functools.partial(kernels.gram_update, impl="pallas")
    struct, scalar = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((), jnp.float32)
    return {
        f"{dtype}, mode {mode}": (
            functools.partial(update, mode=mode),
            (
                struct((shape[0], *[shape[mode + 1]] * 2), jnp.float32),
                struct(shape, dtype),
                scalar,
                scalar,
            ),
        )
        for dtype in ("float32", "bfloat16")
        for mode in (0, 1)
    }


@pytest.mark.parametrize("name", list(programs()))
def test_on_each_platform_its_own_kernel_and_no_other_is_in_the_program(name):
    fn, arguments = programs()[name]
    gpu_kernels.assert_its_own_kernel_on_each_platform(fn, arguments)


def test_inside_shard_map_and_under_vmap_it_lowers_for_gpus():
    update = lambda s, g: kernels.gram_update(s, g, 0.9, 0.1, impl="pallas")
    mesh = parallel.make_mesh({"worker": 2}, devices=jax.devices()[:2])
    on_mesh = jax.shard_map(update, mesh=mesh, in_specs=P("worker"), out_specs=P("worker"))
    statistics, blocks = given((4, 20, 40), 0)
    assert lowered(on_mesh, statistics, blocks).count("@mosaic_gpu_v2") == 1
    fleet = lambda x: jnp.stack([x] * 3)
    text = lowered(jax.vmap(update), fleet(statistics), fleet(blocks))
    assert text.count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize("platform", ["cpu", "rocm"])
def test_where_there_is_no_kernel_the_program_is_refused(platform):
    fn, arguments = programs()["float32, mode 0"]
    with pytest.raises(NotImplementedError, match=f"gram_update for the platform '{platform}'"):
        lowered(fn, *arguments, platform=platform)


def test_for_a_gpu_that_is_not_hopper_the_program_is_refused(monkeypatch):
    class Blackwell:
        compute_capability = "10.0"

    monkeypatch.setattr(jax.extend.backend, "get_default_device", Blackwell)
    fn, arguments = programs()["float32, mode 0"]
    with pytest.raises(NotImplementedError, match="is for Hopper"):
        lowered(fn, *arguments)
    lowered(fn, *arguments, platform="tpu")


def compile_for(gpu):
    shape = (2, 256, 512)
    for name, program in programs(shape).items():
        parts = 6 * np.prod(shape) if "float32" in name else 0  # the blocks as bfloat16 numbers
        gpu_kernels.compile_programs(gpu, {name: program}, temporary=parts + 400)


@gpu_kernels.compiled
@pytest.mark.parametrize(("gpu", "target"), gpu_kernels.TARGETS[:1])
def test_it_compiles_for_gpus_that_are_not_there_and_spills_no_registers(gpu, target, tmp_path):
    reports = gpu_kernels.reports(__file__, gpu, tmp_path)
    assert len(reports) == len(programs())
    for report in reports:
        gpu_kernels.assert_nothing_spilled(report, target)
        assert "wgmma" not in report  # the assembler warns where it makes them wait
