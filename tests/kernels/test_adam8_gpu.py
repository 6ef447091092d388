"""Adam over codes of 8 bits by the kernel for GPUs: interpreted, lowered, compiled, without one."""

import functools

import gpu_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adam8_steps import (
    HARD,
    assert_directions_agree,
    assert_moments_agree,
    gradients,
    numbers,
)
from gpu_kernels import lowered
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from jaxopt_suite import kernels, parallel
from jaxopt_suite.kernels import adam8, adam8_gpu, adam8_tile


@functools.partial(jax.jit, static_argnames="block")
def defined(g, moments, at, block):
    return adam8.adam8_update_definition(g, moments, at, block)


def interpreted(g, moments, at, block):
    mu, mu_scales, nu, nu_scales = moments
    u, mu, mu_scales, nu, nu_scales = adam8_gpu.update(
        *(at, g, mu, mu_scales.T, nu, nu_scales.T),
        block=block,
        interpret=plgpu.InterpretGPUParams(),
    )
    return u, kernels.Moments8(mu, mu_scales.T, nu, nu_scales.T)


def of_a_tile(g, moments, at, block):
    """What programs compute, four rows of a block at a time, with NumPy's arrays for tiles."""
    rows, columns = g.shape
    beyond = [(0, 0), (0, -columns % block)]
    entries = [np.pad(np.asarray(x), beyond) for x in (g, moments.mu, moments.nu)]
    scales = [np.array(x) for x in (moments.mu_scales, moments.nu_scales)]
    for group in range(scales[0].shape[1]):
        part = slice(group * block, (group + 1) * block)
        (g, mu, nu), (mu_scales, nu_scales) = (
            [x[:, part] for x in entries],
            [x[:, group] for x in scales],
        )
        width = jnp.int32(columns - group * block) if columns % block else block
        for row in range(0, rows, 4):
            tiles = g, mu, mu_scales, nu, nu_scales
            adam8_gpu._update_rows(slice(row, row + 4), list(at), tiles, width)
    u, mu, nu = (x[:, :columns] for x in entries)
    return u, kernels.Moments8(mu, scales[0], nu, scales[1])


@pytest.fixture
def outside_a_kernel(monkeypatch):
    """Layouts are of the registers of a GPU."""
    iota = lambda *arguments, layout: jax.lax.broadcasted_iota(*arguments)
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: jnp.array(x))
    monkeypatch.setattr(plgpu, "broadcasted_iota", iota)


def assert_steps_are_the_definition(step, grads, block):
    """From codes of the definition, step by step: a code apart would change the next steps."""
    moments = kernels.adam8_zeros(grads[0].shape, block=block)
    for at, g in enumerate(grads, start=1):
        u, found = step(g, moments, numbers(at), block)
        v, moments = defined(g, moments, numbers(at), block)
        assert u.dtype == g.dtype
        assert_directions_agree(u, v, g.dtype)
        assert_moments_agree(found, moments)


RAGGED = [
    ((37, 256), 256, "float32"),  # a tile, and five rows of a second
    ((33, 384), 128, "bfloat16"),  # three blocks a row, in four tiles; scales not in fours
    ((35, 400), 256, "float16"),  # rows end inside a block, at a multiple of 16 bytes
    ((32, 144), 128, "float32"),
]


@gpu_kernels.interpreted
@pytest.mark.parametrize(("shape", "block", "dtype"), RAGGED)
def test_interpreted_its_steps_are_the_definition(shape, block, dtype):
    grads = gradients(shape, 3, dtype)
    assert (np.sign(grads[0]) != np.sign(grads[1])).any()
    assert_steps_are_the_definition(interpreted, grads, block)


@pytest.mark.parametrize(("shape", "block", "dtype"), [((8, 256), 256, "bfloat16"), *RAGGED[3:]])
def test_what_is_computed_of_a_tile_is_the_definition(shape, block, dtype, outside_a_kernel):
    assert_steps_are_the_definition(of_a_tile, gradients(shape, 5, dtype), block)


def hard(value, shape):
    """Alone in a block, and in a block of its own, in the second of three steps."""
    number = HARD[value]
    return gradients(shape, 3).at[1, 1, 7].set(number).at[1, 3, 128:].set(number)


@gpu_kernels.interpreted
@pytest.mark.parametrize("value", list(HARD))
def test_interpreted_hard_numbers_are_what_they_are_by_definition(value):
    assert_steps_are_the_definition(interpreted, hard(value, (4, 256)), 128)


@pytest.mark.parametrize("value", list(HARD))
def test_hard_numbers_in_a_tile_are_what_they_are_by_definition(value, outside_a_kernel):
    assert_steps_are_the_definition(of_a_tile, hard(value, (4, 256)), 128)


def test_a_scale_below_the_smallest_normal_number_is_zero():
    """A CPU's XLA takes denormals for zeros, and a GPU does not: of moments no test could say."""
    smallest = np.finfo(np.float32).tiny
    largest = np.asarray([0, 1e-45, 1e-39, smallest, 3e38], np.float32)
    np.testing.assert_array_equal(adam8_tile.scale(largest), [0, 0, 0, smallest, largest[-1]])


def test_what_lies_beyond_the_end_of_a_row_is_in_no_scale(outside_a_kernel):
    """The copy engine reads zeros there, and code 0 is -0.99."""
    g = gradients((4, 144), 1)[0]
    moments = kernels.adam8_zeros(g.shape, block=128)
    for at, gradient in enumerate([g, -0.9 * g], start=1):  # the first moment is almost 0 again
        _, moments = of_a_tile(gradient, moments, numbers(at), 128)
    exact = 0.9 * 0.1 * g - 0.1 * 0.9 * g
    assert (moments.mu_scales[:, 1] < 0.01 * jnp.abs(0.1 * g[:, 128:]).max(axis=1)).all()
    assert jnp.abs(exact).max() < 1e-6


def test_the_root_is_that_of_every_number():
    x = jnp.asarray([0.0, 1e-37, 0.25, 2.0, 3.4e38, np.inf], jnp.float32)
    np.testing.assert_allclose(adam8_gpu._root(x), jnp.sqrt(x), rtol=3e-7)


def programs(shape, block, dtype):
    """The update of a leaf and its arguments."""
    struct = jax.ShapeDtypeStruct
    codes = struct(shape, jnp.uint8)
    scales = struct((*shape[:-1], -(-shape[-1] // block)), jnp.float32)
    moments = kernels.Moments8(codes, scales, codes, scales)

    def update(g, at, *moments):
        return kernels.adam8_update(g, kernels.Moments8(*moments), at, block=block, impl="pallas")

    return update, (struct(shape, dtype), struct((7,), jnp.float32), *moments)


WHOLE = {
    "float32": ((64, 256), 256, "float32"),
    "bfloat16": ((3, 32, 256), 128, "bfloat16"),
    "float16": ((64, 128), 256, "float16"),  # rows shorter than a block
}
PARTS = {"float32, a row ends inside a block": ((64, 400), 256, "float32")}


@pytest.mark.parametrize("case", [*WHOLE.values(), *PARTS.values()])
def test_on_each_platform_its_own_kernel_and_no_other_is_in_the_program(case):
    fn, arguments = programs(*case)
    gpu_kernels.assert_its_own_kernel_on_each_platform(fn, arguments)


def test_leaves_that_it_does_not_take_are_left_to_the_compiler():
    for shape in ((32, 200), (32, 392)):  # rows of bytes that begin at multiples of 8
        fn, arguments = programs(shape, 128, "float32")
        assert "mosaic_gpu" not in lowered(fn, *arguments)
        assert "@tpu_custom_call" in lowered(fn, *arguments, platform="tpu")

    fn, arguments = programs((32, 256), 128, "float8_e5m2")
    assert "mosaic_gpu" not in lowered(fn, *arguments)

    def on_gpu(g, moments, at, block):
        mu, mu_scales, nu, nu_scales = moments
        operands = at, g, mu, mu_scales.T, nu, nu_scales.T
        u, mu, mu_scales, nu, nu_scales = adam8._on_gpu(*operands, block=block)
        return u, kernels.Moments8(mu, mu_scales.T, nu, nu_scales.T)

    assert_steps_are_the_definition(on_gpu, gradients((32, 200), 2), 128)


def test_inside_shard_map_and_under_vmap_it_lowers_for_gpus():
    mesh = parallel.make_mesh({"worker": 2}, devices=jax.devices()[:2])
    parts, whole = P("worker"), P()
    for shape in ((64, 256), (64, 400)):
        fn, (g, at, *moments) = programs(shape, 256, "float32")
        specs = parts, whole, *[parts] * 4
        on_mesh = jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=parts)
        assert lowered(on_mesh, g, at, *moments).count("@mosaic_gpu_v2") == 1
        fleet = jax.vmap(fn, in_axes=(0, None, *[0] * 4))
        many = [x.update(shape=(3, *x.shape)) for x in (g, *moments)]
        assert lowered(fleet, many[0], at, *many[1:]).count("@mosaic_gpu_v2") == 1


@pytest.mark.parametrize(("block", "platform"), [(256, "cpu"), (256, "rocm"), (512, "cuda")])
def test_where_there_is_no_kernel_the_program_is_refused(block, platform):
    fn, arguments = programs((64, 512), block, "float32")
    message = f"adam8_update with block={block} for the platform '{platform}'; impl='xla' runs"
    with pytest.raises(NotImplementedError, match=message):
        lowered(fn, *arguments, platform=platform)


def compile_for(gpu):
    of = lambda cases: {name: programs(*case) for name, case in cases.items()}
    gpu_kernels.compile_programs(gpu, of(WHOLE))
    gpu_kernels.compile_programs(gpu, of(PARTS), temporary=2**14)  # scales are transposed


@gpu_kernels.compiled
@pytest.mark.parametrize(("gpu", "target"), gpu_kernels.TARGETS)
def test_it_compiles_for_gpus_that_are_not_there_and_spills_no_registers(gpu, target, tmp_path):
    reports = gpu_kernels.reports(__file__, gpu, tmp_path)
    assert len(reports) == len(WHOLE) + len(PARTS)
    for report in reports:
        gpu_kernels.assert_nothing_spilled(report, target)
