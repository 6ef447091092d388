"""What a compressor is, and the simplest one.

Notation of this folder: x is one tensor, d its number of entries, B the length of a block that has
a scale of its own, k the number of entries kept, C(x) what ``decode`` makes of ``encode(x)``.

All arithmetic is in float32, whatever travels. A tensor of zeros is decoded to zeros. A non-finite
entry is not hidden: it makes something non-finite of its block (all of the block, where one scale
or one transform serves it; itself or a larger one in ``top_k``), except in ``random_k`` where it is
not drawn. To keep it away from a memory that it would poison is the task of that memory's holder,
who must look at x itself.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Shape = tuple[int, ...]
Bound = Callable[[Shape], float]  # a constant of a compressor for tensors of a shape


@dataclasses.dataclass(frozen=True, eq=False)
class Compressor:
    """A way to send one tensor in fewer bytes.

    Attributes:
      name: the name of its factory.
      encode: ``(x, key) -> payload``: from a float32 array of any shape (scalars and empty arrays
        too) and a typed PRNG key to a pytree of arrays, whose shapes follow from that of ``x`` and
        whose dtypes are the ones that travel. Compressors that draw nothing ignore the key.
      decode: ``(payload, like) -> array``: float32 of shape ``like.shape``. ``like`` is anything
        with a shape, ``jax.ShapeDtypeStruct`` for instance.
      nbytes: ``shape -> int``: bytes sent for one tensor of that shape; exact.
      linear: whether the mean of payloads, decoded, is the mean of the decoded tensors, so that a
        plain mean of payloads may cross the wire. Only floating leaves are averaged: others are
        made from the shared key, equal on all workers, and need neither travel nor count in
        ``nbytes``.
      shared_key: whether ``encode`` must get the same key on all workers. Where it need not,
        workers must get different ones: equal noise is not averaged away.
      block: the flat tensor may be cut at multiples of this many entries and the pieces compressed
        apart. The formats with blocks, chunks or no scale at all give the same result then; those
        with one scale a tensor (``block=None`` of ``sign``, ``ternary`` and ``fp8``) get one a
        piece instead, and keep their constants. 0: it must not be cut.
      contraction: δ by shape, with E‖C(x) − x‖² ≤ (1 − δ)‖x‖² for every x; ``None`` for a
        compressor that is no contraction.
      variance: ω by shape, with E C(x) = x and E‖C(x) − x‖² ≤ ω‖x‖² for every x; ``None`` for a
        biased one.
      encode_decoded: ``(x, key) -> (payload, C(x))`` at once, where a kernel does; ``None``: by
        ``encode`` and ``decode``.
      decode_mean: ``(payloads, like, own) -> array``: of payloads with a leading axis of workers
        the mean of what they decode to, added up in their order, where a kernel does. ``own`` is
        ``None``, or an array like ``like`` and the number of the worker whose message it is, which
        is taken as it is. ``None``: by ``decode``, one at a time.
    """

    name: str
    encode: Callable[[jax.Array, jax.Array], Any]
    decode: Callable[[Any, jax.ShapeDtypeStruct], jax.Array]
    nbytes: Callable[[Shape], int]
    linear: bool
    shared_key: bool
    block: int
    contraction: Bound | None
    variance: Bound | None
    encode_decoded: Callable[[jax.Array, jax.Array], tuple[Any, jax.Array]] | None = None
    decode_mean: Callable[..., jax.Array] | None = None


def by_kernels(
    plain: Compressor,
    encode_decoded: Callable[[jax.Array, jax.Array], tuple[Any, jax.Array]],
    decode_mean: Callable[..., jax.Array],
) -> Compressor:
    """``plain`` with both of these, and what else it does by them."""

    def decode(payload: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        """The mean of one message: nothing is rounded again."""
        return decode_mean(jax.tree.map(lambda x: x[None], payload), like, None)

    return dataclasses.replace(
        plain,
        encode=lambda x, key: encode_decoded(x, key)[0],
        decode=decode,
        encode_decoded=encode_decoded,
        decode_mean=decode_mean,
    )


def identity() -> Compressor:
    """Sends the tensor itself, float32: 4 bytes an entry, δ = 1, ω = 0."""
    return Compressor(
        name="identity",
        encode=lambda x, key: x,
        decode=lambda payload, like: jnp.reshape(payload, like.shape),
        nbytes=lambda shape: 4 * math.prod(shape),
        linear=True,
        shared_key=False,
        block=1,
        contraction=lambda shape: 1.0,
        variance=lambda shape: 0.0,
    )
