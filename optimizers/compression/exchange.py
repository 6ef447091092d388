"""How compressed messages become one mean on all workers: the collectives and their bytes.

With ``n`` workers and a message that encodes to ``S`` bytes, each worker sends, under the ring
model,

    dense       2 (n-1)/n 4 d    one all-reduce of the message as it is, d elements
    mean        2 (n-1)/n S      one all-reduce of the payload, where the compressor is linear
    gather        (n-1)   S      one all-gather of payloads, decoded and averaged everywhere
    two_phase   2 (n-1)   s      all-to-all of pieces, their mean encoded again, all-gather
    factors     2 (n-1)/n S      two all-reduces, see ``powersgd_rounds``: low_rank only

where ``s`` is what one of ``n`` pieces encodes to. All leaves that take the same way travel in one
buffer, padded to whole lines of 128 bytes, so that a step has one collective a phase. On a mesh
with more axes, leaves that lie over different ones cannot share a buffer; there is one for every
such set of axes.

What was received is decoded and added up in the order of the workers, in float32, one message at a
time: results are the same bits everywhere, and memory does not grow with the number of workers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.optimizers.compression import pieces
from jaxopt_suite.optimizers.compression.compressor import Compressor

EXCHANGES = ("auto", "mean", "gather", "two_phase")

_Arrays = Sequence[jax.Array]


class Exchanged(NamedTuple):
    """What an exchange gives for each message."""

    mean: list[jax.Array]  # of what all workers' messages were taken for: equal on all of them
    sent: list[jax.Array]  # what this worker's was taken for


def check_exchange(compressor: Compressor, exchange: str) -> None:
    """Raises ``ValueError`` for an exchange that the compressor cannot do."""
    core.check_choice("exchange", exchange, EXCHANGES)
    reasons = {
        "mean": (
            compressor.linear,
            "adds payloads up, and those of this compressor are not linear",
        ),
        "two_phase": (
            compressor.block > 0,
            "cuts messages into pieces, which this compressor does not allow",
        ),
    }
    possible, reason = reasons.get(exchange, (True, ""))
    if not possible:
        legal = ["auto", *["mean"] * compressor.linear, "gather"]
        legal += ["two_phase"] * (compressor.block > 0)
        raise ValueError(
            f"exchange={exchange!r} {reason}: {compressor.name} takes one of "
            + ", ".join(map(repr, legal))
        )


def choose(compressor: Compressor, shape: tuple[int, ...], workers: int, exchange: str) -> str:
    """The exchange for a message of this shape: the one asked for, or that of fewest bytes.

    Args:
      compressor: what encodes it.
      shape: of the message, as a device holds it.
      workers: how many there are.
      exchange: one of ``EXCHANGES``.

    Returns:
      ``"dense"``, ``"mean"``, ``"gather"``, ``"two_phase"`` or, for ``low_rank``, ``"factors"``. Of
      those that send as much the one that encodes once, so that a single worker's messages are
      compressed as others' are.
    """
    if exchange != "auto":
        return exchange
    if sends_factors(compressor, exchange):
        return "factors"
    legal = ["mean" if compressor.linear else "gather"]
    legal += ["two_phase"] * (compressor.block > 0) + ["dense"]
    return min(legal, key=lambda way: sent_bytes(compressor, shape, workers, way))


def sent_bytes(
    compressor: Compressor, shape: tuple[int, ...], workers: int, exchange: str
) -> float:
    """Bytes that one worker sends for a message of this shape, under the ring model.

    Without the padding of the buffer in which it travels with others, less than 128 bytes for all
    of them together and each worker that it goes to.

    Args:
      compressor: what encodes it.
      shape: of the message, as a device holds it.
      workers: how many there are.
      exchange: one of ``EXCHANGES``, or ``"dense"``.
    """
    exchange = choose(compressor, shape, workers, exchange)
    size = math.prod(shape)
    others = workers - 1
    if exchange == "gather":
        return float(others * compressor.nbytes(shape))
    if exchange == "two_phase":
        piece = pieces.piece_length(size, workers, compressor.block)
        return float(2 * others * compressor.nbytes((piece,)))
    return 2 * others / workers * (4 * size if exchange == "dense" else compressor.nbytes(shape))


def sends_factors(compressor: Compressor, exchange: str) -> bool:
    """Whether this is PowerSGD, which has rounds of its own (``powersgd_rounds``)."""
    return compressor.name == "low_rank" and exchange == "auto"


def exchange_messages(
    compressor: Compressor,
    messages: _Arrays,
    keys: Sequence[jax.Array],
    ways: Sequence[str],
    axis_name: str,
) -> Exchanged:
    """Sends every message its way.

    Args:
      compressor: encodes and decodes.
      messages: float32 arrays, this worker's.
      keys: a random key for each.
      ways: for each, as ``choose`` gives it.
      axis_name: the workers' axis.
    """
    messages = [core.vary(x, axis_name) for x in messages]
    exchanges: dict[str, Callable[..., Exchanged]] = {
        "dense": _dense,
        "mean": _linear,
        "gather": _gather,
        "two_phase": _two_phase,
    }
    result = Exchanged(list(messages), list(messages))  # in whose places the answers go
    groups: dict[Any, list[int]] = {}
    for i, (x, way) in enumerate(zip(messages, ways, strict=True)):
        groups.setdefault((way, core.varying_axes(x)), []).append(i)
    for (way, _), members in groups.items():
        chosen = [messages[i] for i in members], [keys[i] for i in members]
        done = exchanges[way](compressor, *chosen, axis_name)
        for i, mean, sent in zip(members, *done, strict=True):
            result.mean[i], result.sent[i] = mean, sent
    return result


def mean_of_buffer(arrays: _Arrays, axis_name: str) -> list[jax.Array]:
    """Means of float32 arrays over workers: one all-reduce for all that lie over the same axes."""

    def mean(members: list[jax.Array]) -> list[jax.Array]:
        flat = jnp.concatenate([x.astype(jnp.float32).ravel() for x in members])
        rest, means = jax.lax.pmean(flat, axis_name), []
        for x in members:
            means.append(rest[: x.size].reshape(x.shape))
            rest = rest[x.size :]
        return means

    return pieces.by_axes(mean, arrays, axis_name)


def _dense(compressor: Compressor, messages: _Arrays, keys: _Arrays, axis_name: str) -> Exchanged:
    del compressor, keys
    return Exchanged(mean_of_buffer(messages, axis_name), list(messages))


def _linear(compressor: Compressor, messages: _Arrays, keys: _Arrays, axis_name: str) -> Exchanged:
    payloads = [compressor.encode(x, key) for x, key in zip(messages, keys, strict=True)]
    travelling, put_back = _travelling(compressor, payloads)
    means = put_back(mean_of_buffer(travelling, axis_name))
    return Exchanged(
        _decode_all(compressor, means, messages), _decode_all(compressor, payloads, messages)
    )


def _gather(compressor: Compressor, messages: _Arrays, keys: _Arrays, axis_name: str) -> Exchanged:
    payloads, sent = _encode_all(compressor, messages, keys)
    travelling, put_back = _travelling(compressor, payloads)
    (rows,) = pieces.to_all([travelling], axis_name)
    if compressor.decode_mean is not None:
        return Exchanged(_means(compressor, put_back(rows), messages), sent)
    decode = lambda row: _decode_all(compressor, put_back(row), messages)
    return Exchanged(_mean_of_rows(decode, rows), sent)


def _two_phase(
    compressor: Compressor, messages: _Arrays, keys: _Arrays, axis_name: str
) -> Exchanged:
    workers, worker = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    cut = [pieces.cut(x, workers, compressor.block) for x in messages]
    own = [rows[worker] for rows in cut]

    # To the owners. A worker's own piece stays at home and needs no code.
    each = [jax.random.split(key, workers + 1) for key in keys]
    encode = jax.vmap(lambda xs, ks: _encode_all(compressor, xs, ks))
    payloads, sent = encode(cut, [key[:-1] for key in each])
    decode_rows = jax.vmap(lambda row: _decode_all(compressor, row, own))
    (received,) = pieces.to_owners([payloads], axis_name)

    def decode(row: Any, sender: jax.Array) -> list[jax.Array]:
        decoded = _decode_all(compressor, row, own)
        return [jnp.where(sender == worker, x, y) for x, y in zip(own, decoded, strict=True)]

    if compressor.decode_mean is not None:
        means = _means(compressor, received, own, worker)
    else:
        means = _mean_of_rows(decode, received, jnp.arange(workers))
    means = [_without_padding(z, x.size, worker) for z, x in zip(means, messages, strict=True)]

    # From the owners to all.
    payloads, taken = _encode_all(compressor, means, [key[-1] for key in each])
    (told,) = pieces.to_all([payloads], axis_name)
    at_home = [x - workers * (z - y) for x, z, y in zip(own, means, taken, strict=True)]
    sent = [rows.at[worker].set(x) for rows, x in zip(sent, at_home, strict=True)]
    joined = lambda all_rows: [
        pieces.join(rows, x.shape, x.size) for rows, x in zip(all_rows, messages, strict=True)
    ]
    return Exchanged(joined(decode_rows(told)), joined(sent))


def _mean_of_rows(decode: Callable[..., list[jax.Array]], *rows: Any) -> list[jax.Array]:
    """The mean of the rows' decoded arrays, added up in their order, one row at a time."""

    def add(total: list[jax.Array], row: tuple[Any, ...]) -> tuple[list[jax.Array], None]:
        return [x + y for x, y in zip(total, decode(*row), strict=True)], None

    like = jax.eval_shape(decode, *jax.tree.map(lambda x: x[0], rows))
    axes = tuple(pieces.axes_of_tree(rows[0]))
    zeros = core.vary([jnp.zeros(x.shape, x.dtype) for x in like], axes)
    total, _ = jax.lax.scan(add, zeros, rows)
    return [x / len(jax.tree.leaves(rows)[0]) for x in total]


def _means(
    compressor: Compressor, rows: Any, like: _Arrays, owner: jax.Array | None = None
) -> list[jax.Array]:
    """The same by a kernel; of the messages of ``owner``, ``like`` are what they are taken for."""
    assert compressor.decode_mean is not None
    return [
        compressor.decode_mean(payloads, _like(x), None if owner is None else (x, owner))
        for payloads, x in zip(rows, like, strict=True)
    ]


def _encode_all(
    compressor: Compressor, messages: _Arrays, keys: Sequence[jax.Array]
) -> tuple[list[Any], list[jax.Array]]:
    """The payloads of messages, and what these will be taken for."""
    if compressor.encode_decoded is None:
        payloads = [compressor.encode(x, key) for x, key in zip(messages, keys, strict=True)]
        return payloads, _decode_all(compressor, payloads, messages)
    pairs = zip(messages, keys, strict=True)
    both = [compressor.encode_decoded(x, key) for x, key in pairs]
    return [payload for payload, _ in both], [decoded for _, decoded in both]


def _travelling(
    compressor: Compressor, payloads: Any
) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """The arrays that are sent, and what puts others into their places.

    What is not floating in a linear compressor's payload comes from the key that all workers share.
    """
    leaves, structure = jax.tree.flatten(payloads)
    floating = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    sent = [i for i in range(len(leaves)) if floating[i] or not compressor.linear]

    def put_back(arrays: list[jax.Array]) -> Any:
        received = dict(zip(sent, arrays, strict=True))
        return structure.unflatten([received.get(i, x) for i, x in enumerate(leaves)])

    return [leaves[i] for i in sent], put_back


def _decode_all(compressor: Compressor, payloads: Any, like: _Arrays) -> list[jax.Array]:
    pairs = zip(payloads, like, strict=True)
    return [compressor.decode(payload, _like(x)) for payload, x in pairs]


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _without_padding(piece: jax.Array, size: int, owner: jax.Array) -> jax.Array:
    """A code without a zero makes something of the padding, which would be encoded again."""
    position = owner * len(piece) + jnp.arange(len(piece))
    return jnp.where(position < size, piece, 0)
