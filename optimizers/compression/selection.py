"""The k largest magnitudes of a long vector, exactly, without sorting anything.

``jax.lax.top_k`` keeps a sorted list on the CPU and sorts on an accelerator unless k is small. The
magnitudes of floats are ordered as their bits are, as integers. So the bits of a threshold are
found from the highest down, each by a pass that counts what reaches it, until between k and 2k
entries do. A sample tells such a threshold beforehand for most gradients, so that one pass checks
it; else ten are usual and 31 the most. Those 2k are gathered, and the search goes on among them.
"""

import jax
import jax.numpy as jnp

from jaxopt_suite import core

_WORD = 32  # flags to a uint32
_SHORT = 2**15  # up to here top_k takes less than a millisecond
_SAMPLE = 2**16  # of one entry in a thousand it holds 65, in which 2k and k are told apart


def largest(x: jax.Array, k: int) -> jax.Array:
    """Indices of the ``k`` largest magnitudes, in no promised order.

    They are those of ``jax.lax.top_k(jnp.abs(x), k)``: of equal magnitudes the lower index wins,
    and NaN counts as larger than infinity.

    Args:
      x: float32 ``[n]``.
      k: at most n.

    Returns:
      int32 ``[k]``, all different.
    """
    if x.size <= _SHORT:
        return jax.lax.top_k(jnp.abs(x), k)[1].astype(jnp.int32)
    order = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    if 4 * k >= x.size:
        return _select(order, k, k)
    candidates = _select(order, k, 2 * k)
    found = jnp.where(candidates < x.size, order[candidates], -1)
    return candidates[_select(found, k, k)]


def _select(order: jax.Array, k: int, slots: int) -> jax.Array:
    """``slots`` indices, the k largest of ``order`` among them, the lower index first if equal.

    Args:
      order: int32 ``[n]``; negative ones are never wanted.
      k: at most ``slots``.
      slots: length of the result. Slots without a use hold indices not below n.
    """
    order = jnp.pad(order, (0, -order.size % _WORD), constant_values=-1)
    threshold = _threshold(order, k, slots)
    above, equal = order > threshold, order == threshold
    first, rest = _first_indices(above, slots), _first_indices(equal, slots)
    slot, taken = jnp.arange(slots, dtype=jnp.int32), _count(above)
    return jnp.where(slot < taken, first, rest[jnp.maximum(slot - taken, 0)])


def _threshold(order: jax.Array, k: int, slots: int) -> jax.Array:
    """The k-th largest t, or any t that at least k and at most ``slots`` entries reach; int32.

    Either way fewer than ``slots`` entries, or just as many, lie above t.
    """

    def try_a_bit(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        bit, threshold, count = carry
        higher = threshold | (1 << bit)
        reached = _count(order >= higher)
        keep = reached >= k
        return bit - 1, jnp.where(keep, higher, threshold), jnp.where(keep, reached, count)

    start = (jnp.int32(30), jnp.int32(0), jnp.int32(order.size))
    start = core.vary(start, tuple(core.varying_axes(order)))
    if slots > k:
        guess = _guess(order, (k + slots) // 2)
        reached = _count(order >= guess)
        good = (reached >= k) & (reached <= slots)
        start = jax.tree.map(lambda a, b: jnp.where(good, a, b), (-1, guess, reached), start)
    is_open = lambda carry: (carry[0] >= 0) & (carry[2] > slots)
    return jax.lax.while_loop(is_open, try_a_bit, start)[1]


def _guess(order: jax.Array, rank: int) -> jax.Array:
    """About the ``rank``-th largest entry: the one of the same relative rank among every s-th."""
    stride = max(1, order.size // _SAMPLE)
    sample = order[::stride]
    sample = jnp.pad(sample, (0, -sample.size % _WORD), constant_values=-1)
    rank = max(1, rank // stride)
    return _threshold(sample, rank, rank)


def _count(flags: jax.Array) -> jax.Array:
    """How many flags are set, by words: ten times faster on the CPU than one long sum."""
    shifts = jnp.arange(_WORD, dtype=jnp.uint32)[:, None]
    words = jnp.sum(flags.reshape(_WORD, -1).astype(jnp.uint32) << shifts, axis=0, dtype=jnp.uint32)
    return jnp.sum(jax.lax.population_count(words).astype(jnp.int32))


def _first_indices(flags: jax.Array, size: int) -> jax.Array:
    """Indices of the first ``size`` flags that are set, int32; ``flags.size`` for those missing."""
    shifts = jnp.arange(_WORD, dtype=jnp.uint32)[None, :]
    words = jnp.sum(flags.reshape(-1, _WORD).astype(jnp.uint32) << shifts, axis=1, dtype=jnp.uint32)
    counts = jnp.cumsum(jax.lax.population_count(words).astype(jnp.int32))
    wanted = jnp.arange(size, dtype=jnp.int32)
    word = jnp.searchsorted(counts, wanted, side="right").astype(jnp.int32)
    exists = word < words.size
    word = jnp.minimum(word, words.size - 1)
    before = jnp.where(word > 0, counts[word - 1], 0)
    index = word * _WORD + _nth_set_bit(words[word], wanted - before)
    return jnp.where(exists, index, flags.size)


def _nth_set_bit(words: jax.Array, nth: jax.Array) -> jax.Array:
    """Position of the ``nth`` (from 0) set bit of each uint32, int32, by halving the word."""
    position = jnp.zeros_like(nth)
    for half in (16, 8, 4, 2, 1):
        low = jax.lax.population_count(words & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
        upper = nth >= low
        nth = jnp.where(upper, nth - low, nth)
        words = jnp.where(upper, words >> half, words)
        position = jnp.where(upper, position + half, position)
    return position
