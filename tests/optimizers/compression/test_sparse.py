"""Top-k and random-k: exactly k entries, the right ones, ties, chances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressor_cases import round_trip

from jaxopt_suite.optimizers.compression.selection import largest
from jaxopt_suite.optimizers.compression.sparse import random_indices, random_k, top_k

LONG = 2**17 + 5  # past the length from which the threshold is searched, and not a whole word
RNG = np.random.default_rng(0)
TENSORS = {
    "normal": RNG.normal(size=LONG),
    "ties": RNG.integers(-3, 4, size=LONG),
    "zeros": np.zeros(LONG),
    "equal": np.where(RNG.random(LONG) < 0.5, -1.0, 1.0),
    "few": np.where(RNG.random(LONG) < 1e-4, RNG.normal(size=LONG), 0),
    "periodic": np.where(np.arange(LONG) % 2 == 0, 1.0, 1e-3) * RNG.normal(size=LONG),
    "NaN": np.where(RNG.random(LONG) < 0.01, np.nan, RNG.normal(size=LONG)),
    "infinite": np.where(RNG.random(LONG) < 0.3, -np.inf, RNG.normal(size=LONG)),
}


@pytest.mark.parametrize("k", [1, 1000, LONG // 3, LONG])
def test_the_selection_is_that_of_a_sort_also_for_ties(k):
    select = jax.jit(lambda x: jnp.sort(largest(x, k)))
    sort = jax.jit(lambda x: jnp.sort(jax.lax.top_k(jnp.abs(x), k)[1]))
    for name, x in TENSORS.items():
        x = jnp.asarray(x, jnp.float32)
        np.testing.assert_array_equal(select(x), sort(x), err_msg=name)


def test_the_selection_of_a_stack_is_that_of_each():
    xs = jnp.asarray(np.stack([TENSORS["normal"], TENSORS["ties"]]), jnp.float32)
    select = lambda x: jnp.sort(largest(x, 500))
    both, one = jax.jit(jax.vmap(select))(xs), jax.jit(select)
    np.testing.assert_array_equal(both, np.stack([one(x) for x in xs]))


@pytest.mark.parametrize("chunk", [None, 32])
def test_the_largest_survive_and_the_rest_is_zero(chunk):
    x = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)
    found = np.asarray(round_trip(top_k(4, chunk=chunk), x)).reshape(-1, chunk or 128)
    rows = x.reshape(found.shape)
    for row, kept in zip(rows, found, strict=True):
        order = np.argsort(-np.abs(row))
        np.testing.assert_array_equal(kept[order[:4]], row[order[:4]])
        assert not np.any(kept[order[4:]])


def test_of_equal_magnitudes_the_lower_index_wins_and_exactly_k_leave():
    payload = top_k(3).encode(jnp.asarray([1.0, -2.0, 2.0, 1.0, -1.0]), jax.random.key(0))
    assert sorted(payload.indices.tolist()) == [0, 1, 2]
    assert payload.values.shape == (3,)


def test_a_tensor_shorter_than_k_or_than_a_chunk_is_sent_whole():
    x = np.asarray([[1.0, -2.0, 3.0]])
    for compressor in (top_k(50), top_k(3, chunk=100), top_k(fraction=1.0), random_k(50)):
        np.testing.assert_array_equal(round_trip(compressor, x), x)


def test_a_fraction_is_rounded_and_never_zero():
    assert [top_k(fraction=0.01).nbytes((n,)) for n in (1, 100, 250)] == [5, 5, 10]
    assert random_k(fraction=0.01).nbytes((250,)) == 8


def test_bytes_by_width_of_index_and_value():
    assert top_k(32, chunk=4096).nbytes((64, 128)) == 2 * 32 * 4 + 2 * 32 * 3 // 2
    assert top_k(32, chunk=4096, values="bfloat16").nbytes((64, 128)) == 2 * 32 * 2 + 96
    assert top_k(10).nbytes((70_000,)) == 80


def test_bfloat16_values_are_the_rounded_ones():
    x = np.asarray([1.001, 0.1, -7.77], np.float32)
    expected = np.asarray([1.001, 0.0, -7.77], jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(round_trip(top_k(2, values="bfloat16"), x), expected)


@pytest.mark.parametrize(("size", "count"), [(10, 3), (10, 7), (7, 7), (5, 1), (1, 1)])
def test_random_indices_are_different_and_each_as_likely_as_any(size, count):
    seeds = jax.random.bits(jax.random.key(1), (20_000,), jnp.uint32)
    found = np.asarray(jax.jit(jax.vmap(lambda s: random_indices(s, size, count)))(seeds))
    assert found.min() >= 0
    assert found.max() < size
    assert all(np.unique(row).size == count for row in found[:200])
    chance = count / size
    frequency = np.bincount(found.ravel(), minlength=size) / len(found)
    # four standard errors of a frequency, for up to ten of them
    np.testing.assert_allclose(frequency, chance, atol=4 * np.sqrt(chance * (1 - chance) / 20_000))


def test_another_key_sends_other_entries_and_the_same_key_the_same():
    x = jnp.arange(1.0, 1001.0)
    pick = lambda seed: np.flatnonzero(round_trip(random_k(50), x, jax.random.key(seed)))
    np.testing.assert_array_equal(pick(0), pick(0))
    assert np.intersect1d(pick(0), pick(1)).size < 25


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: top_k(), (ValueError, "either k or fraction, got k=None and fraction=None")),
        (lambda: top_k(3, fraction=0.1), (ValueError, "either k or fraction, got k=3")),
        (lambda: top_k(0), (ValueError, "k must be an int of at least 1, got 0")),
        (lambda: top_k(0.01), (TypeError, "k must be an int, got 0.01")),
        (lambda: random_k(fraction=1.5), (ValueError, r"fraction must be in \(0, 1\], got 1.5")),
        (lambda: top_k(3, chunk=0), (ValueError, "chunk must be an int of at least 1, got 0")),
        (lambda: top_k(9, chunk=8), (ValueError, "k must be at most chunk=8, got 9")),
        (lambda: top_k(3, values="float16"), (ValueError, "values must be one of 'float32'")),
    ],
)
def test_bad_arguments_are_refused(make, error):
    with pytest.raises(error[0], match=error[1]):
        make()
