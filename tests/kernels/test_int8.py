"""Codes of 8 bits by the kernels: bit for bit those of the codec, in one pass; and their mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fleets import normal, run_fleet

from jaxopt_suite import kernels, parallel
from jaxopt_suite.kernels import int8_tpu
from jaxopt_suite.optimizers.compression import compressed_mean, compressors, feedback
from jaxopt_suite.optimizers.compression.quantize import QuantizedPayload

BLOCK = 128
SHAPES = [
    (4, 512),
    (70, 640),  # two tiles of rows and two of columns, of each the second one not full
    (3, 11, 256),
    (37, 100),
    (),
    (0, 128),
]
HARD = {
    "zeros": 0.0,
    "denormal": 1e-40,
    "largest": 3.4e38,
    "not a number": np.nan,
}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(int8_tpu, "_ENTRIES", 32 * 4 * BLOCK)
    monkeypatch.setattr(int8_tpu, "_GROUPS", 4)
    monkeypatch.setattr(int8_tpu, "_FLAT_GROUPS", 3)


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_same_bits(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_same_means(found, expected):
    """But for a rounding a worker: a compiler rounds a product and its sum once or twice."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_the_definition_and_the_codec_give_the_same_bits(shape, small_tiles):
    x, codec = drawn(*shape), compressors.int8(BLOCK)
    payload = codec.encode(x, None)
    expected = (*payload, codec.decode(payload, x))
    for impl in ("interpret", "xla"):
        assert_same_bits(tuple(kernels.int8_encode(x, block=BLOCK, impl=impl)), expected)


@pytest.mark.parametrize("value", list(HARD))
def test_hard_numbers_are_what_the_codec_makes_of_them_and_spoil_no_other_block(value, small_tiles):
    x = drawn(3, 512).at[1, 128:256].set(HARD[value]).at[2, 7].set(HARD[value])
    codec = compressors.int8(BLOCK)
    payload = codec.encode(x, None)
    expected = codec.decode(payload, x)
    codes, scales, decoded = kernels.int8_encode(x, block=BLOCK, impl="interpret")
    np.testing.assert_array_equal(scales, payload.scales)
    np.testing.assert_array_equal(decoded, expected)
    fine = np.isfinite(np.repeat(scales, BLOCK))  # codes of a block that is not finite say nothing
    np.testing.assert_array_equal(codes[fine], payload.codes[fine])


@pytest.mark.parametrize("shape", [(70, 640), (37, 100)])
@pytest.mark.parametrize("owner", [None, 0, 2])
def test_the_mean_is_that_of_the_decoded_messages_in_their_order(shape, owner, small_tiles):
    messages, codec = drawn(3, *shape), compressors.int8(BLOCK)
    codes, scales = jax.vmap(lambda x: codec.encode(x, None))(messages)
    total = jnp.zeros(shape)
    for worker, message in enumerate(messages):
        decoded = codec.decode(QuantizedPayload(codes[worker], scales[worker]), message)
        total = total + (message if worker == owner else decoded)
    own = None if owner is None else (messages[owner], jnp.int32(owner))
    for impl in ("interpret", "xla"):
        found = kernels.int8_mean(codes, scales, shape, own=own, block=BLOCK, impl=impl)
        assert_same_means(found, total / 3)


@pytest.mark.parametrize(
    ("exchange", "rule", "shapes"),
    [
        ("gather", feedback.ef21(), {"matrix": (33, 256), "odd": (9, 30)}),
        ("two_phase", feedback.ef(), {"odd": (9, 50)}),
    ],
)
def test_a_compressed_mean_with_the_kernels_is_the_one_without(exchange, rule, shapes):
    inputs = normal(shapes, steps=2, workers=3)

    def run(impl):
        tx = compressed_mean(
            compressors.int8(BLOCK, impl=impl),
            axis_name="worker",
            feedback=rule,
            exchange=exchange,
            dense=lambda path, leaf: False,
        )
        return run_fleet(tx, inputs)

    assert_same_means(run("interpret"), run("auto"))


def test_on_a_mesh_too(small_tiles):
    inputs = normal({"matrix": (4, 256)}, steps=1, workers=2)
    mesh = parallel.make_mesh({"worker": 2}, devices=jax.devices()[:2])
    settings = {"axis_name": "worker", "exchange": "two_phase"}
    run = lambda impl: run_fleet(
        compressed_mean(compressors.int8(BLOCK, impl=impl), **settings), inputs, mesh=mesh
    )
    assert_same_means(run("interpret"), run("auto"))


def test_on_a_cpu_auto_is_the_codec_as_it_was():
    lower = lambda impl: jax.jit(compressors.int8(impl=impl).encode).lower(drawn(4, 512), None)
    assert lower("auto").as_text() == lower("xla").as_text()
    assert compressors.int8().encode_decoded is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compressors.int8(100, impl="pallas"), ValueError, "multiple of 128, got stoch"),
        (lambda: compressors.int8(None, impl="pallas"), ValueError, "and block=None"),
        (lambda: compressors.int8(stochastic=True, impl="interpret"), ValueError, "stochastic=Tru"),
        (lambda: compressors.int8(impl="cuda"), ValueError, "impl must be one of 'auto'"),
        (
            lambda: kernels.int8_encode(drawn(4), block=100, impl="interpret"),
            ValueError,
            "block=100",
        ),
        (
            functools.partial(kernels.int8_encode, jnp.ones(4, jnp.bfloat16)),
            TypeError,
            "x must be float32, got bfloat16",
        ),
    ],
)
def test_what_the_kernels_do_not_do_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
