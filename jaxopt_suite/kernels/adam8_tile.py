"""What the kernels of ``adam8_update`` compute of a tile, for TPUs and for GPUs the same.

Plain functions of arrays, of primitives that Pallas lowers for both. Mosaic GPU has no floor, so
numbers that are not negative are truncated instead; and on JAX 0.10.2 no square root, which
``moved`` is therefore given.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxopt_suite.kernels.dynamic8 import CodeBook

LARGEST = 3.4028235e38  # of float32
SMALLEST = 1.1754944e-38  # normal number of float32: a TPU takes what is below for zero


def moved(
    g: Any,
    mu: Any,
    nu: Any,
    numbers: Sequence[Any],
    inside: Any = None,
    root: Callable[[Any], Any] = jnp.sqrt,
) -> tuple[Any, Any, Any]:
    """The moments moved by a gradient, and Adam's direction.

    Args:
      g: gradient, float32 ``[rows, columns]``.
      mu: first moments, decoded, likewise.
      nu: second moments.
      numbers: of the step, seven scalars.
      inside: bool ``[rows, columns]``: which entries are of the leaf, if not all are; the others
        may be anything.
      root: the square root.
    """
    b1, rest1, b2, rest2, eps, c1, c2 = numbers
    mu, nu = b1 * mu + rest1 * g, b2 * nu + rest2 * (g * g)
    counts = nu <= LARGEST  # not so where g is NaN or infinite
    if inside is not None:
        counts &= inside
    mu, nu = jnp.where(counts, mu, 0.0), jnp.where(counts, nu, 0.0)
    direction = jnp.where(counts, (mu / c1) / (root(nu / c2) + eps), 0.0)
    return mu, nu, direction


def entries(codes: Any, book: CodeBook) -> Any:
    """Entries of the code book; the same numbers as ``dynamic8.decode``, from integers."""
    number = codes.astype(jnp.int32) - book.zero_code
    level = jnp.abs(number) + book.zero
    p, unit = jnp.full_like(level, book.counts[0]), jnp.full(level.shape, book.units[0])
    for count, c in zip(book.counts[1:], book.units[1:], strict=True):
        later = level >= count
        p, unit = jnp.where(later, count, p), jnp.where(later, c, unit)
    size = unit * (18 * level - 16 * p + 9).astype(jnp.float32)
    size = jnp.where(level == book.zero, 0.0, size)
    size = jnp.where(level == book.top, 1.0, size)
    return jnp.where(number < 0, -size, size)


def scale(largest: Any) -> Any:
    """The scale of a block, given its largest magnitude."""
    return jnp.where(largest < SMALLEST, 0.0, largest)


def divisor(scale: Any) -> Any:
    """What a block is divided by before its codes are found."""
    return jnp.where(scale == 0, jnp.inf, scale)  # of zeros: zero


def nearest(x: Any, divisor: Any, book: CodeBook) -> Any:
    """Codes of x over the divisor, uint8; the same numbers as ``dynamic8.encode``."""
    size = jnp.abs(x) / divisor
    p, unit = jnp.full_like(size, book.counts[0]), jnp.full_like(size, book.units[0])
    inverse = jnp.full_like(size, 1 / book.units[0])
    for count, c, above in zip(book.counts[1:], book.units[1:], book.above[1:], strict=True):
        later = size > above
        p, unit = jnp.where(later, float(count), p), jnp.where(later, c, unit)
        inverse = jnp.where(later, 1 / c, inverse)
    place = (size * inverse + (16 * p - 9)) * (1 / 18)
    lower = place.astype(jnp.int32).astype(jnp.float32)  # rounded down, as it is positive
    threshold = unit * (18 * lower - 16 * p + 18)
    level = jnp.minimum(jnp.where(size > threshold, lower + 1, lower), 2 * p - 1)
    number = jnp.where(size > book.above[0], level - book.zero, 0.0)
    number = jnp.where(size > book.largest, float(book.top - book.zero), number)
    if book.signed:
        number = jnp.where(x < 0, jnp.maximum(-number, 1.0 - book.top), number)
    return (number + book.zero_code).astype(jnp.int32).astype(jnp.uint8)
