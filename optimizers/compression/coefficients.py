"""Means over workers of DCT coefficients, each taken over those that sent it, as in DeMo."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.optimizers.compression import pieces
from jaxopt_suite.optimizers.compression.dct import (
    Grid,
    chunk_grid,
    dct,
    from_chunks,
    inverse_dct,
    to_chunks,
)
from jaxopt_suite.optimizers.compression.exchange import Exchanged
from jaxopt_suite.optimizers.compression.sparse import (
    SparsePayload,
    ValueName,
    pack_largest,
    scatter,
    unpack_largest,
)

Mean = Literal["senders", "workers"]


@dataclasses.dataclass(frozen=True)
class Coefficients:
    """A way to send float32 arrays by the largest DCT coefficients of their chunks.

    Attributes:
      axis_name: the workers' axis.
      k: coefficients sent of each chunk, all if it has fewer.
      side: longest side of a chunk.
      pad: as in ``dct_top_k``.
      values: dtype of the coefficients.
      mean: over the workers that sent a coefficient, or over all of them.
    """

    axis_name: str
    k: int
    side: int
    pad: bool
    values: ValueName
    mean: Mean

    def exchange(self, messages: Sequence[jax.Array]) -> Exchanged:
        """Means over workers, and what this worker's messages were taken for.

        Chunks of one shape are transformed and searched together, whatever leaves they are of.

        Args:
          messages: float32 arrays, all split over the same mesh axes.
        """
        grids = [chunk_grid(x.shape, self.side, pad=self.pad) for x in messages]
        groups: dict[tuple[int, int], list[int]] = {}
        for i, grid in enumerate(grids):
            groups.setdefault(grid.sides, []).append(i)

        rows, payloads = [], []
        for sides, members in groups.items():
            chunks = jnp.concatenate([to_chunks(messages[i], grids[i]) for i in members])
            rows.append(dct(chunks).reshape(-1, math.prod(sides)))
            payloads.append(pack_largest(rows[-1], self._kept(rows[-1]), self.values))
        (received,) = pieces.to_all([payloads], self.axis_name)
        means = self._means(received, rows)
        sent = [
            scatter(payload, len(r), r.shape[1], self._kept(r))
            for payload, r in zip(payloads, rows, strict=True)
        ]
        nothing: list[Any] = [None] * len(messages)
        result = Exchanged(nothing, list(nothing))
        for members, *both in zip(groups.values(), means, sent, strict=True):
            for place, coefficients in zip(result, both, strict=True):
                arrays = _to_leaves(coefficients, members, grids, messages)
                for i, x in zip(members, arrays, strict=True):
                    place[i] = x
        return result

    def _kept(self, rows: jax.Array) -> int:
        return min(self.k, rows.shape[1])

    def _means(
        self, received: Sequence[SparsePayload], rows: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """Means of coefficients, one worker's message added after the other."""

        def add(sums: Any, message: Sequence[SparsePayload]) -> tuple[Any, None]:
            result = []
            for (total, senders), payload in zip(sums, message, strict=True):
                count, length = total.shape
                sent, indices = unpack_largest(payload, count, length, self._kept(total))
                at = jnp.arange(count, dtype=jnp.int32)[:, None], indices
                result.append(
                    (
                        total.at[at].add(sent, unique_indices=True),
                        senders.at[at].add(sent != 0, unique_indices=True),
                    )
                )
            return result, None

        zeros = [(jnp.zeros(r.shape, jnp.float32), jnp.zeros(r.shape, jnp.int32)) for r in rows]
        zeros = core.vary(zeros, tuple(pieces.axes_of_tree(received)))
        sums, _ = jax.lax.scan(add, zeros, received)
        if self.mean == "workers":
            return [total / jax.lax.axis_size(self.axis_name) for total, _ in sums]
        return [total / jnp.maximum(senders, 1) for total, senders in sums]


def _to_leaves(
    rows: jax.Array, members: Sequence[int], grids: Sequence[Grid], like: Sequence[jax.Array]
) -> list[jax.Array]:
    """The leaves whose chunks' coefficients are the rows, one leaf after the other."""
    chunks, leaves = inverse_dct(rows.reshape(-1, *grids[members[0]].sides)), []
    for i in members:
        own, chunks = chunks[: grids[i].chunks], chunks[grids[i].chunks :]
        leaves.append(from_chunks(own, grids[i], like[i].shape))
    return leaves
