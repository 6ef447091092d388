"""The largest cosine coefficients of every chunk of a matrix, found and decoded in one pass.

A matrix is cut into chunks of a rows and b columns. Each goes through the orthonormal DCT-II along
both axes, Y = D_a X D_bᵀ, and the k largest magnitudes are sent. This is what
``compressors.dct_top_k`` and ``demo`` do, whose coefficients these are.

Left to XLA it is a copy of the matrix into chunks, two products, a sort of each chunk with its
indices, a scatter, two products and the copy back. The kernels, ``dct_tpu`` and ``dct_gpu``, take
the matrix as it lies and sort nothing.
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_suite import core
from jaxopt_suite.kernels.chunks import LANES
from jaxopt_suite.kernels.implementations import Impl, by_kernel, resolve

_HIGHEST = jax.lax.Precision.HIGHEST  # a TPU's default multiplies float32 as bfloat16


class Largest(NamedTuple):
    """What ``dct_top_k`` gives for c chunks, which are counted along the rows of the matrices."""

    values: jax.Array  # float32 [c, k]: coefficients as they travel
    indices: jax.Array  # int32 [c, k]: where these are in the flat chunk, in no promised order
    decoded: jax.Array  # float32, the shape of what was transformed: of these coefficients alone


def dct_top_k(
    x: jax.Array,
    k: int,
    sides: tuple[int, int],
    *,
    values: Literal["float32", "bfloat16"] = "float32",
    impl: Impl = "auto",
) -> Largest:
    """The k largest DCT coefficients of every chunk, and what they will be decoded to, in one pass.

    Of equal magnitudes the one of the lower index is taken. The kernels, for TPUs and for NVIDIA
    GPUs from Hopper on, read x once and write what is decoded, and 8 bytes for each coefficient, or
    on TPUs for each column of each row of chunks. Their coefficients are the definition's up to
    rounding; where one is not finite, all of its chunk is decoded to NaN.
    Time on hardware: unmeasured. What the compilers say of them: ``docs/guides/kernels.md``.

    Args:
      x: float32 ``[..., rows, columns]``, filled up with zeros to whole chunks.
      k: coefficients of a chunk, at most all of them.
      sides: (a, b) of a chunk. What the kernels take is said by ``dct_top_k_takes``.
      values: dtype that coefficients are rounded to.
      impl: see ``kernels.resolve``.

    Raises:
      ValueError, TypeError: for a bad argument, or for chunks that no kernel takes.
      NotImplementedError: see ``kernels.resolve``.
    """
    chosen = resolve("dct_top_k", impl)
    _check(x, k, sides, values)
    if chosen == "xla" or x.size == 0:
        return dct_top_k_definition(x, k, sides, values)
    if not dct_top_k_takes(sides, k):
        raise ValueError(
            "the kernels take chunks of a multiple of 8 up to 128 rows, of columns that divide 128 "
            f"and are 8 at least, and no more coefficients than columns, got sides={sides}, k={k}"
        )
    matrices = x.reshape(-1, *x.shape[-2:])
    cosines = [dct_matrix(side) for side in sides]

    def on_tpu(x: jax.Array) -> Largest:
        from jaxopt_suite.kernels import dct_tpu  # slow to import

        return Largest(*dct_tpu.top_k(x, *cosines, k=k, values=values, impl=chosen))

    def on_gpu(x: jax.Array) -> Largest:
        from jaxopt_suite.kernels import dct_gpu  # slow to import

        return Largest(*dct_gpu.top_k(x, *cosines, k=k, values=values))

    found = by_kernel("dct_top_k", on_tpu, chosen, matrices, cuda=on_gpu)
    return found._replace(decoded=found.decoded.reshape(x.shape))


def dct_top_k_takes(sides: tuple[int, int], k: int) -> bool:
    """Whether the kernels take k coefficients of chunks of ``sides``, (a, b)."""
    a, b = sides
    return a % 8 == 0 and a <= LANES and b >= 8 and LANES % b == 0 and k <= b


def dct_top_k_definition(x: jax.Array, k: int, sides: tuple[int, int], values: str) -> Largest:
    """What ``dct_top_k`` means, in plain JAX."""
    (a, b), (rows, columns) = sides, x.shape[-2:]
    down, across, stack = -(-rows // a), -(-columns // b), math.prod(x.shape[:-2])
    fill = (0, 0), (0, down * a - rows), (0, across * b - columns)
    padded = jnp.pad(x.reshape(stack, rows, columns), fill)
    chunks = padded.reshape(stack, down, a, across, b).swapaxes(2, 3)
    of_rows, of_columns = jnp.asarray(dct_matrix(a)), jnp.asarray(dct_matrix(b))
    contract = functools.partial(jnp.einsum, precision=_HIGHEST)

    half = contract("...ab,jb->...aj", chunks, of_columns)
    coefficients = contract("ia,...aj->...ij", of_rows, half)
    coefficients = coefficients.reshape(stack * down * across, a * b)
    indices = jax.lax.top_k(jnp.abs(coefficients), k)[1]
    kept = jnp.take_along_axis(coefficients, indices, axis=1)
    kept = kept.astype(values).astype(jnp.float32)

    place = jnp.arange(len(indices), dtype=jnp.int32)[:, None], indices
    sent = jnp.zeros_like(coefficients).at[place].set(kept, unique_indices=True)
    half = contract("...ij,jb->...ib", sent.reshape(chunks.shape), of_columns)
    decoded = contract("ia,...ib->...ab", of_rows, half).swapaxes(2, 3)
    decoded = decoded.reshape(padded.shape)[:, :rows, :columns]
    return Largest(kept, indices, decoded.reshape(x.shape))


def dct_matrix(length: int) -> np.ndarray:
    """The orthonormal DCT-II, D[i, j] = √((2 − [i=0])/n) cos(π i (2j + 1) / 2n), float32 [n, n]."""
    i, j = np.arange(length)[:, None], np.arange(length)[None, :]
    matrix = np.cos(np.pi * i * (2 * j + 1) / (2 * length)) * np.sqrt(2 / length)
    matrix[0] /= np.sqrt(2)
    return matrix.astype(np.float32)


def _check(x: jax.Array, k: int, sides: tuple[int, int], values: str) -> None:
    core.check_choice("values", values, ("float32", "bfloat16"))
    core.check_int("k", k, low=1)
    if x.dtype != jnp.float32:
        raise TypeError(f"x must be float32, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must have rows and columns, got shape {x.shape}")
    if min(sides) < 1 or k > sides[0] * sides[1]:
        raise ValueError(f"a chunk of sides={sides} has no k={k} coefficients")
