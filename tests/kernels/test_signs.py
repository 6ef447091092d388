"""Signs in blocks by the kernels: bit for bit the codec's where sums are exact, in one pass.

In which order a sum is taken is the compiler's choice, also of the codec's. Of powers of two no
order rounds: neither the sums of magnitudes nor those of squares, divided by the largest.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fleets import run_fleet

from jaxopt_suite import kernels, parallel
from jaxopt_suite.kernels import signs_tpu
from jaxopt_suite.optimizers.compression import compressed_mean, compressors, feedback
from jaxopt_suite.optimizers.compression.signs import SignPayload

BLOCK = 128
CASES = [
    ((128, 640), "l1"),  # as it lies, in two tiles of columns, the second one not full
    ((2, 320, 128), "l2"),  # likewise, in two tiles of rows
    ((40, 384), "l2"),  # laid out anew: no whole tiles in a slab
    ((3072,), "l1"),
]


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(signs_tpu, "_TILE", (32, 4 * BLOCK))


def drawn(*shape, seed=0):
    powers = np.random.default_rng(seed).choice([-4, -2, -1, 0, 1, 2, 4], size=shape)
    return jnp.asarray(powers, jnp.float32)


def assert_same_bits(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def by_codec(x, scale="l1"):
    codec = compressors.sign(scale, block=BLOCK)
    payload = codec.encode(x, None)
    return *payload, codec.decode(payload, x)


@pytest.mark.parametrize(("shape", "scale"), CASES)
def test_the_kernel_the_definition_and_the_codec_give_the_same_bits(shape, scale, small_tiles):
    x = drawn(*shape)
    for impl in ("interpret", "xla"):
        found = kernels.sign_encode(x, block=BLOCK, scale=scale, impl=impl)
        assert_same_bits(tuple(found), by_codec(x, scale))


@pytest.mark.parametrize("scale", ["l1", "l2"])
def test_scales_are_as_near_to_float64_as_the_codecs(scale):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 1024)), jnp.float32)
    rows = np.abs(np.asarray(x, np.float64)).reshape(-1, BLOCK)
    true = rows.mean(1) if scale == "l1" else np.sqrt(np.mean(rows**2, axis=1))
    found = kernels.sign_encode(x, block=BLOCK, scale=scale, impl="interpret")
    bits, scales, decoded = by_codec(x, scale)
    np.testing.assert_array_equal(found.bits, bits)
    error = lambda scales: np.abs(scales - true).max()
    assert error(found.scales) < max(1.5 * error(scales), 2e-7)  # a sum of 128 numbers about 1
    np.testing.assert_allclose(found.decoded, decoded, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (5,), (37, 100), (0, 128)])
def test_the_definition_is_the_codec_of_tensors_that_the_kernel_does_not_take(shape):
    x = drawn(*shape)
    assert_same_bits(tuple(kernels.sign_encode(x, block=BLOCK)), by_codec(x))
    made = compressors.sign(block=BLOCK, impl="interpret")
    payload, decoded = made.encode_decoded(x, None)
    assert_same_bits((*payload, decoded), by_codec(x))
    assert_same_bits(made.decode(payload, x), by_codec(x)[2])


@pytest.mark.parametrize("scale", ["l1", "l2"])
def test_hard_numbers_are_what_the_codec_makes_of_them_and_spoil_no_other_block(scale):
    x = drawn(64, 1024)
    hard = [0.0, -0.0, 2.0**-140, -(2.0**-120), 2.0**127, np.nan, np.inf, -np.inf]
    for i, value in enumerate(hard):
        columns = slice(128 * i, 128 * i + 128)
        x = x.at[9 * i // 2, columns].set(value).at[40 + i, 128 * i + 7].set(value)
    found = kernels.sign_encode(x, block=BLOCK, scale=scale, impl="interpret")
    assert_same_bits(tuple(found), by_codec(x, scale))
    spoilt = ~np.isfinite(np.asarray(found.scales))
    assert spoilt.sum() == (7 if scale == "l1" else 6)  # the sum leaves the range


def test_a_byte_has_the_first_slab_in_its_lowest_bit():
    x = -jnp.ones((64, 128)).at[8:16, 3].set(-2.0).at[63, 5].set(-1.0)
    bits = kernels.sign_encode(x, block=BLOCK, impl="interpret").bits.reshape(8, 128)
    expected = np.zeros((8, 128), np.uint8)
    expected[:, 3], expected[7, 5] = 2, 128
    np.testing.assert_array_equal(bits, expected)


@pytest.mark.parametrize(("shape", "owner"), [((128, 640), None), ((40, 384), 0), ((40, 384), 2)])
def test_the_mean_is_that_of_the_decoded_messages_in_their_order(shape, owner, small_tiles):
    messages, codec = drawn(3, *shape), compressors.sign(block=BLOCK)
    bits, scales = jax.vmap(lambda x: codec.encode(x, None))(messages)
    total = jnp.zeros(shape)
    for worker, message in enumerate(messages):
        decoded = codec.decode(SignPayload(bits[worker], scales[worker]), message)
        total = total + (message if worker == owner else decoded)
    own = None if owner is None else (messages[owner], jnp.int32(owner))
    for impl in ("interpret", "xla"):
        found = kernels.sign_mean(bits, scales, shape, own=own, block=BLOCK, impl=impl)
        np.testing.assert_array_equal(found, total / 3)


@pytest.mark.parametrize(
    ("exchange", "rule", "steps", "on_a_mesh"),
    [("gather", feedback.ef21(), 2, True), ("two_phase", feedback.ef(), 1, False)],
)
def test_a_compressed_mean_with_the_kernels_is_the_one_without(exchange, rule, steps, on_a_mesh):
    shapes = {"matrix": (16, 128), "odd": (4, 40)}
    inputs = {name: drawn(2, steps, *shape) for name, shape in shapes.items()}
    mesh = parallel.make_mesh({"worker": 2}, devices=jax.devices()[:2]) if on_a_mesh else None

    def run(impl):
        settings = {"axis_name": "worker", "feedback": rule, "exchange": exchange}
        codec = compressors.sign(block=BLOCK, impl=impl)
        tx = compressed_mean(codec, dense=lambda path, leaf: False, **settings)
        return run_fleet(tx, inputs, mesh=mesh)

    assert_same_bits(run("interpret"), run("auto"))


def test_on_a_cpu_auto_is_the_codec_as_it_was():
    encode = lambda impl: compressors.sign(block=256, impl=impl).encode
    lower = lambda impl: jax.jit(encode(impl)).lower(drawn(8, 512), None)
    assert lower("auto").as_text() == lower("xla").as_text()
    assert compressors.sign(block=256).encode_decoded is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compressors.sign(block=100, impl="pallas"), ValueError, "got block=100"),
        (lambda: compressors.sign(impl="interpret"), ValueError, "got block=None"),
        (lambda: compressors.sign(impl="cuda"), ValueError, "impl must be one of 'auto'"),
        (lambda: kernels.sign_encode(drawn(4), block=0), ValueError, "block must be"),
        (lambda: kernels.sign_encode(drawn(4), scale="max"), ValueError, "scale must be one of"),
        (
            lambda: kernels.sign_encode(drawn(9, 256), impl="interpret"),
            ValueError,
            r"got block=256 and shape \(9, 256\)",
        ),
        (
            functools.partial(kernels.sign_encode, jnp.ones(4, jnp.bfloat16)),
            TypeError,
            "x must be float32, got bfloat16",
        ),
    ],
)
def test_what_the_kernels_do_not_do_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_on_a_cpu_the_kernels_are_refused():
    x = drawn(8, 128)
    with pytest.raises(
        NotImplementedError, match="no Pallas kernel of sign_encode with block=128 for"
    ):
        jax.jit(lambda x: kernels.sign_encode(x, block=128, impl="pallas")).lower(x)
