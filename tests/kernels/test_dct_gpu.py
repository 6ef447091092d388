"""Coefficients of chunks by the kernel for GPUs: interpreted, lowered, compiled, without a GPU."""

import functools
import itertools

import gpu_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_kernels import lowered
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from jaxopt_suite import kernels, parallel
from jaxopt_suite.kernels import dct, dct_gpu
from jaxopt_suite.optimizers.compression import compressors

cosines = dct.dct_matrix


def signs(length):
    """In the place of cosines: of small integers every sum is exact, in whatever order."""
    return np.random.default_rng(length).choice([-1, 1], (length, length)).astype(np.float32)


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setattr(dct, "dct_matrix", signs)


def drawn(*shape, seed=0, integers=False):
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, size=shape) if integers else rng.normal(size=shape)
    return jnp.asarray(x, jnp.float32)


def interpreted(x, k, sides, values="float32"):
    matrices = x.reshape(-1, *x.shape[-2:])
    settings = {"k": k, "values": values, "interpret": plgpu.InterpretGPUParams()}
    found = dct_gpu.top_k(matrices, *map(dct.dct_matrix, sides), **settings)
    return kernels.Largest(*found[:2], found[2].reshape(x.shape))


def assert_same_bits(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def magnitudes(x, sides):
    """Of all coefficients of every chunk, in descending order."""
    return np.abs(dct.dct_top_k_definition(x, sides[0] * sides[1], sides, "float32").values)


@gpu_kernels.interpreted
@pytest.mark.parametrize(
    ("shape", "k", "sides", "values"),
    [
        ((70, 132), 5, (64, 64), "float32"),
        ((2, 40, 20), 12, (16, 16), "bfloat16"),  # a stack, whose matrices end within chunks
        ((3, 16), 3, (16, 128), "float32"),  # a chunk larger than the matrix
        ((30, 22), 7, (24, 16), "float32"),  # rows filled up in registers, columns in memory
        ((9, 17), 8, (8, 8), "float32"),
    ],
)
def test_interpreted_all_bits_are_the_definitions_where_arithmetic_is_exact(
    shape, k, sides, values, exact
):
    x = 37 * drawn(*shape, integers=True)  # more than the 8 bits of bfloat16
    found = interpreted(x, k, sides, values)
    assert_same_bits(found, dct.dct_top_k_definition(x, k, sides, values))
    ordered = magnitudes(x, sides)
    assert np.any(ordered[:, k - 1] == ordered[:, k])  # or ties would not be tested


@gpu_kernels.interpreted
@pytest.mark.parametrize("values", ["float32", "bfloat16"])
def test_interpreted_cosines_are_as_near_to_float64_as_the_definitions(values):
    x = drawn(64, 100)
    found, expected = interpreted(x, 8, (64, 64), values), kernels.dct_top_k(x, 8, (64, 64))
    np.testing.assert_array_equal(found.indices, expected.indices)
    of, chunks = cosines(64).astype(np.float64), np.zeros((64, 128))
    chunks[:, :100] = x
    true = np.stack([of @ chunk @ of.T for chunk in np.split(chunks, 2, axis=1)]).reshape(2, -1)
    true = np.take_along_axis(true, np.asarray(expected.indices), axis=1)
    if values == "float32":
        error = lambda found: np.abs(found - true).max()
        assert error(found.values) <= 1.5 * error(expected.values) < 1e-5
    else:
        rounded = jnp.asarray(true, jnp.float32).astype(values).astype(jnp.float32)
        np.testing.assert_allclose(found.values, rounded, rtol=2**-7)  # a rounding apart
    decoded = dct.dct_top_k_definition(x, 8, (64, 64), values).decoded
    np.testing.assert_allclose(found.decoded, decoded, atol=1e-5 if values == "float32" else 2e-2)


@gpu_kernels.interpreted
def test_interpreted_chunks_with_few_coefficients_and_of_all_sizes_are_the_definitions(exact):
    x = drawn(16, 80, integers=True)
    for i, value in enumerate([0.0, 2.0**-140, 2.0**-120, 2.0**100]):  # powers of two: still exact
        x = x.at[:, 16 * i : 16 * i + 16].set(value)
        x = x.at[2:3, 16 * i : 16 * i + 16].multiply(i)
    found = interpreted(x, 12, (16, 16))
    assert_same_bits(found, dct.dct_top_k_definition(x, 12, (16, 16), "float32"))
    np.testing.assert_array_equal(found.indices[0], np.arange(12))


@gpu_kernels.interpreted
@pytest.mark.parametrize("sides", [(16, 16), (24, 16)])  # without and with rows filled up
def test_interpreted_a_chunk_that_is_not_finite_is_spoilt_and_no_other(sides, exact):
    a, _ = sides
    fine = drawn(a + 4, 80, integers=True).at[:a, 48:].set(0)
    x = fine.at[2, 20].set(np.nan).at[5, 40].set(np.inf)
    x = x.at[:a, 48:64].set(3e38)  # a sum of which is infinite
    x = x.at[0, 64].set(3.4e38)  # of which bfloat16 is infinite
    spoilt, expected = (interpreted(y, 6, sides, "bfloat16") for y in (x, fine))
    whole = [0, *range(5, 10)]  # the first, and those of the rest of the rows
    assert_same_bits(
        [y[np.array(whole)] for y in spoilt[:2]], [y[np.array(whole)] for y in expected[:2]]
    )
    assert not np.isfinite(spoilt.values[1:4]).any()
    assert np.isinf(spoilt.values[4]).all()
    np.testing.assert_array_equal(
        spoilt.indices, dct.dct_top_k_definition(x, 6, sides, "bfloat16").indices
    )
    assert np.isnan(spoilt.decoded[:a, 16:]).all()
    np.testing.assert_array_equal(spoilt.decoded[:a, :16], expected.decoded[:a, :16])
    np.testing.assert_array_equal(spoilt.decoded[a:], expected.decoded[a:])


@gpu_kernels.interpreted
def test_interpreted_under_vmap_each_is_as_alone(exact):
    x = drawn(2, 1, 9, 24, integers=True)
    found = jax.vmap(lambda y: interpreted(y, 3, (8, 16)))(x)
    alone = [dct.dct_top_k_definition(y, 3, (8, 16), "float32") for y in x]
    assert_same_bits(found, jax.tree.map(lambda *y: jnp.stack(y), *alone))


@pytest.fixture
def plain(monkeypatch):
    """Without layouts, and rows read from arrays: what the parts of the kernel compute anywhere."""
    iota = lambda dtype, shape, axis, layout: jax.lax.broadcasted_iota(dtype, shape, axis)
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    monkeypatch.setattr(plgpu, "broadcasted_iota", iota)
    monkeypatch.setattr(dct_gpu, "_row", lambda matrix, i, layout: matrix[i])


def test_a_product_is_that_of_the_first_rows(plain):
    left, right = drawn(24, 16, integers=True), drawn(32, 8, seed=1, integers=True)
    for count in (8, 24):
        product = dct_gpu._product(left, right, count)
        np.testing.assert_array_equal(product, left[:count].T @ right[:count])


def test_the_last_bit_of_a_magnitude_counts_and_of_equal_ones_the_first_is_taken(plain):
    rng = np.random.default_rng(0)
    x = rng.choice([-1, 1], (16, 16)) * (1 + rng.integers(0, 6, (16, 16)) * 2.0**-23)
    x[:2, :8], x[5, 5], x[9, 9], x[3, 3], x[12:] = 0, np.nan, -np.inf, 1e-40, np.nan
    x = jnp.asarray(x, jnp.float32)
    places = jax.new_ref(jnp.zeros(192, jnp.int32))
    dct_gpu._select(x, 192, places)  # all of the first 12 rows, and nothing of the others
    expected = jax.lax.top_k(jnp.abs(x[:12].reshape(-1)), 192)[1]
    np.testing.assert_array_equal(places[...], expected)


def test_what_a_layout_says_of_itself_covers_every_chunk_that_the_kernel_takes():
    for a, b in itertools.product(range(8, 129, 8), (8, 16, 32, 64, 128)):
        assert kernels.dct_top_k_takes((a, b), 8)
        tall = a + -a % dct_gpu._TALL
        for shape in ((tall, b), (b, tall)):
            tiles = dct_gpu._layout(*shape).args[0].tiles
            assert all(side % tile == 0 for side, tile in zip(shape, tiles[0], strict=True))
            assert np.prod(tiles[0]) == 128 * np.prod(tiles[2])
            assert np.prod(tiles[1]) == 32 * np.prod(tiles[2])


def find(x, k=32, sides=(64, 64), values="float32"):
    return kernels.dct_top_k(x, k, sides, values=values, impl="pallas")


def programs():
    """What is lowered and compiled: of each function a name, itself, and its arguments."""
    x = jax.ShapeDtypeStruct((3, 100, 132), jnp.float32)
    return {
        "default": (find, (x,)),
        "bfloat16": (functools.partial(find, values="bfloat16"), (x,)),
        "wide": (functools.partial(find, sides=(64, 128)), (x,)),
        "filled up": (functools.partial(find, k=8, sides=(24, 8)), (x,)),
        "fleet": (jax.vmap(find), (x,)),
    }


@pytest.mark.parametrize("name", list(programs()))
def test_on_each_platform_its_own_kernel_and_no_other_is_in_the_program(name):
    fn, arguments = programs()[name]
    gpu_kernels.assert_its_own_kernel_on_each_platform(fn, arguments)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((1, 3), (64, 64)),  # columns that are not in fours
        ((70, 20), (8, 8)),  # an entry for each thread
        ((70, 20), (40, 8)),  # three
        ((70, 20), (128, 128)),
        ((70, 20), (8, 128)),
    ],
)
def test_small_matrices_and_other_chunks_lower(shape, sides):
    find_here = functools.partial(find, k=8, sides=sides)
    text = lowered(find_here, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert text.count("@mosaic_gpu_v2") == 1


def test_a_message_of_the_codec_lowers_for_gpus_and_leaves_that_the_kernel_does_not_take_too():
    made = compressors.dct_top_k(9, side=16, impl="pallas")
    for shape, kernels_there in (((20, 40), 1), ((7, 40), 0)):
        encode = lambda x: made.encode_decoded(x, None)
        text = lowered(encode, jax.ShapeDtypeStruct(shape, jnp.float32))
        assert text.count("@mosaic_gpu_v2") == kernels_there


def test_inside_shard_map_it_lowers_for_gpus():
    mesh = parallel.make_mesh({"worker": 2}, devices=jax.devices()[:2])
    on_mesh = jax.shard_map(find, mesh=mesh, in_specs=P("worker"), out_specs=P("worker"))
    text = lowered(on_mesh, jax.ShapeDtypeStruct((4, 20, 30), jnp.float32))
    assert text.count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize("platform", ["cpu", "rocm"])
def test_where_there_is_no_kernel_the_program_is_refused(platform):
    with pytest.raises(NotImplementedError, match=f"dct_top_k for the platform '{platform}'"):
        lowered(find, jnp.ones((64, 64)), platform=platform)


def compile_for(gpu):
    gpu_kernels.compile_programs(gpu, programs())


@gpu_kernels.compiled
@pytest.mark.parametrize(("gpu", "target"), gpu_kernels.TARGETS)
def test_they_compile_for_gpus_that_are_not_there_and_spill_no_registers(gpu, target, tmp_path):
    reports = gpu_kernels.reports(__file__, gpu, tmp_path)
    assert len(reports) == len(programs())
    for report in reports:
        gpu_kernels.assert_nothing_spilled(report, target)
