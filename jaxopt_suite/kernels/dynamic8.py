"""The dynamic code book of 8 bits: codes found by arithmetic, with no table and no search.

Its entries lie in seven decades. Decade i has p = 2^i of them, signed, or 2^(i+1), unsigned: the
midpoints of as many equal parts of [10^(i-7), 10^(i-6)]. Besides there are 0 and 1, and of signed
ones the negatives of all but these. Number the magnitudes by levels so that decade i holds p to
2p - 1; then the entry of level L is

    c (18 L - 16 p + 9),  c = 10^(i-7) / 2p,

and the middle between it and the next of its decade c (18 L - 16 p + 18). The brackets are small
integers, so one rounding makes an entry, another a threshold, and no order of operations and no
fused multiplication changes either: every machine has the same code book.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_DECADES = 7


class CodeBook(NamedTuple):
    """The numbers the arithmetic needs: of decade i the entries at [i]."""

    signed: bool
    counts: tuple[int, ...]  # p, and its first level
    units: tuple[float, ...]  # c, rounded to float32
    above: tuple[float, ...]  # float32: what is larger is of this decade, or of a later one
    largest: float  # float32: what is larger is 1

    @property
    def zero(self) -> int:
        """The level of 0."""
        return 0 if self.signed else 1

    @property
    def top(self) -> int:
        """The level of 1."""
        return 2 * self.counts[-1]

    @property
    def zero_code(self) -> int:
        """The code of 0: 127, or 0."""
        return 127 if self.signed else 0


@functools.cache
def code_book(signed: bool) -> CodeBook:
    """The signed code book, for first moments, or the unsigned one, for second moments."""
    counts = tuple(2 ** (i + (not signed)) for i in range(_DECADES))
    units = np.asarray([10.0 ** (i - 7) / (2 * p) for i, p in enumerate(counts)], np.float32)
    entry = lambda i, level: np.float32(units[i] * np.float32(18 * level - 16 * counts[i] + 9))
    firsts = [entry(i, p) for i, p in enumerate(counts)] + [np.float32(1)]
    lasts = [np.float32(0)] + [entry(i, 2 * p - 1) for i, p in enumerate(counts)]
    middles = [float(_rounded_down(low, high)) for low, high in zip(lasts, firsts, strict=True)]
    return CodeBook(signed, counts, tuple(map(float, units)), tuple(middles[:-1]), middles[-1])


def _rounded_down(low: np.float32, high: np.float32) -> np.float32:
    """The largest float32 up to the middle of two: a tie is not above it."""
    middle = (np.float64(low) + np.float64(high)) / 2
    rounded = np.float32(middle)
    return rounded if rounded <= middle else np.nextafter(rounded, np.float32(0))


def decode(codes: jax.Array, book: CodeBook) -> jax.Array:
    """The entries of codes uint8 ``[...]``, float32, between -1 and 1."""
    numbers = codes.astype(jnp.float32) - book.zero_code
    levels = jnp.abs(numbers) + book.zero
    p, unit = jnp.float32(book.counts[0]), jnp.float32(book.units[0])
    for count, c in zip(book.counts[1:], book.units[1:], strict=True):
        p = jnp.where(levels >= count, float(count), p)
        unit = jnp.where(levels >= count, c, unit)
    inner = unit * (18 * levels - 16 * p + 9)
    outer = jnp.where(levels == book.top, 1.0, jnp.where(levels == book.zero, 0.0, inner))
    return jnp.where(numbers < 0, -outer, outer)


def encode(x: jax.Array, book: CodeBook) -> jax.Array:
    """The codes, uint8, of the entries nearest to float32 x in [-1, 1].

    Of two that are equally near, which includes what float32 cannot tell from it, the one nearer to
    zero. For an unsigned code book x is at least 0.
    """
    size = jnp.abs(x)
    p, unit = jnp.float32(book.counts[0]), jnp.float32(book.units[0])
    for count, c, above in zip(book.counts[1:], book.units[1:], book.above[1:], strict=True):
        p = jnp.where(size > above, float(count), p)
        unit = jnp.where(size > above, c, unit)
    # Rounding here matters near entries only, where the threshold between them decides rightly.
    lower = jnp.floor((size / unit + (16 * p - 9)) / 18)
    lower += jnp.where(size > unit * (18 * lower - 16 * p + 18), 1.0, 0.0)
    level = jnp.minimum(lower, 2 * p - 1)
    level = jnp.where(size > book.above[0], level, float(book.zero))
    level = jnp.where(size > book.largest, float(book.top), level)
    number = level - book.zero
    if book.signed:  # -1 has no code: what is nearest to it is the largest of the negatives
        number = jnp.where(x < 0, -jnp.minimum(number, book.top - 1), number)
    return (number + book.zero_code).astype(jnp.int32).astype(jnp.uint8)
