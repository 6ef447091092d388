"""Coefficients of chunks by the kernel: the definition's, and of equal ones the first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fleets import normal, run_fleet

from jaxopt_suite import kernels, parallel
from jaxopt_suite.kernels import dct, dct_tpu
from jaxopt_suite.optimizers.compression import compressed_mean, compressors, feedback
from jaxopt_suite.optimizers.compression import dct as codec
from jaxopt_suite.optimizers.demo import scale_by_demo

cosines = dct.dct_matrix


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(dct_tpu, "_BANDS", 2)
    monkeypatch.setattr(dct_tpu, "_COLUMNS", 128)


@pytest.fixture
def exact(monkeypatch):
    """Signs in the place of cosines: of small integers every sum is exact in whatever order."""
    for module in (dct, codec):
        monkeypatch.setattr(module, "dct_matrix", signs)


def signs(length):
    """An orthonormal matrix of entries ±1/√n that is not symmetric; cosines if n is no 4^m."""
    matrix = np.ones((1, 1))
    while len(matrix) < length:
        matrix = np.kron(matrix, np.kron([[1, 1], [1, -1]], [[1, 1], [1, -1]]))
    if len(matrix) != length:
        return cosines(length)
    shuffled = np.random.default_rng(length).permutation(length)
    return (matrix[shuffled] / np.sqrt(length)).astype(np.float32)


def drawn(*shape, seed=0, integers=False):
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, size=shape) if integers else rng.normal(size=shape)
    return jnp.asarray(x, jnp.float32)


def in_order(found):
    """As NumPy arrays, each chunk's coefficients by their indices."""
    values, indices, decoded = map(np.asarray, found)
    order = np.argsort(indices, axis=1)
    return *(np.take_along_axis(x, order, axis=1) for x in (values, indices)), decoded


def assert_same_bits(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def both(x, k, sides, **settings):
    run = functools.partial(kernels.dct_top_k, x, k, sides, **settings)
    return in_order(run(impl="interpret")), in_order(run(impl="xla"))


@pytest.mark.parametrize(
    ("shape", "k", "sides"),
    [
        ((2, 40, 150), 5, (16, 16)),  # tiles of two rows of chunks, the last of each not full
        ((20, 24), 7, (16, 64)),
        ((70, 130), 64, (64, 64)),  # as many coefficients as slots
    ],
)
def test_where_arithmetic_is_exact_all_bits_are_the_definitions(
    shape, k, sides, exact, small_tiles
):
    x = drawn(*shape[-2:], integers=True)
    found, expected = both(jnp.broadcast_to(x, shape), k, sides)
    assert_same_bits(found, expected)
    magnitudes = -np.sort(-np.abs(coefficients(x, sides)), axis=1)
    assert np.any(magnitudes[:, k - 1] == magnitudes[:, k])  # or ties would not be tested


@pytest.mark.parametrize(
    ("shape", "k", "sides"), [((64, 192), 32, (64, 64)), ((40, 50), 7, (8, 8))]
)
@pytest.mark.parametrize("values", ["float32", "bfloat16"])
def test_cosines_are_as_near_to_float64_as_the_definitions(shape, k, sides, values):
    x = drawn(*shape)
    found, expected = both(x, k, sides, values=values)
    np.testing.assert_array_equal(found[1], expected[1])
    exact = coefficients(x, sides)
    rounded = lambda y: np.asarray(jnp.asarray(y, jnp.float32).astype(values), np.float64)
    true = np.take_along_axis(exact, expected[1], axis=1)
    if values == "float32":
        error = lambda values: np.abs(values - true).max()
        assert error(found[0]) <= 1.5 * error(expected[0]) < 1e-5
    else:
        np.testing.assert_allclose(found[0], rounded(true), rtol=2**-7)  # a rounding apart
    # Sums of some hundred products of numbers about 1.
    np.testing.assert_allclose(found[2], expected[2], atol=1e-5 if values == "float32" else 2e-2)


def coefficients(x, sides):
    """Of every chunk, in float64: ``[chunks, a b]``."""
    (a, b), x = sides, np.asarray(x, np.float64)
    padded = np.pad(x, [(0, -n % s) for n, s in zip(x.shape, sides, strict=True)])
    chunks = padded.reshape(len(padded) // a, a, -1, b).swapaxes(1, 2)
    rows, columns = (dct.dct_matrix(n).astype(np.float64) for n in sides)
    return (rows @ chunks @ columns.T).reshape(-1, a * b)


def test_the_last_bit_of_a_magnitude_counts_and_of_equal_ones_the_first_is_taken(monkeypatch):
    for module in (dct, codec):
        monkeypatch.setattr(module, "dct_matrix", lambda n: np.eye(n, dtype=np.float32))
    rng = np.random.default_rng(0)
    last_bits = rng.integers(0, 6, size=(16, 48)) * 2.0**-23
    x = jnp.asarray(rng.choice([-1, 1], size=(16, 48)) * (1 + last_bits), jnp.float32)
    found, expected = both(x, 12, (16, 16))
    assert_same_bits(found, expected)
    magnitudes = -np.sort(-np.abs(coefficients(x, (16, 16))), axis=1)
    assert np.any(magnitudes[:, 11] == magnitudes[:, 12])


def test_chunks_with_few_coefficients_and_of_all_sizes_are_the_definitions(exact):
    x = drawn(16, 80, integers=True)
    for i, value in enumerate([0.0, 2.0**-140, 2.0**-120, 2.0**120]):  # powers of two: still exact
        x = x.at[:, 16 * i : 16 * i + 16].set(value)  # one coefficient, or none
        x = x.at[2:3, 16 * i : 16 * i + 16].multiply(i)
    found, expected = both(x, 12, (16, 16))
    assert_same_bits(found, expected)
    np.testing.assert_array_equal(found[1][0], np.arange(12))


def test_a_chunk_that_is_not_finite_is_spoilt_and_no_other(exact):
    fine = drawn(16, 64, integers=True)
    x = fine.at[2, 20].set(np.nan).at[5, 40].set(np.inf)
    x = x.at[2, 48:64].set(3e38)  # a sum of which is infinite
    spoilt, expected = (kernels.dct_top_k(y, 6, (16, 16), impl="interpret") for y in (x, fine))
    assert_same_bits([y[0] for y in spoilt[:2]], [y[0] for y in expected[:2]])
    assert not np.isfinite(spoilt.values[1:]).any()
    assert all(len(set(row)) == 6 for row in np.asarray(spoilt.indices))
    np.testing.assert_array_equal(spoilt.decoded[:, :16], expected.decoded[:, :16])
    assert np.isnan(spoilt.decoded[:, 16:]).all()
    plain = kernels.dct_top_k(x, 6, (16, 16), impl="xla")
    assert not np.isfinite(plain.decoded[:, 16:]).any()


def test_a_message_of_the_codec_is_decoded_to_what_the_codec_with_the_kernel_says(exact):
    x = drawn(3, 20, 40, integers=True)
    plain, made = (
        compressors.dct_top_k(9, side=16, values="bfloat16", impl=impl)
        for impl in ("auto", "interpret")
    )
    payload, decoded = made.encode_decoded(x, None)
    expected = plain.decode(plain.encode(x, None), x)
    assert_same_bits([decoded, made.decode(payload, x)], [expected, expected])
    assert sum(a.nbytes for a in payload) == made.nbytes(x.shape)


def test_tensors_that_the_kernel_does_not_take_are_the_codecs():
    made, plain = (compressors.dct_top_k(3, side=16, impl=i) for i in ("interpret", "auto"))
    for shape in [(40,), (7, 40), (4, 0)]:
        x = drawn(*shape)
        payload, decoded = made.encode_decoded(x, None)
        assert_same_bits(payload, plain.encode(x, None))
        assert_same_bits(decoded, plain.decode(payload, x))


SHAPES = {"matrix": (20, 40), "another": (16, 17), "odd": (3, 30)}
never = lambda path, leaf: False


def integers(shapes):
    inputs = normal(shapes, steps=2, workers=2)
    return jax.tree.map(lambda x: jnp.round(4 * x), inputs)


@pytest.mark.parametrize("on_a_mesh", [False, True])
def test_demo_with_the_kernel_is_demo_to_the_bit(on_a_mesh, exact):
    mesh = parallel.make_mesh({"worker": 2}, devices=jax.devices()[:2]) if on_a_mesh else None

    def run(impl):
        settings = {"axis_name": "worker", "k": 5, "side": 16, "alpha": 0.5, "phi": "identity"}
        tx = scale_by_demo(0.5, dense=never, impl=impl, **settings)
        return run_fleet(tx, integers(SHAPES), mesh=mesh)

    assert_same_bits(run("interpret"), run("auto"))


def test_a_compressed_mean_with_error_feedback_is_the_one_without_the_kernel(exact):
    def run(impl):
        made = compressors.dct_top_k(5, side=16, impl=impl)
        settings = {"axis_name": "worker", "feedback": feedback.ef(), "dense": never}
        return run_fleet(compressed_mean(made, **settings), integers({"matrix": (3, 16, 20)}))

    assert_same_bits(run("interpret"), run("auto"))


def test_on_a_cpu_auto_is_the_codec_as_it_was():
    lower = lambda impl: jax.jit(compressors.dct_top_k(impl=impl).encode).lower(
        drawn(64, 128), None
    )
    assert lower("auto").as_text() == lower("xla").as_text()
    assert compressors.dct_top_k().encode_decoded is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.dct_top_k(drawn(8, 8), 0, (8, 8)), ValueError, "k must be"),
        (lambda: kernels.dct_top_k(drawn(8, 8), 65, (8, 8)), ValueError, "no k=65 coefficients"),
        (lambda: kernels.dct_top_k(drawn(8), 1, (8, 8)), ValueError, "rows and columns, got shape"),
        (
            lambda: kernels.dct_top_k(drawn(8, 8).astype(jnp.bfloat16), 1, (8, 8)),
            TypeError,
            "x must be float32, got bfloat16",
        ),
        (
            lambda: kernels.dct_top_k(drawn(8, 8), 1, (8, 8), values="float16"),
            ValueError,
            "values must be one of",
        ),
        (
            lambda: kernels.dct_top_k(drawn(8, 9), 1, (8, 9), impl="interpret"),
            ValueError,
            r"got sides=\(8, 9\), k=1",
        ),
        (lambda: scale_by_demo(axis_name="w", impl="cuda"), ValueError, "impl must be one of"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_which_chunks_the_kernel_takes():
    taken = [(64, 64), (8, 128), (128, 32)]
    left = [(136, 64), (12, 64), (64, 4), (64, 48), (1, 64), (64, 16)]
    assert all(kernels.dct_top_k_takes(sides, 32) for sides in taken)
    assert not any(kernels.dct_top_k_takes(sides, 32) for sides in left)
