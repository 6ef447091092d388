"""Low rank: projections, what is degenerate, a start from the last factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor_cases import relative_error, round_trip

from jaxopt_suite.optimizers.compression.low_rank import (
    cofactor,
    factor,
    low_rank,
    orthogonalise,
    rebuild,
    revive,
)

RNG = np.random.default_rng(0)
EXACT = 1e-5  # float32 products of some thirty terms


def of_rank(rank, shape=(30, 20)):
    return RNG.normal(size=(shape[0], rank)) @ RNG.normal(size=(rank, shape[1]))


@pytest.mark.parametrize("rank", [1, 3])
def test_a_matrix_of_no_higher_rank_comes_back(rank):
    assert relative_error(low_rank(rank), of_rank(rank)) < EXACT**2
    assert relative_error(low_rank(4), of_rank(rank)) < EXACT**2


def test_the_result_is_the_projection_on_the_span_of_the_factor():
    x, q = RNG.normal(size=(30, 20)), RNG.normal(size=(20, 3))
    p_hat = orthogonalise(factor(jnp.asarray(x, jnp.float32), jnp.asarray(q, jnp.float32)))
    found = rebuild(p_hat, cofactor(jnp.asarray(x, jnp.float32), p_hat), x.shape)
    basis, _ = np.linalg.qr(x @ q)
    np.testing.assert_allclose(found, basis @ basis.T @ x, atol=EXACT * np.abs(x).max() * 10)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_nearly_parallel_columns_come_out_orthonormal(magnitude):
    p = RNG.normal(size=(200, 1)) + 1e-3 * RNG.normal(size=(200, 6))
    p_hat = np.asarray(orthogonalise(jnp.asarray(p * magnitude, jnp.float32)))
    np.testing.assert_allclose(p_hat.T @ p_hat, np.eye(6), atol=EXACT)


def test_dependent_and_zero_columns_come_out_as_zeros():
    a, b = RNG.normal(size=(2, 50))
    p = np.stack([a, 2 * a, 0 * a, b, a - b], axis=1)
    p_hat = np.asarray(orthogonalise(jnp.asarray(p, jnp.float32)))
    np.testing.assert_array_equal(np.any(p_hat != 0, axis=0), [True, False, False, True, False])
    kept = p_hat[:, [0, 3]]
    np.testing.assert_allclose(kept.T @ kept, np.eye(2), atol=EXACT)


def test_a_stack_is_orthogonalised_as_each_matrix_is():
    stack = jnp.asarray(RNG.normal(size=(3, 40, 4)), jnp.float32).at[1].set(0.0)
    both, one = jax.jit(jax.vmap(orthogonalise))(stack), jax.jit(orthogonalise)
    np.testing.assert_allclose(both, np.stack([one(p) for p in stack]), atol=EXACT)
    assert not np.any(both[1])


def test_power_steps_that_start_from_the_last_factor_find_the_best_projection():
    x = jnp.asarray(of_rank(8) * 0.1 + of_rank(2) * 3, jnp.float32)
    q = jax.random.normal(jax.random.key(0), (20, 2))
    orthonormal = jax.jit(orthogonalise)
    for _ in range(8):
        p_hat = orthonormal(factor(x, q))
        q = cofactor(x, p_hat)
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    best = np.sqrt(np.sum(values[2:] ** 2))
    error = np.linalg.norm(rebuild(p_hat, q, x.shape) - x)
    assert error <= best * 1.001  # eight steps at this gap leave less


def test_columns_of_zeros_are_revived_and_others_kept():
    q = jnp.asarray([[1.0, 0.0], [2.0, 0.0]])
    np.testing.assert_array_equal(revive(q, 9 * jnp.ones((2, 2))), [[1, 9], [2, 9]])


def test_a_non_finite_entry_makes_the_whole_tensor_non_finite():
    for bad in (np.nan, np.inf):
        x = RNG.normal(size=(12, 10))
        x[2, 3] = bad
        assert not np.any(np.isfinite(round_trip(low_rank(2), x)))


def test_the_last_axis_is_the_columns_and_what_would_not_shrink_is_sent_whole():
    assert low_rank(2).nbytes((4, 5, 30)) == 4 * 2 * (20 + 30)
    assert low_rank(2).nbytes((100,)) == 400
    assert low_rank(2).nbytes((4, 4)) == 64  # two factors of 8 are no smaller than 16
    x = RNG.normal(size=(4, 4))
    np.testing.assert_array_equal(round_trip(low_rank(2), x), x.astype(np.float32))


@pytest.mark.parametrize("rank", [0, -3])
def test_a_bad_rank_is_refused(rank):
    with pytest.raises(ValueError, match=f"rank must be an int of at least 1, got {rank}"):
        low_rank(rank)
