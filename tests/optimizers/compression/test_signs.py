"""One and two bits: zeros, scales, clipping."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor_cases import draws, relative_error, round_trip

from jaxopt_suite.optimizers.compression.signs import pack_ternary, sign, ternary, unpack_ternary


def test_zero_and_minus_zero_count_as_positive():
    np.testing.assert_array_equal(round_trip(sign(), [0.0, -0.0, -4.0, 2.0]), [1.5, 1.5, -1.5, 1.5])


def test_scales_are_the_mean_magnitude_and_the_root_mean_square_of_each_block():
    x = np.asarray([3.0, -4.0, 0.0, 1.0, 2.0])
    np.testing.assert_allclose(round_trip(sign(block=2), x), [3.5, -3.5, 0.5, 0.5, 2.0], rtol=1e-6)
    root = math.sqrt(12.5)
    expected = [root, -root, math.sqrt(0.5), math.sqrt(0.5), 2.0]  # the short block holds one entry
    np.testing.assert_allclose(round_trip(sign("l2", block=2), x), expected, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_the_l2_scale_survives_squares_that_leave_the_range(magnitude):
    x = magnitude * np.asarray([3.0, -4.0])
    expected = magnitude * math.sqrt(12.5) * np.asarray([1, -1])
    np.testing.assert_allclose(round_trip(sign("l2"), x), expected, rtol=1e-6)


def test_errors_are_the_formulas_of_the_norm_ratio():
    x = np.random.default_rng(0).standard_t(3, size=2000)
    rho = np.sum(np.abs(x)) / math.sqrt(x.size * np.sum(x**2))
    assert relative_error(sign(), x) == pytest.approx(1 - rho**2, rel=1e-4)  # float32 sums
    assert relative_error(sign("l2"), x) == pytest.approx(2 * (1 - rho), rel=1e-4)


def test_the_l2_scale_is_no_contraction_on_a_sparse_tensor():
    assert relative_error(sign("l2"), np.eye(1, 100)) > 1
    assert sign("l2").contraction is None


def test_ternary_noise_is_the_formula_and_reaches_its_bound():
    x = np.full(81, 0.1)
    x[0] = 1.0  # the worst tensor of 81 entries: 1/(1 + √81)
    found = draws(ternary(), x, 4000)
    ratio = np.sum((found - x) ** 2, axis=1) / np.sum(x**2)
    assert ternary().variance((81,)) == 4.0
    assert np.mean(ratio) == pytest.approx(4.0, abs=4 * np.std(ratio) / math.sqrt(4000))


def test_clipping_sends_what_exceeds_the_scale_for_sure():
    rng = np.random.default_rng(0)
    x = rng.normal(size=1000)
    scale = 2.5 * np.std(x)
    found = draws(ternary(clip=2.5), x, 4000)
    np.testing.assert_allclose(np.unique(np.abs(found)), [0, scale], rtol=1e-5)
    clipped = np.clip(x, -scale, scale)
    error = np.sqrt((np.abs(clipped) * scale - clipped**2) / 4000)
    # 5: the largest of a thousand normal deviations; scale / 4000: one hit of a rare entry
    assert np.all(np.abs(np.mean(found, axis=0) - clipped) <= 5 * error + scale / 4000)


@pytest.mark.parametrize("x", [[2.0], [2.0, 2.0, 2.0]])
def test_clipping_leaves_equal_entries_alone(x):
    np.testing.assert_array_equal(round_trip(ternary(clip=2.5), x), x)


def test_clipping_ignores_the_padding_of_the_last_block():
    x = np.asarray([1.0, -1.0, 1.0, -1.0, 5.0, 5.0])
    np.testing.assert_array_equal(round_trip(ternary(4, clip=1.0), x), x)


def test_numbers_of_a_shared_scale_add_up():
    rows = jnp.asarray([[1.0, -1.0, 0.0, 0.5, -0.5]])
    codes = pack_ternary(rows, jnp.asarray([2.0]), jax.random.key(0), 5)
    trits = unpack_ternary(codes, 5)
    assert trits.dtype == jnp.int8
    assert trits[2] == 0
    assert set(np.asarray(trits).tolist()) <= {-1, 0, 1}


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: sign("l3"), "scale must be one of 'l1', 'l2', got 'l3'"),
        (lambda: sign(block=0), "block must be an int of at least 1, got 0"),
        (lambda: ternary(-1), "block must be an int of at least 1, got -1"),
        (lambda: ternary(clip=0.0), r"clip must be in \(0, inf\), got 0.0"),
    ],
)
def test_bad_arguments_are_refused(make, error):
    with pytest.raises(ValueError, match=error):
        make()
