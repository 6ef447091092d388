"""Signs in blocks by the kernels for GPUs: interpreted, lowered, and compiled, without a GPU.

Sums are taken in another order than by the definition. Of powers of two no order rounds.
"""

import functools

import gpu_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_kernels import lowered
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from jaxopt_suite import kernels, parallel
from jaxopt_suite.kernels import implementations, signs, signs_gpu
from jaxopt_suite.optimizers.compression import compressors

# Of a scale above 2**126 the reciprocal, by which XLA multiplies, is denormal and flushed to 0.
HARD = {
    "zeros": 0.0,
    "zeros of the other sign": -0.0,
    "denormal": 2.0**-130,
    "tiny": -(2.0**-120),
    "large": 2.0**126,
    "infinite": np.inf,
    "infinite and negative": -np.inf,
    "nan": np.nan,
}
SCALES = ["l1", "l2"]


def drawn(*shape, seed=0):
    powers = np.random.default_rng(seed).choice([-4, -2, -1, -0.5, 0, 0.5, 1, 2, 4], size=shape)
    return jnp.asarray(powers, jnp.float32)


def with_hard(value, block):
    """In a block of the first slab, in another of the last one, and as single entries."""
    x = drawn(24, block).at[1].set(value).at[22].set(value)
    return x.at[4, 7].set(value).at[12, block - 1].set(value).at[23, 0].set(-value)


def assert_near(found, expected, scale):
    """To the bit; a root may be off by a unit in the last place."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    found, expected = jnp.nan_to_num(found, nan=0.0), jnp.nan_to_num(expected, nan=0.0)
    np.testing.assert_array_equal(found == jnp.inf, expected == jnp.inf)
    np.testing.assert_array_max_ulp(found, expected, maxulp=1 if scale == "l2" else 0)


def assert_encoded_as_defined(found, x, block, scale):
    expected = signs.sign_encode_definition(x, block, scale)
    types = lambda arrays: [(y.shape, y.dtype) for y in arrays]
    assert types(found) == types(expected)
    np.testing.assert_array_equal(found[0], expected.bits)
    assert_near(found[1], expected.scales, scale)
    assert_near(found[2], expected.decoded, scale)
    each = np.repeat(found[1], block).reshape(x.shape)
    np.testing.assert_array_equal(found[2], np.where(x >= 0, each, -each))


@gpu_kernels.interpreted
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((6, 8, 256), 256),  # of each slab a tile, and two rows of a second
        ((11, 16, 64), 128),  # blocks across rows of the tensor
        ((8, 128), 128),  # a row of each slab
    ],
)
def test_interpreted_it_encodes_as_defined(shape, block, scale):
    x = drawn(*shape)
    found = signs_gpu.encode(x, block=block, scale=scale, interpret=plgpu.InterpretGPUParams())
    assert_encoded_as_defined(found, x, block, scale)


@gpu_kernels.interpreted
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", list(HARD))
def test_interpreted_hard_numbers_are_what_they_are_by_definition(value, scale):
    x = with_hard(HARD[value], 128)
    found = signs_gpu.encode(x, block=128, scale=scale, interpret=plgpu.InterpretGPUParams())
    assert_encoded_as_defined(found, x, 128, scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", list(HARD))
def test_what_is_computed_of_a_tile_is_the_definition(value, scale, monkeypatch):
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    x = with_hard(HARD[value], 256)
    positive, sizes = signs_gpu._encoded(x, scale)
    bits = np.packbits(np.reshape(positive, (8, -1)), axis=0, bitorder="little")[0]
    decoded = signs_gpu._decoded(positive, sizes)
    assert_encoded_as_defined((jnp.asarray(bits), sizes, decoded), x, 256, scale)


def test_roots_are_within_a_unit_in_the_last_place_wherever_a_mean_of_squares_lies():
    means = np.random.default_rng(0).uniform(1 / 256, 1, size=10_000).astype(np.float32)
    means = np.concatenate([means, np.float32([1 / 256, 1 / 128, 0.25, 1])])
    np.testing.assert_array_max_ulp(signs_gpu._root(jnp.asarray(means)), np.sqrt(means), maxulp=1)
    assert signs_gpu._root(jnp.float32(1)) == 1
    assert np.isnan(signs_gpu._root(jnp.float32(np.nan)))


@gpu_kernels.interpreted
@pytest.mark.parametrize(
    ("workers", "shape", "block", "owner"),
    [
        (5, (6, 8, 256), 256, None),  # more workers than stages, rows not in fours
        (5, (6, 8, 256), 256, 3),
        (2, (11, 16, 64), 128, 0),
        (1, (8, 128), 128, None),
    ],
)
def test_interpreted_the_mean_is_that_of_the_definition_to_the_bit(workers, shape, block, owner):
    normal = np.random.default_rng(0).normal(size=(workers, *shape)).astype(np.float32)
    encode = lambda x: signs.sign_encode_definition(x, block, "l1")
    bits, scales, _ = jax.vmap(encode)(jnp.asarray(normal))
    own = None if owner is None else (jnp.asarray(normal[0] ** 3), jnp.int32(owner))
    found = signs_gpu.mean(
        jnp.int32(-1) if own is None else own[1],
        bits,
        scales,
        *([] if own is None else own[:1]),
        shape=shape,
        block=block,
        interpret=plgpu.InterpretGPUParams(),
    )
    assert found.dtype == jnp.float32
    expected = signs.sign_mean_definition(bits, scales, shape, own, block)
    np.testing.assert_array_equal(found, expected)


@gpu_kernels.interpreted
def test_interpreted_a_worker_with_a_number_that_is_not_finite_spoils_its_blocks_only():
    messages = jnp.stack([drawn(24, 128), with_hard(np.inf, 128), with_hard(np.nan, 128)])
    bits, scales, _ = jax.vmap(lambda x: signs.sign_encode_definition(x, 128, "l1"))(messages)
    settings = {"shape": (24, 128), "block": 128}
    found = signs_gpu.mean(
        jnp.int32(-1), bits, scales, **settings, interpret=plgpu.InterpretGPUParams()
    )
    expected = signs.sign_mean_definition(bits, scales, own=None, **settings)
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found).all(axis=1).sum() == 24 - 5


def programs(block=256, shape=(37, 8, 256), workers=3):
    """What is lowered and compiled: of each function a name, itself, and its arguments."""
    size = int(np.prod(shape))
    struct = jax.ShapeDtypeStruct
    payloads = (
        struct((workers, size // 8), jnp.uint8),
        struct((workers, size // block), jnp.float32),
    )
    message, worker = struct(shape, jnp.float32), struct((), jnp.int32)
    settings = {"block": block, "impl": "pallas"}
    encode = functools.partial(kernels.sign_encode, **settings)
    mean = functools.partial(kernels.sign_mean, shape=shape, **settings)
    return {
        "encode, l1": (functools.partial(encode, scale="l1"), (message,)),
        "encode, l2": (functools.partial(encode, scale="l2"), (message,)),
        "mean": (mean, payloads),
        "mean, own": (lambda b, s, x, i: mean(b, s, own=(x, i)), (*payloads, message, worker)),
    }


@pytest.mark.parametrize("block", implementations.GPU_BLOCKS)
@pytest.mark.parametrize("name", list(programs()))
def test_on_each_platform_its_own_kernel_and_no_other_is_in_the_program(name, block):
    fn, arguments = programs(block)[name]
    gpu_kernels.assert_its_own_kernel_on_each_platform(fn, arguments)


def exchanged(x):
    """A worker's message encoded, gathered, and averaged."""
    message = kernels.sign_encode(x, impl="pallas")
    bits, scales = jax.lax.all_gather((message.bits, message.scales), "worker")
    own = message.decoded, jax.lax.axis_index("worker")
    return kernels.sign_mean(bits, scales, x.shape, own=own, impl="pallas"), message.decoded


def test_inside_shard_map_and_under_vmap_it_lowers_for_gpus():
    mesh = parallel.make_mesh({"worker": 2}, devices=jax.devices()[:2])
    on_mesh = jax.shard_map(exchanged, mesh=mesh, in_specs=P("worker"), out_specs=P("worker"))
    fleet = jax.vmap(exchanged, axis_name="worker")
    for fn, shape in ((on_mesh, (48, 256)), (fleet, (3, 40, 256))):
        text = lowered(fn, jax.ShapeDtypeStruct(shape, jnp.float32))
        assert text.count("@mosaic_gpu_v2") == 2


def test_the_codec_has_the_kernels_of_gpus_for_the_leaves_that_they_take():
    codec = compressors.sign("l2", block=128, impl="pallas")
    encode = lambda x: codec.encode_decoded(x, None)
    for shape, count in (((16, 128), 1), ((17, 128), 0)):
        text = lowered(encode, jax.ShapeDtypeStruct(shape, jnp.float32))
        assert text.count("@mosaic_gpu_v2") == count


@pytest.mark.parametrize(
    ("block", "platform", "message"),
    [
        (256, "cpu", "with block=256 for the platform 'cpu'"),
        (256, "rocm", "with block=256 for the platform 'rocm'"),
        (512, "cuda", "with block=512 for the platform 'cuda'; impl='xla' runs"),
    ],
)
@pytest.mark.parametrize(("name", "kernel"), [("encode, l2", "sign_encode"), ("mean", "sign_mean")])
def test_where_there_is_no_kernel_the_program_is_refused(name, kernel, block, platform, message):
    fn, arguments = programs(block, shape=(4, 8, 512))[name]
    with pytest.raises(NotImplementedError, match=f"{kernel} {message}"):
        lowered(fn, *arguments, platform=platform)
    if platform == "cpu":
        with pytest.raises(NotImplementedError, match=f"{kernel} {message}"):
            fn(*(jnp.zeros(x.shape, x.dtype) for x in arguments))


def compile_for(gpu):
    for block in implementations.GPU_BLOCKS:
        gpu_kernels.compile_programs(gpu, programs(block, shape=(64, 256)))


@gpu_kernels.compiled
@pytest.mark.parametrize(("gpu", "target"), gpu_kernels.TARGETS)
def test_they_compile_for_gpus_that_are_not_there_and_spill_no_registers(gpu, target, tmp_path):
    reports = gpu_kernels.reports(__file__, gpu, tmp_path)
    assert len(reports) == len(implementations.GPU_BLOCKS) * len(programs())
    for report in reports:
        gpu_kernels.assert_nothing_spilled(report, target)
