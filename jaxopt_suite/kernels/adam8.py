"""Adam's step over moments of 8 bits: decoded, moved, used and encoded again in one pass.

A block is B entries in a row along the last dimension, of which the last one of a row may be
shorter. Its scale is its largest magnitude, 0 if that is below the smallest normal number; an entry
x is kept as the nearest entry of the dynamic code book to x over the scale.

XLA needs a pass to find the scales and another to encode, reads gradient and state in both, and
lays the rows out anew as rows of B. The kernels, ``adam8_tpu`` and ``adam8_gpu``, read gradient,
codes and scales once, write over them, and keep the float32 moments to themselves; what both
compute of a tile is in ``adam8_tile``.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.kernels import adam8_tile, dynamic8
from jaxopt_suite.kernels.implementations import (
    GPU_BLOCKS,
    Impl,
    alike_varying,
    by_kernel,
    resolve,
)

_FEWEST_ROWS = 32  # of a leaf: on a TPU bytes lie in tiles of as many


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

    **The kernels**, for TPUs and for NVIDIA GPUs from Hopper on, move 12 bytes an entry of a
    float32 gradient. That for TPUs writes over what it is given, codes, scales and gradient, which
    a train step has no more use for; on GPUs XLA copies new codes over donated ones, 4 bytes more.
    They take leaves of 32 rows or more whose rows have at least a block, or a multiple of 128
    entries; on GPUs, rows of whole blocks or of a multiple of 16 entries, of float32, bfloat16 or
    float16. Other leaves are left to the compiler. Time on hardware: unmeasured. What the compilers
    say of them: ``docs/guides/kernels.md``.

    Args:
      gradient: g, ``[..., n]`` of any real floating dtype.
      moments: of the same leaf.
      numbers: of the step, by ``adam8_numbers``.
      block: B; for the kernels a multiple of 128, on GPUs 128 or 256.
      impl: see ``kernels.resolve``.

    Returns:
      u in the dtype of the gradient, and the new moments.

    Raises:
      ValueError, TypeError: for a block that no kernel takes, or that is none.
      NotImplementedError: see ``kernels.resolve``.
    """
    chosen = check_adam8(block, impl)
    if chosen == "xla" or not _fits(gradient.shape, block):
        return adam8_update_definition(gradient, moments, numbers, block)
    rows, columns = math.prod(gradient.shape[:-1]), gradient.shape[-1]
    g, mu, mu_scales, nu, nu_scales = (x.reshape(rows, -1) for x in (gradient, *moments))
    # XLA keeps an array of few columns the other way round: of the scales nothing is moved.
    operands = alike_varying(numbers, g, mu, mu_scales.T, nu, nu_scales.T)
    width = min(block, columns)
    on_tpu = functools.partial(_on_tpu, block=width, impl=chosen)
    on_gpu = functools.partial(_on_gpu, block=width)
    what, cuda = f"adam8_update with block={block}", on_gpu if block in GPU_BLOCKS else None
    found = by_kernel(what, on_tpu, chosen, *operands, cuda=cuda)
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
    counts = nu <= adam8_tile.LARGEST  # not so where g is NaN or infinite
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
    empty = largest < adam8_tile.SMALLEST
    codes = dynamic8.encode(
        jnp.where(empty, 0.0, blocks / jnp.where(empty, 1.0, largest)), dynamic8.code_book(signed)
    )
    scales = jnp.where(empty, 0.0, largest)[..., 0]
    return codes.reshape(*rows, count * block)[..., :columns], scales


def _fits(shape: tuple[int, ...], block: int) -> bool:
    """Whether the kernel takes a leaf."""
    width = min(block, shape[-1])
    return width > 0 and width % 128 == 0 and math.prod(shape[:-1]) >= _FEWEST_ROWS


def _on_tpu(*operands: jax.Array, block: int, impl: str) -> tuple[jax.Array, ...]:
    from jaxopt_suite.kernels import adam8_tpu  # slow to import

    return adam8_tpu.update(*operands, block=block, impl=impl)


def _on_gpu(
    numbers: jax.Array, gradient: jax.Array, *moments: jax.Array, block: int
) -> tuple[jax.Array, ...]:
    """By the kernel for GPUs; of leaves that it does not take, by the definition."""
    from jaxopt_suite.kernels import adam8_gpu  # slow to import

    if adam8_gpu.fits(gradient, block):
        return adam8_gpu.update(numbers, gradient, *moments, block=block)
    mu, mu_scales, nu, nu_scales = moments
    old = Moments8(mu, mu_scales.T, nu, nu_scales.T)
    u, new = adam8_update_definition(gradient, old, numbers, block)
    return u, new.mu, new.mu_scales.T, new.nu, new.nu_scales.T
