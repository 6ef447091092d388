"""Codes of 8 bits by the kernels for GPUs: interpreted, lowered, and compiled, without a GPU."""

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
from jaxopt_suite.kernels import implementations, int8, int8_gpu

# Of a scale above 2**126 the reciprocal, by which XLA multiplies, is denormal and flushed to 0.
HARD = {"zeros": 0.0, "denormal": 1e-40, "large": 8e37, "infinite": np.inf, "nan": np.nan}


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def messages(workers, shape, block):
    """Of each worker, encoded by the definition: codes, scales, decoded."""
    return jax.vmap(lambda x: int8.int8_encode_definition(x, block))(drawn(workers, *shape))


def assert_encoded_as_defined(found, x, block):
    codes, scales, decoded = int8.int8_encode_definition(x, block)
    np.testing.assert_array_equal(found[1], scales)
    np.testing.assert_array_equal(found[2], decoded)
    fine = np.isfinite(np.repeat(scales, block)[: x.size])  # elsewhere codes say nothing
    np.testing.assert_array_equal(np.asarray(found[0])[fine], np.asarray(codes)[fine])


@gpu_kernels.interpreted
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((3, 11, 256), 256),  # a tile, and a row of a second
        ((37, 100), 128),  # a rest of a block
        ((), 256),
    ],
)
def test_interpreted_it_encodes_as_defined_to_the_bit(shape, block):
    x = drawn(*shape)
    found = int8_gpu.encode(x, block=block, interpret=plgpu.InterpretGPUParams())
    assert_encoded_as_defined(found, x, block)
    assert [y.dtype for y in found] == [jnp.int8, jnp.float32, jnp.float32]


@gpu_kernels.interpreted
@pytest.mark.parametrize("value", list(HARD))
def test_interpreted_hard_numbers_are_what_they_are_by_definition(value):
    x = drawn(5, 256).at[1, 128:256].set(HARD[value]).at[3, 7].set(HARD[value])
    found = int8_gpu.encode(x, block=128, interpret=plgpu.InterpretGPUParams())
    assert_encoded_as_defined(found, x, 128)


@pytest.mark.parametrize("value", list(HARD))
def test_what_is_computed_of_a_tile_is_the_definition_to_the_bit(value, monkeypatch):
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    x = drawn(4, 256).at[1].set(HARD[value]).at[2, 7].set(HARD[value])
    code, scale, decoded = int8_gpu._encoded(x)
    codes = code.astype(jnp.int32).astype(jnp.int8)
    assert_encoded_as_defined((codes.reshape(-1), scale, decoded), x, 256)


@gpu_kernels.interpreted
@pytest.mark.parametrize(
    ("workers", "shape", "block", "owner"),
    [
        (5, (35, 256), 256, None),  # more workers than stages, rows not in fours
        (5, (35, 256), 256, 3),
        (1, (7, 100), 128, 0),
    ],
)
def test_interpreted_the_mean_is_that_of_the_definition(workers, shape, block, owner):
    codes, scales, _ = messages(workers, shape, block)
    own = None if owner is None else (drawn(*shape, seed=1), jnp.int32(owner))
    expected = int8.int8_mean_definition(codes, scales, shape, own, block)
    found = int8_gpu.mean(
        jnp.int32(-1) if own is None else own[1],
        codes,
        scales,
        *([] if own is None else own[:1]),
        shape=shape,
        block=block,
        interpret=plgpu.InterpretGPUParams(),
    )
    assert found.dtype == jnp.float32
    # A product may be added before it is rounded: sums below 8 are off by a unit of theirs each.
    np.testing.assert_allclose(found, expected, rtol=0, atol=workers * 2.0**-21)


def programs(block=256, shape=(37, 100), workers=3):
    """What is lowered and compiled: of each function a name, itself, and its arguments."""
    size = int(np.prod(shape))
    struct = jax.ShapeDtypeStruct
    payloads = (
        struct((workers, size), jnp.int8),
        struct((workers, -(-size // block)), jnp.float32),
    )
    message, worker = struct(shape, jnp.float32), struct((), jnp.int32)
    settings = {"block": block, "impl": "pallas"}
    mean = functools.partial(kernels.int8_mean, shape=shape, **settings)
    return {
        "encode": (functools.partial(kernels.int8_encode, **settings), (message,)),
        "mean": (mean, payloads),
        "mean, own": (lambda c, s, x, i: mean(c, s, own=(x, i)), (*payloads, message, worker)),
    }


@pytest.mark.parametrize("block", implementations.GPU_BLOCKS)
@pytest.mark.parametrize("name", list(programs()))
def test_on_each_platform_its_own_kernel_and_no_other_is_in_the_program(name, block):
    fn, arguments = programs(block)[name]
    gpu_kernels.assert_its_own_kernel_on_each_platform(fn, arguments)


def exchanged(x):
    """A worker's message encoded, gathered, and averaged."""
    message = kernels.int8_encode(x, impl="pallas")
    codes, scales = jax.lax.all_gather((message.codes, message.scales), "worker")
    own = message.decoded, jax.lax.axis_index("worker")
    return kernels.int8_mean(codes, scales, x.shape, own=own, impl="pallas"), message.decoded


def test_inside_shard_map_and_under_vmap_it_lowers_for_gpus():
    mesh = parallel.make_mesh({"worker": 2}, devices=jax.devices()[:2])
    on_mesh = jax.shard_map(exchanged, mesh=mesh, in_specs=P("worker"), out_specs=P("worker"))
    fleet = jax.vmap(exchanged, axis_name="worker")
    for fn, shape in ((on_mesh, (6, 300)), (fleet, (3, 5, 300))):
        text = lowered(fn, jax.ShapeDtypeStruct(shape, jnp.float32))
        assert text.count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
    ("call", "platform", "message"),
    [
        (kernels.int8_encode, "cpu", "int8_encode with block=256 for the platform 'cpu'"),
        (kernels.int8_encode, "rocm", "int8_encode with block=256 for the platform 'rocm'"),
        (
            functools.partial(kernels.int8_encode, block=512),
            "cuda",
            "int8_encode with block=512 for the platform 'cuda'; impl='xla' runs",
        ),
    ],
)
def test_where_there_is_no_kernel_the_program_is_refused(call, platform, message):
    call = functools.partial(call, impl="pallas")
    with pytest.raises(NotImplementedError, match=message):
        lowered(call, jnp.ones((4, 4, 8)), platform=platform)
    if platform == "cpu":
        for run in (call, jax.vmap(call)):
            with pytest.raises(NotImplementedError, match=message):
                run(jnp.ones((4, 4, 8)))


def compile_for(gpu):
    gpu_kernels.compile_programs(gpu, programs(shape=(64, 256)))


@gpu_kernels.compiled
@pytest.mark.parametrize(("gpu", "target"), gpu_kernels.TARGETS)
def test_they_compile_for_gpus_that_are_not_there_and_spill_no_registers(gpu, target, tmp_path):
    reports = gpu_kernels.reports(__file__, gpu, tmp_path)
    assert len(reports) == len(programs())
    for report in reports:
        gpu_kernels.assert_nothing_spilled(report, target)
