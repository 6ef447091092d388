"""Running means of Gram matrices: their definition, and one triangle of them by kernels."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.kernels.implementations import Impl, alike_varying, by_kernel, resolve

_MODES = "abcdefghijklmnopqrstuvw"


class Mean(NamedTuple):
    """What a product is added to."""

    statistics: jax.Array  # [k, d, d], symmetric; only its lower tiles are read
    scalars: jax.Array  # float32 [2]: what these are multiplied by, and the product


def gram_update(
    statistics: jax.Array,
    blocks: jax.Array,
    decay: jax.typing.ArrayLike,
    weight: jax.typing.ArrayLike,
    *,
    mode: int = 0,
    impl: Impl = "auto",
) -> jax.Array:
    r"""Statistics with the Gram matrices of one mode of new blocks.

    For each block $G$ of a stack, with $G_i$ its unfolding along mode $i$, a matrix of as many rows
    as the block has entries along that mode (for matrices $G_1 = G$ and $G_2 = G^T$),

    $$L \leftarrow \beta L + w\, G_i G_i^T.$$

    **The kernels**, for TPUs and for NVIDIA's Hopper GPUs, compute the tiles on and below the
    diagonal, read the same tiles of L, and write each of the others as the transpose of one: of T²
    tiles T(T+1)/2. On TPUs a tile is 256 by 256, for bfloat16 blocks 512 by 512, so that of 1024
    rows it is ten of sixteen, or three of four; on GPUs it is 128 by 128, and thirty-six of
    sixty-four. That for TPUs writes over L where it is donated, as a train step's state is. What
    they give is symmetric to the last bit. Time on hardware: unmeasured. What the compilers say of
    them: ``docs/guides/kernels.md``.

    Sums and products are in float32; those of float32 blocks with ``Precision.HIGHEST``, as
    ``optimizers.roots.products`` says why, or as accurate (``triangles_gpu``). Those of bfloat16
    blocks are exact and cost a sixth of it.

    Args:
      statistics: L, float32 or bfloat16 ``[k, d_i, d_i]``; the definition takes float64 too. The
        kernels take them to be symmetric.
      blocks: G, ``[k, d_1, ..., d_p]``, p at least 1.
      decay: β, a number or float32 ``[]``.
      weight: w, likewise. With a decay of 1 a weight of 0 leaves L as it is.
      mode: i, counted from 0.
      impl: see ``kernels.resolve``.

    Returns:
      As ``statistics``.

    Raises:
      ValueError, TypeError: for shapes that do not fit, or dtypes that the kernels do not take.
      NotImplementedError: see ``kernels.resolve``.
    """
    _check(statistics, blocks, mode)
    chosen = resolve("gram_update", impl)
    if chosen == "xla":
        return gram_update_definition(statistics, blocks, decay, weight, mode)
    _check_dtypes(statistics, blocks)
    scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in (decay, weight)])
    matrices, contracted = _unfolded(blocks, mode)
    operands = alike_varying(statistics, matrices, scalars)

    def on_tpu(statistics: jax.Array, matrices: jax.Array, scalars: jax.Array) -> jax.Array:
        from jaxopt_suite.kernels import triangles_tpu  # slow to import

        mean = Mean(statistics, scalars)
        return triangles_tpu.symmetric(
            "gram_update", matrices, matrices, contracted=contracted, mean=mean, impl=chosen
        )

    def on_gpu(statistics: jax.Array, matrices: jax.Array, scalars: jax.Array) -> jax.Array:
        from jaxopt_suite.kernels import triangles_gpu  # slow to import

        mean = Mean(statistics, scalars)
        return triangles_gpu.symmetric(
            "gram_update", matrices, matrices, contracted=contracted, mean=mean
        )

    return by_kernel("gram_update", on_tpu, chosen, *operands, cuda=on_gpu)


def gram_update_definition(
    statistics: jax.Array,
    blocks: jax.Array,
    decay: jax.typing.ArrayLike,
    weight: jax.typing.ArrayLike,
    mode: int,
) -> jax.Array:
    """What ``gram_update`` means, in plain JAX."""
    names = _MODES[: blocks.ndim - 1]
    other = names.replace(names[mode], "z")
    gram = jnp.einsum(
        f"y{names},y{other}->y{names[mode]}z",
        blocks,
        blocks,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(blocks.dtype, jnp.float32),
    )
    kept = jnp.asarray(decay, gram.dtype) * statistics.astype(gram.dtype)
    return (kept + jnp.asarray(weight, gram.dtype) * gram).astype(statistics.dtype)


def _unfolded(blocks: jax.Array, mode: int) -> tuple[jax.Array, int]:
    """Matrices of which the mode is one dimension, and which dimension the other one is.

    The first mode and the last are where they have to be. One in between is moved to the front,
    which copies the blocks.
    """
    k, *shape = blocks.shape
    if mode == len(shape) - 1:
        return blocks.reshape(k, math.prod(shape[:-1]), shape[-1]), 1
    return jnp.moveaxis(blocks, mode + 1, 1).reshape(k, shape[mode], -1), 2


def _check(statistics: jax.Array, blocks: jax.Array, mode: int) -> None:
    core.check_int("mode", mode, low=0)
    if blocks.ndim < 2 or mode > blocks.ndim - 2:
        raise ValueError(
            f"blocks must be [k, d_1, ..., d_p] with p above mode={mode}, got {blocks.shape}"
        )
    expected = len(blocks), blocks.shape[mode + 1], blocks.shape[mode + 1]
    if statistics.shape != expected:
        raise ValueError(
            f"statistics must be {expected} for mode {mode} of blocks {blocks.shape}, got "
            f"{statistics.shape}"
        )


def _check_dtypes(statistics: jax.Array, blocks: jax.Array) -> None:
    for name, x in (("statistics", statistics), ("blocks", blocks)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            raise TypeError(
                f"the kernel takes {name} of float32 or bfloat16, got {x.dtype}; impl='xla' takes "
                "others"
            )
    if 0 in blocks.shape:
        raise ValueError(f"the kernel takes blocks with entries, got {blocks.shape}")
