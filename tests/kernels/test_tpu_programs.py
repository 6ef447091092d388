"""Kernels compiled for TPUs that are not there: accepted, in the program, without copies."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_suite import kernels, parallel
from jaxopt_suite.optimizers import adamw_8bit, roots
from jaxopt_suite.optimizers.compression import compressed_mean, compressors
from jaxopt_suite.optimizers.demo import demo
from jaxopt_suite.optimizers.shampoo import shampoo
from jaxopt_suite.parallel import topologies

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu-aot (libtpu)"
)
CHIPS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name, value in topologies.SETTINGS.items():
        monkeypatch.setenv(name, value)


def one_chip(topology):
    devices = np.array(topologies.describe(topology).devices[:1])
    return NamedSharding(Mesh(devices, ("chip",), axis_types=(AxisType.Auto,)), P())


def compiled(fn, topology, *structs, donate=()):
    place = one_chip(topology)
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in structs]
    return jax.jit(fn, donate_argnums=donate).lower(*args).compile()


@pytest.mark.parametrize("topology", CHIPS)
@pytest.mark.parametrize("mode", [0, 1])
def test_the_gram_update_compiles_and_writes_over_its_statistic(topology, mode):
    update = lambda s, g: kernels.gram_update(s, g, 0.9, 0.1, mode=mode, impl="pallas")
    k, d, n = 8, 1152, 1280  # rests of tiles; other multiples than of 128 XLA may lay out anew
    shape = (k, d, n) if mode == 0 else (k, n, d)
    program = compiled(
        update, topology, ((k, d, d), jnp.float32), (shape, jnp.float32), donate=(0,)
    )
    memory = program.memory_analysis()
    assert "gram_update" in program.as_text()
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes
    assert memory.temp_size_in_bytes < 2**20  # of 42 MB of statistics none is copied


@pytest.mark.parametrize(
    ("shape", "mode", "dtype", "kept"),
    [
        ((3, 19, 7), 0, jnp.float32, jnp.float32),
        ((3, 7, 19), 1, jnp.float32, jnp.bfloat16),
        ((2, 600, 40), 0, jnp.bfloat16, jnp.float32),
        ((2, 40, 600), 1, jnp.bfloat16, jnp.bfloat16),
        ((2, 500), 0, jnp.float32, jnp.float32),
        ((2, 1, 1), 0, jnp.float32, jnp.float32),
        ((2, 3, 130, 64), 1, jnp.float32, jnp.float32),
    ],
)
def test_the_gram_update_compiles_for_shapes_that_fit_no_tile(shape, mode, dtype, kept):
    update = functools.partial(kernels.gram_update, mode=mode, impl="pallas")
    d = shape[mode + 1]
    structs = ((shape[0], d, d), kept), (shape, dtype), ((), jnp.float32), ((), jnp.float32)
    assert "gram_update" in compiled(update, "v5e:2x2", *structs).as_text()


@pytest.mark.parametrize("topology", CHIPS)
@pytest.mark.parametrize("n", [1024, 1152, 19])
def test_the_symmetric_product_compiles_and_copies_nothing(topology, n):
    struct = ((4, n, n), jnp.float32)
    multiply = functools.partial(kernels.symmetric_product, impl="pallas")
    program = compiled(multiply, topology, struct, struct)
    assert "symmetric_product" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 2**20


def test_a_train_step_on_sixteen_chips_has_the_kernels_of_shampoo_on_every_one():
    devices = topologies.describe("v5e:4x4").devices
    mesh = parallel.make_mesh({"data": 4, "model": 4}, devices=devices)
    params = {"w": jax.ShapeDtypeStruct((512, 2048), jnp.float32)}
    solver = roots.CoupledNewton(product_impl="pallas")
    settings = {"block_size": 512, "solver": solver, "stack_multiple": 16}
    tx = shampoo(0.1, gram_impl="pallas", **settings)
    loss = lambda p, batch: jnp.mean(jnp.square(batch @ p["w"]))
    step = parallel.make_train_step(loss, tx, mesh, param_specs={"w": P(None, "model")})
    program = step.lower(params, jax.ShapeDtypeStruct((64, 512), jnp.float32)).compile()
    calls = [line for line in program.as_text().splitlines() if "custom-call" in line]
    assert sum("gram_update" in line for line in calls) == 2  # one a side
    assert sum("symmetric_product" in line for line in calls) == 4  # a step of Newton's has as many


@pytest.mark.parametrize("topology", CHIPS)
@pytest.mark.parametrize("shape", [(1000, 4352), (777, 300)])
def test_int8_compiles_and_needs_no_temporary_memory_where_blocks_lie_in_rows(topology, shape):
    encode = functools.partial(kernels.int8_encode, impl="pallas")
    program = compiled(encode, topology, (shape, jnp.float32))
    assert "int8_encode" in program.as_text()
    size = shape[0] * shape[1]
    if shape[1] % 256 == 0:
        assert (
            program.memory_analysis().temp_size_in_bytes < 2 * size
        )  # codes, before they lie flat

    mean = lambda codes, scales: kernels.int8_mean(codes, scales, shape, impl="pallas")
    payloads = ((4, size), jnp.int8), ((4, -(-size // 256)), jnp.float32)
    assert "int8_mean" in compiled(mean, topology, *payloads).as_text()


def test_a_train_step_of_eight_workers_moves_less_memory_with_the_int8_kernels():
    mesh = parallel.make_mesh({"worker": 8}, devices=topologies.describe("v5e:2x4").devices)
    params = {"w": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)}
    loss = lambda p, batch: jnp.mean(jnp.square(batch @ p["w"]))

    def bytes_accessed(impl):
        mean = compressed_mean(compressors.int8(impl=impl), axis_name="worker", exchange="gather")
        step = parallel.make_train_step(
            loss, optax.chain(mean, optax.sgd(0.1)), mesh, worker_axis="worker"
        )
        program = step.lower(params, jax.ShapeDtypeStruct((64, 1024), jnp.float32)).compile()
        assert ("int8_encode" in program.as_text()) == (impl == "pallas")
        return program.cost_analysis()["bytes accessed"]

    assert bytes_accessed("pallas") < 0.7 * bytes_accessed("xla")


@pytest.mark.parametrize(
    ("topology", "shape", "dtype"),
    [
        *[(chip, (1000, 4352), jnp.float32) for chip in CHIPS],  # the last tiles are not full
        ("v5e:2x2", (777, 300), jnp.bfloat16),  # rows end inside a block
        ("v5e:2x2", (3, 40, 128), jnp.float32),  # and are shorter than one
    ],
)
def test_adam_in_8_bits_compiles_and_writes_over_gradient_and_state(topology, shape, dtype):
    def update(g, *moments):
        numbers = kernels.adam8_numbers(0.9, 0.999, 1e-8, (0.1, 0.001))
        return kernels.adam8_update(g, kernels.Moments8(*moments), numbers, impl="pallas")

    codes = (shape, jnp.uint8)
    scales = ((*shape[:-1], -(-shape[-1] // 256)), jnp.float32)
    structs = ((shape, dtype), codes, scales, codes, scales)
    program = compiled(update, topology, *structs, donate=range(5))
    memory = program.memory_analysis()
    assert "adam8_update" in program.as_text()
    assert memory.alias_size_in_bytes >= 0.99 * memory.output_size_in_bytes
    if shape == (1000, 4352):
        assert memory.temp_size_in_bytes < 2**18  # of 17 MB of gradient none is copied


def test_a_train_step_on_sixteen_chips_takes_less_memory_with_adam_in_8_bits():
    devices = topologies.describe("v5e:4x4").devices
    mesh = parallel.make_mesh({"data": 4, "model": 4}, devices=devices)
    params = {"w": jax.ShapeDtypeStruct((4096, 8192), jnp.float32)}
    loss = lambda p, batch: jnp.mean(jnp.square(batch @ p["w"]))

    def peak(tx, kernel):
        step = parallel.make_train_step(loss, tx, mesh, param_specs={"w": P("data", "model")})
        program = step.lower(params, jax.ShapeDtypeStruct((64, 4096), jnp.float32)).compile()
        assert ("adam8_update" in program.as_text()) == kernel
        memory = program.memory_analysis()
        return memory.argument_size_in_bytes, memory.temp_size_in_bytes

    held, temporary = peak(adamw_8bit(0.1, impl="pallas"), True)
    plain, plain_temporary = peak(optax.adamw(0.1), False)
    size = 4096 * 8192 // 16
    assert plain - held == pytest.approx((6 - 8 / 256) * size, rel=1e-3)
    assert plain + plain_temporary - held - temporary > 5.75 * size


@pytest.mark.parametrize("topology", CHIPS)
def test_coefficients_of_chunks_compile_and_no_copy_of_the_chunks_is_made(topology):
    shape = (3, 1000, 4352)  # rests of tiles
    find = lambda x: kernels.dct_top_k(x, 32, (64, 64), values="bfloat16", impl="pallas")
    program = compiled(find, topology, (shape, jnp.float32))
    assert "dct_top_k" in program.as_text()
    # Only what was found, before it lies by chunks, and that padded to 128; no entries.
    assert program.memory_analysis().temp_size_in_bytes < 3 * 1000 * 4352


@pytest.mark.parametrize(
    ("shape", "k", "sides"),
    [((20, 24), 5, (8, 8)), ((130, 100), 32, (128, 32)), ((16, 300), 1, (16, 128))],
)
def test_other_chunks_compile_too(shape, k, sides):
    find = lambda x: kernels.dct_top_k(x, k, sides, impl="pallas")
    assert "dct_top_k" in compiled(find, "v5e:2x2", (shape, jnp.float32)).as_text()


def test_a_train_step_of_demo_on_sixteen_chips_moves_less_memory_with_the_kernel():
    devices = topologies.describe("v5e:4x4").devices
    mesh = parallel.make_mesh({"worker": 4, "model": 4}, devices=devices)
    params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
    loss = lambda p, batch: jnp.mean(jnp.square(batch @ p["w"]))

    def bytes_accessed(impl):
        tx = demo(0.1, axis_name="worker", impl=impl)
        specs = {"param_specs": {"w": P(None, "model")}, "worker_axis": "worker"}
        step = parallel.make_train_step(loss, tx, mesh, **specs)
        program = step.lower(params, jax.ShapeDtypeStruct((64, 512), jnp.float32)).compile()
        calls = [line for line in program.as_text().splitlines() if "%dct_top_k" in line]
        assert any("custom-call" in line for line in calls) == (impl == "pallas")
        return program.cost_analysis()["bytes accessed"]

    assert bytes_accessed("pallas") < 0.85 * bytes_accessed("xla")


@pytest.mark.parametrize("topology", CHIPS)
@pytest.mark.parametrize("shape", [(576, 1280), (24, 1024)])  # as it lies; laid out anew
def test_signs_compile_and_need_little_temporary_memory(topology, shape):
    size = shape[0] * shape[1]
    encode = functools.partial(kernels.sign_encode, scale="l2", impl="pallas")
    program = compiled(encode, topology, (shape, jnp.float32))
    assert "sign_encode" in program.as_text()
    mean = lambda bits, scales: kernels.sign_mean(bits, scales, shape, impl="pallas")
    payloads = ((4, size // 8), jnp.uint8), ((4, size // 256), jnp.float32)
    assert "sign_mean" in compiled(mean, topology, *payloads).as_text()
    if shape[0] % 64 == 0:  # scales are padded to 128 columns, bits are copied before they lie flat
        assert program.memory_analysis().temp_size_in_bytes < size


def test_a_train_step_on_sixteen_chips_has_the_kernels_of_signs():
    mesh = parallel.make_mesh({"worker": 16}, devices=topologies.describe("v5e:4x4").devices)
    mean = compressed_mean(compressors.sign(block=256, impl="pallas"), axis_name="worker")
    loss = lambda p, batch: jnp.mean(jnp.square(batch @ p["w"]))
    tx = optax.chain(mean, optax.sgd(0.1))
    step = parallel.make_train_step(loss, tx, mesh, worker_axis="worker")
    params = {"w": jax.ShapeDtypeStruct((256, 1024), jnp.float32)}
    program = step.lower(params, jax.ShapeDtypeStruct((64, 256), jnp.float32)).compile()
    assert all(name in program.as_text() for name in ("sign_encode", "sign_mean"))
