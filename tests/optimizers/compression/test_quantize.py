"""8 and 4 bits: exact maxima, levels by hand, ranges of the formats."""

import jax
import numpy as np
import pytest
from compressor_cases import draws, round_trip

from jaxopt_suite.optimizers.compression.quantize import fp8, int4, int8

ALL = [int8(8), int8(8, stochastic=True), int4(8), int4(8, stochastic=True)]
FP8 = [fp8(block=8), fp8("e5m2", block=8)]


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("compressor", ALL + FP8, ids=lambda c: c.name)
def test_the_largest_entry_of_a_block_is_exact_to_the_last_bits(compressor, magnitude):
    x = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32) * np.float32(magnitude)
    found = np.asarray(jax.jit(lambda x: round_trip(compressor, x))(x))
    where = np.arange(500), np.argmax(np.abs(x), axis=1)
    # two roundings, of the step and of its product with the code
    np.testing.assert_allclose(found[where], x[where], rtol=2.4e-7)


@pytest.mark.parametrize(("make", "levels"), [(int8, 127), (int4, 7)])
def test_entries_are_rounded_to_the_nearest_level(make, levels):
    x = np.random.default_rng(1).normal(size=100)
    step = np.max(np.abs(x)) / levels
    expected = np.round(x / step) * step
    np.testing.assert_allclose(round_trip(make(None), x), expected, rtol=1e-5)  # float32 scale


@pytest.mark.parametrize(("make", "levels"), [(int8, 127), (int4, 7)])
def test_stochastic_rounding_takes_the_two_levels_beside_and_keeps_levels(make, levels):
    x = np.asarray([1.0, 0.3, -0.55, 3 / levels, 0.0])
    found = draws(make(stochastic=True), x, 500) * levels
    np.testing.assert_allclose(found, np.round(found), atol=1e-4)  # whole levels
    assert np.all(np.abs(found - x * levels) < 1 + 1e-4)
    assert [np.unique(np.round(column)).size for column in found.T] == [1, 2, 2, 1, 1]


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_fp8_keeps_its_relative_precision_down_to_the_smallest_normal(name):
    largest, smallest, error = {"e4m3": (448, 2**-6, 2**-4), "e5m2": (57344, 2**-14, 2**-3)}[name]
    x = np.geomspace(smallest / largest * 1.01, 1, 5000)
    found = np.asarray(round_trip(fp8(name), x))
    assert np.max(np.abs(found - x) / x) <= error * (1 + 1e-5)  # rounding of the scale


def test_a_block_with_a_nan_leaves_the_other_blocks_alone():
    x = np.arange(1.0, 33.0)
    x[9] = np.nan
    for compressor in ALL + FP8:
        found = np.asarray(round_trip(compressor, x)).reshape(4, 8)
        assert np.all(np.isnan(found[1]))
        assert np.all(np.isfinite(found[[0, 2, 3]]))


def test_defaults_and_bytes():
    assert int8().nbytes((1000,)) == 1000 + 4 * 4
    assert int4().nbytes((1001,)) == 501 + 4 * 16
    assert fp8().nbytes((10, 10)) == 104
    assert (int8().block, int4().block, fp8().block) == (256, 64, 1)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: int8(0), (ValueError, "block must be an int of at least 1, got 0")),
        (lambda: int4(2.5), (TypeError, "block must be an int, got 2.5")),
        (lambda: fp8("e3m4"), (ValueError, "number_format must be one of 'e4m3', 'e5m2'")),
    ],
)
def test_bad_arguments_are_refused(make, error):
    with pytest.raises(error[0], match=error[1]):
        make()
