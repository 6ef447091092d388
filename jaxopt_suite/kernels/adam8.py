"""Adam's step over moments of 8 bits: decoded, moved, used and encoded again in one pass.

A block is B entries in a row along the last dimension, of which the last one of a row may be
shorter. Its scale is its largest magnitude, 0 if that is below the smallest normal number; an entry
x is kept as the nearest entry of the dynamic code book to x over the scale.

XLA needs a pass to find the scales and another to encode, reads gradient and state in both, and
lays the rows out anew as rows of B. The kernel reads gradient, codes and scales once, writes over
them, and keeps the float32 moments to itself.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxopt_suite import core
from jaxopt_suite.kernels import dynamic8
from jaxopt_suite.kernels.implementations import (
    Impl,
    alike_varying,
    by_kernel,
    interpreter,
    resolve,
    struct_like,
    tpu_parameters,
)

_LARGEST = 3.4028235e38  # of float32
_SMALLEST = 1.1754944e-38  # normal number of float32: a TPU takes what is below for zero
_ENTRIES = 2**18  # of a tile
_GROUPS = 8  # blocks side by side in a tile, at most: their scales lie in tiles of 8 by 128
_ROWS = 128  # of a tile, or all there are
_FEWEST_ROWS = 32  # of a leaf: bytes lie in tiles of as many
_OPERATIONS = 150  # an entry, counted in the kernel's program


class Moments8(NamedTuple):
    """Both moments of a leaf of n columns."""

    mu: jax.Array  # uint8, the leaf's shape: codes of the signed code book
    mu_scales: jax.Array  # float32 [..., ceil(n / B)]
    nu: jax.Array  # uint8, the leaf's shape: codes of the unsigned code book
    nu_scales: jax.Array  # float32 [..., ceil(n / B)]


def adam8_zeros(shape: tuple[int, ...], *, block: int = 256) -> Moments8:
    """Moments that are zero, of a leaf of one dimension or more."""
    scales = (*shape[:-1], -(-shape[-1] // block))
    full = lambda signed: jnp.full(shape, dynamic8.code_book(signed).zero_code, jnp.uint8)
    zeros = lambda: jnp.zeros(scales, jnp.float32)
    return Moments8(full(True), zeros(), full(False), zeros())


def adam8_decode(moments: Moments8, *, block: int = 256) -> tuple[jax.Array, jax.Array]:
    """Both moments as numbers, float32 of the leaf's shape."""
    mu = _decoded(moments.mu, moments.mu_scales, True, block)
    return mu, _decoded(moments.nu, moments.nu_scales, False, block)


def adam8_numbers(
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    corrections: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike],
) -> jax.Array:
    """What ``adam8_update`` takes of a step, for all leaves: float32 ``[7]``.

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root.
      corrections: of both moments, $1 - \\beta_1^t$ and $1 - \\beta_2^t$.
    """
    numbers = (b1, 1.0 - b1, b2, 1.0 - b2, eps, *corrections)
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in numbers])


def adam8_update(
    gradient: jax.Array,
    moments: Moments8,
    numbers: jax.Array,
    *,
    block: int = 256,
    impl: Impl = "auto",
) -> tuple[jax.Array, Moments8]:
    r"""Adam's direction for one leaf, and its moments in 8 bits.

    $$m = \beta_1 \hat m + (1-\beta_1) g, \quad v = \beta_2 \hat v + (1-\beta_2) g^2, \quad
    u = \frac{m / c_1}{\sqrt{v / c_2} + \epsilon},$$

    with $c$ the bias corrections, $\hat m, \hat v$ decoded, arithmetic in float32, and u taken
    from m and v as they are before they are encoded. An entry whose gradient is not finite, or
    whose v is not, has u = m = v = 0.

    **The kernel**, for TPUs, moves 12 bytes an entry of a float32 gradient and writes over what it
    is given, codes, scales and gradient, which a train step has no more use for. It takes leaves
    of 32 rows or more whose rows have at least a block, or a multiple of 128 entries; others are
    left to the compiler. Time on hardware: unmeasured. What the compiler says of it:
    ``docs/guides/kernels.md``.

    Args:
      gradient: g, ``[..., n]`` of any real floating dtype.
      moments: of the same leaf.
      numbers: of the step, by ``adam8_numbers``.
      block: B.
      impl: see ``kernels.resolve``.

    Returns:
      u in the dtype of the gradient, and the new moments.

    Raises:
      ValueError, TypeError: for a block that the kernel does not take, or that is none.
    """
    chosen = check_adam8(block, impl)
    if chosen == "xla" or not _fits(gradient.shape, block):
        return adam8_update_definition(gradient, moments, numbers, block)
    rows, columns = math.prod(gradient.shape[:-1]), gradient.shape[-1]
    g, mu, mu_scales, nu, nu_scales = (x.reshape(rows, -1) for x in (gradient, *moments))
    # XLA keeps an array of few columns the other way round: of the scales nothing is moved.
    operands = alike_varying(numbers, g, mu, mu_scales.T, nu, nu_scales.T)
    kernel = functools.partial(_call, block=min(block, columns), impl=chosen)
    found = by_kernel("adam8_update", kernel, chosen, *operands)
    u, mu, mu_scales, nu, nu_scales = found
    new = mu, mu_scales.T, nu, nu_scales.T
    shaped = [x.reshape(old.shape) for x, old in zip(new, moments, strict=True)]
    return u.reshape(gradient.shape), Moments8(*shaped)


def check_adam8(block: int, impl: Impl) -> str:
    """Checks the arguments that a recipe hands on, and resolves ``impl``.

    Raises:
      ValueError, TypeError: as ``adam8_update``.
    """
    core.check_int("block", block)
    chosen = resolve("adam8_update", impl)
    if chosen != "xla" and block % 128:
        raise ValueError(f"the kernel takes a block that is a multiple of 128, got block={block}")
    return chosen


def adam8_update_definition(
    gradient: jax.Array, moments: Moments8, numbers: jax.Array, block: int
) -> tuple[jax.Array, Moments8]:
    """What ``adam8_update`` means, in plain JAX."""
    b1, rest1, b2, rest2, eps, c1, c2 = numbers
    g = gradient.astype(jnp.float32)
    mu, nu = adam8_decode(moments, block=block)
    mu, nu = b1 * mu + rest1 * g, b2 * nu + rest2 * jnp.square(g)
    counts = nu <= _LARGEST  # not so where g is NaN or infinite
    mu, nu = jnp.where(counts, mu, 0.0), jnp.where(counts, nu, 0.0)
    direction = jnp.where(counts, (mu / c1) / (jnp.sqrt(nu / c2) + eps), 0.0)
    mu_codes, mu_scales = _encoded(mu, True, block)
    nu_codes, nu_scales = _encoded(nu, False, block)
    return direction.astype(gradient.dtype), Moments8(mu_codes, mu_scales, nu_codes, nu_scales)


def _decoded(codes: jax.Array, scales: jax.Array, signed: bool, block: int) -> jax.Array:
    each = jnp.repeat(scales, block, axis=-1)[..., : codes.shape[-1]]
    return dynamic8.decode(codes, dynamic8.code_book(signed)) * each


def _encoded(x: jax.Array, signed: bool, block: int) -> tuple[jax.Array, jax.Array]:
    *rows, columns = x.shape
    count = -(-columns // block)
    ends = [(0, 0)] * len(rows) + [(0, count * block - columns)]
    blocks = jnp.pad(x, ends).reshape(*rows, count, block)
    largest = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True, initial=0.0)
    empty = largest < _SMALLEST
    codes = dynamic8.encode(
        jnp.where(empty, 0.0, blocks / jnp.where(empty, 1.0, largest)), dynamic8.code_book(signed)
    )
    scales = jnp.where(empty, 0.0, largest)[..., 0]
    return codes.reshape(*rows, count * block)[..., :columns], scales


def _fits(shape: tuple[int, ...], block: int) -> bool:
    """Whether the kernel takes a leaf."""
    width = min(block, shape[-1])
    return width > 0 and width % 128 == 0 and math.prod(shape[:-1]) >= _FEWEST_ROWS


def _call(
    numbers: jax.Array, gradient: jax.Array, *moments: jax.Array, block: int, impl: str
) -> Any:
    """The kernel on a gradient ``[rows, columns]``; scales are given ``[blocks, rows]``."""
    (rows, columns), blocks = gradient.shape, len(moments[1])
    groups = min(_GROUPS, blocks)
    height = min(rows, max(_ROWS, _ENTRIES // (groups * block) // _ROWS * _ROWS))
    entries = pl.BlockSpec((height, groups * block), lambda i, j: (i, j))
    scales = pl.BlockSpec((groups, height), lambda i, j: (j, i))
    body = functools.partial(_kernel, block=block, groups=groups, columns=columns)
    return pl.pallas_call(
        body,
        name="adam8_update",
        grid=(-(-rows // height), -(-blocks // groups)),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), entries, *[entries, scales] * 2],
        out_specs=[entries, *[entries, scales] * 2],
        out_shape=[struct_like(x.shape, x.dtype, gradient) for x in (gradient, *moments)],
        # All but the numbers. The interpreter pads what it writes over, and does not cut it again.
        input_output_aliases={} if impl == "interpret" else {i + 1: i for i in range(5)},
        compiler_params=tpu_parameters(impl, "parallel", "parallel"),
        cost_estimate=pl.CostEstimate(
            flops=_OPERATIONS * gradient.size,
            bytes_accessed=(4 + 2 * gradient.dtype.itemsize) * gradient.size + 16 * rows * blocks,
            transcendentals=gradient.size,
        ),
        interpret=interpreter(impl),
    )(numbers, gradient, *moments)


def _kernel(
    numbers_ref: Any,  # float32 [7]
    gradient_ref: Any,  # [rows, groups of B columns]
    mu_ref: Any,  # uint8, likewise
    mu_scales_ref: Any,  # float32 [groups, rows]
    nu_ref: Any,
    nu_scales_ref: Any,
    direction_ref: Any,
    new_mu_ref: Any,
    new_mu_scales_ref: Any,
    new_nu_ref: Any,
    new_nu_scales_ref: Any,
    *,
    block: int,
    groups: int,
    columns: int,
) -> None:
    signed, unsigned = dynamic8.code_book(True), dynamic8.code_book(False)
    b1, rest1, b2, rest2, eps, c1, c2 = (numbers_ref[i] for i in range(7))
    mu_scales, nu_scales = mu_scales_ref[...].T, nu_scales_ref[...].T
    new_scales = []
    for group in range(groups):
        part, own = slice(group * block, (group + 1) * block), slice(group, group + 1)
        g = gradient_ref[:, part].astype(jnp.float32)
        mu = b1 * (_read(mu_ref[:, part], signed) * mu_scales[:, own]) + rest1 * g
        nu = b2 * (_read(nu_ref[:, part], unsigned) * nu_scales[:, own]) + rest2 * (g * g)
        counts = nu <= _LARGEST
        if columns % block:  # what lies beyond the end of a row is anything
            start = (pl.program_id(1) * groups + group) * block
            counts &= jax.lax.broadcasted_iota(jnp.int32, g.shape, 1) < columns - start
        mu, nu = jnp.where(counts, mu, 0.0), jnp.where(counts, nu, 0.0)
        direction = jnp.where(counts, (mu / c1) / (jnp.sqrt(nu / c2) + eps), 0.0)
        direction_ref[:, part] = direction.astype(direction_ref.dtype)
        new_mu_ref[:, part], mu_scale = _written(mu, signed)
        new_nu_ref[:, part], nu_scale = _written(nu, unsigned)
        new_scales.append((mu_scale, nu_scale))
    for ref, columns_of in zip(
        (new_mu_scales_ref, new_nu_scales_ref), zip(*new_scales, strict=True), strict=True
    ):
        ref[...] = jnp.concatenate(columns_of, axis=1).T


def _read(codes: Any, book: dynamic8.CodeBook) -> Any:
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


def _written(x: Any, book: dynamic8.CodeBook) -> tuple[Any, Any]:
    """Codes of a block a row, uint8, and its largest magnitude ``[rows, 1]``."""
    size = jnp.abs(x)
    largest = jnp.max(size, axis=1, keepdims=True)
    largest = jnp.where(largest < _SMALLEST, 0.0, largest)
    size = size / jnp.where(largest == 0, jnp.inf, largest)  # of zeros: zero
    p, unit = jnp.full_like(size, book.counts[0]), jnp.full_like(size, book.units[0])
    inverse = jnp.full_like(size, 1 / book.units[0])
    for count, c, above in zip(book.counts[1:], book.units[1:], book.above[1:], strict=True):
        later = size > above
        p, unit = jnp.where(later, float(count), p), jnp.where(later, c, unit)
        inverse = jnp.where(later, 1 / c, inverse)
    lower = jnp.floor((size * inverse + (16 * p - 9)) * (1 / 18))
    threshold = unit * (18 * lower - 16 * p + 18)
    level = jnp.minimum(jnp.where(size > threshold, lower + 1, lower), 2 * p - 1)
    number = jnp.where(size > book.above[0], level - book.zero, 0.0)
    number = jnp.where(size > book.largest, float(book.top - book.zero), number)
    if book.signed:
        number = jnp.where(x < 0, jnp.maximum(-number, 1.0 - book.top), number)
    return (number + book.zero_code).astype(jnp.int32).astype(jnp.uint8), largest
