"""The dynamic code book: its entries are the paper's, its codes those of the nearest entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_suite.kernels import dynamic8

ALL = np.arange(256)
BOTH = pytest.mark.parametrize("signed", [True, False])


def published(signed):
    """The book by the paper's description, in float64."""
    sizes = []
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (i + (not signed)) + 1)
        sizes += list((edges[1:] + edges[:-1]) / 2 * 10.0 ** (i - 6))
    negatives = [-size for size in sizes] if signed else []
    return np.sort([*negatives, 0.0, *sizes, 1.0])


def entries(signed):
    book = dynamic8.code_book(signed)
    return np.asarray(dynamic8.decode(jnp.asarray(ALL, jnp.uint8), book))


def codes_of(x, signed):
    book = dynamic8.code_book(signed)
    return np.asarray(dynamic8.encode(jnp.asarray(x, jnp.float32), book))


def hard_numbers(signed):
    """Numbers all over the decades, and a few float32 on either side of every middle."""
    rng, found = np.random.default_rng(0), entries(signed)
    sides = rng.choice([-1.0, 1.0], 40_000) if signed else np.ones(40_000)
    near = [((found[1:].astype(np.float64) + found[:-1]) / 2).astype(np.float32)]
    for towards in (-2, 2):
        step = near[0]
        for _ in range(3):
            step = np.nextafter(step, np.float32(towards))
            near.append(step)
    spread = [sides * 10.0 ** rng.uniform(-9, 0, 40_000), sides * rng.uniform(0, 1, 40_000)]
    x = np.concatenate([*spread, found, *near]).astype(np.float32)
    return np.clip(x, -1.0 if signed else 0.0, 1.0)


@BOTH
def test_the_entries_are_the_published_ones(signed):
    expected = published(signed)
    assert len(expected) == 256
    # Two roundings to float32: of the unit of a decade, and of its multiple.
    np.testing.assert_allclose(entries(signed), expected, rtol=2**-23, atol=0)
    assert entries(signed)[dynamic8.code_book(signed).zero_code] == 0
    assert entries(signed)[255] == 1
    smallest = np.abs(entries(signed))[np.abs(entries(signed)) > 0].min()
    assert smallest == pytest.approx(5.5e-7 if signed else 3.25e-7)


@BOTH
def test_codes_are_those_of_the_nearest_entry(signed):
    x, found = hard_numbers(signed), entries(signed).astype(np.float64)
    distances = np.abs(x.astype(np.float64)[:, None] - found)
    codes = codes_of(x, signed)
    excess = distances[np.arange(len(x)), codes] - distances.min(axis=1)
    # A middle that float32 does not have is rounded: what is that close to a tie may go either way.
    assert (excess <= 2**-22 * np.abs(x)).all()
    assert (excess > 0).mean() < 1e-2  # of numbers of which many are such


@BOTH
def test_a_tie_goes_to_the_entry_nearer_to_zero(signed):
    """Of every two entries on the positive side; their middle as float32 has it."""
    book, found = dynamic8.code_book(signed), entries(signed)
    first = book.zero_code
    middles = (found[first:-1].astype(np.float64) + found[first + 1 :]) / 2
    within = [
        np.float32(c) * np.float32(18 * level - 16 * p + 18)
        for p, c in zip(book.counts, book.units, strict=True)
        for level in range(p, 2 * p - 1)
    ]
    ties = np.sort(np.array([*within, *book.above, book.largest], np.float32))
    np.testing.assert_allclose(ties, middles, rtol=2**-23)
    np.testing.assert_array_equal(codes_of(ties, signed), np.arange(first, 255))
    after = np.nextafter(ties, np.float32(2))
    np.testing.assert_array_equal(codes_of(after, signed), np.arange(first + 1, 256))
    if signed:
        np.testing.assert_array_equal(codes_of(-ties[:-1], signed), np.arange(first, 0, -1))
        np.testing.assert_array_equal(codes_of(-after[:-1], signed), np.arange(first - 1, -1, -1))


@BOTH
def test_every_code_is_that_of_its_own_entry(signed):
    np.testing.assert_array_equal(codes_of(entries(signed), signed), ALL)


@BOTH
def test_compiled_and_fused_codes_and_entries_are_the_same_bits(signed):
    book, x = dynamic8.code_book(signed), jnp.asarray(hard_numbers(signed))
    again = jax.jit(lambda x: dynamic8.decode(dynamic8.encode(x, book), book) * 3.0 + x)
    plain = dynamic8.decode(dynamic8.encode(x, book), book) * 3.0 + x
    # The last multiplication may be fused with the addition; a code more would be 1e-3 or more.
    np.testing.assert_allclose(again(x), plain, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(
        jax.jit(lambda x: dynamic8.encode(x, book))(x), codes_of(x, signed)
    )


def test_the_ends_of_the_signed_book_are_not_alike():
    assert codes_of([-1.0, -0.9965, 0.9964, 0.9966, 1.0], True).tolist() == [0, 0, 254, 255, 255]
    assert codes_of([0.0, -0.0, 1e-40, -1e-40, 2.7e-7, -2.8e-7], True).tolist() == [
        *(127, 127, 127, 127),
        *(127, 126),
    ]


def test_no_table_is_looked_up():
    for signed in (True, False):
        book = dynamic8.code_book(signed)
        program = jax.jit(lambda x, b=book: dynamic8.decode(dynamic8.encode(x, b), b))
        text = program.lower(jnp.ones((8, 256))).as_text()
        assert "gather" not in text
        assert "while" not in text
