"""The cosine transform in chunks: orthonormal, invertible, chunk counts by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from compressor_cases import relative_error, round_trip

from jaxopt_suite.optimizers.compression.dct import (
    chunk_grid,
    dct,
    dct_matrix,
    dct_top_k,
    from_chunks,
    inverse_dct,
    to_chunks,
)

SHAPES = [(), (64,), (65,), (17, 33), (128, 192), (3, 20, 9), (2, 2, 8, 8), (0,), (4, 0)]


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_matrix_is_orthonormal_and_its_first_row_the_mean(n):
    matrix = dct_matrix(n)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-6)  # float32
    np.testing.assert_allclose(matrix[0], 1 / math.sqrt(n), rtol=1e-6)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_come_back_and_the_transform_keeps_the_energy(shape, pad):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    grid = chunk_grid(shape, 16, pad=pad)
    chunks = to_chunks(x, grid)
    assert chunks.shape == (grid.chunks, *grid.sides)
    np.testing.assert_array_equal(from_chunks(chunks, grid, shape), x)
    coefficients = dct(chunks)
    np.testing.assert_allclose(inverse_dct(coefficients), chunks, atol=1e-5)  # two products of 16
    np.testing.assert_allclose(jnp.sum(coefficients**2), jnp.sum(x**2), rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "pad", "sides", "chunks"),
    [
        ((65,), True, (1, 64), 2),
        ((65,), False, (1, 13), 5),
        ((128, 192), False, (64, 64), 6),
        ((17, 33), True, (17, 33), 1),
        ((3, 67, 130), True, (64, 64), 3 * 2 * 3),
        ((67, 130), False, (1, 26), 67 * 5),  # 67 is a prime above 64
        ((50257, 64), False, (29, 64), 1733),
    ],
)
def test_chunk_sizes(shape, pad, sides, chunks):
    grid = chunk_grid(shape, 64, pad=pad)
    assert (grid.sides, grid.chunks) == (sides, chunks)


def test_a_chunk_is_a_rectangle_of_the_matrix():
    x = jnp.arange(24.0).reshape(4, 6)
    chunks = to_chunks(x, chunk_grid((4, 6), 2, pad=True))
    np.testing.assert_array_equal(chunks[1], [[2, 3], [8, 9]])


def test_a_cosine_needs_one_coefficient():
    x = 3.0 * np.outer(dct_matrix(32)[5], dct_matrix(32)[2])
    assert relative_error(dct_top_k(1, side=32), x) < 1e-10


def test_the_error_is_the_energy_of_what_was_dropped():
    x = np.random.default_rng(1).normal(size=(32, 32))
    energies = np.sort((dct_matrix(32) @ x @ dct_matrix(32).T).ravel() ** 2)
    expected = np.sum(energies[:-100]) / np.sum(x**2)
    assert relative_error(dct_top_k(100), x) == pytest.approx(expected, rel=1e-4)  # float32


@pytest.mark.parametrize("shape", [(5,), (12, 7), (2, 9, 9)])
def test_keeping_everything_is_the_identity(shape):
    x = np.random.default_rng(2).normal(size=shape)
    # two orthonormal products there and two back
    np.testing.assert_allclose(round_trip(dct_top_k(64, side=8), x), x, atol=1e-5)


def test_a_coefficient_takes_three_and_a_half_bytes():
    assert dct_top_k(values="bfloat16").nbytes((1024, 1024)) == 256 * 32 * 7 // 2


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="side must be an int of at least 1, got 0"):
        dct_top_k(side=0)
    with pytest.raises(ValueError, match=r"k must be at most side\*\*2 = 64, got 65"):
        dct_top_k(65, side=8)
    with pytest.raises(ValueError, match="k must be an int of at least 1, got 0"):
        dct_top_k(0)
