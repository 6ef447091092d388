"""Means over workers of DCT coefficients, each taken over those that sent it, as in DeMo."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxopt_suite import core, kernels
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
    pack_entries,
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
      impl: as in ``dct_top_k``.
    """

    axis_name: str
    k: int
    side: int
    pad: bool
    values: ValueName
    mean: Mean
    impl: kernels.Impl

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

        nothing: list[Any] = [None] * len(messages)
        result = Exchanged(nothing, list(nothing))
        payloads, shapes = [], []
        for sides, members in groups.items():
            encode = self._by_kernel if self._has_kernel(sides) else self._plainly
            payload, sent = encode([messages[i] for i in members], [grids[i] for i in members])
            payloads.append(payload)
            shapes.append((sum(grids[i].chunks for i in members), math.prod(sides)))
            _put(sent, members, result.sent)
        (received,) = pieces.to_all([payloads], self.axis_name)
        means = self._means(received, shapes)
        for members, coefficients in zip(groups.values(), means, strict=True):
            own = [grids[i] for i in members]
            mean = _to_leaves(coefficients, own, [messages[i] for i in members])
            _put(mean, members, result.mean)
        return result

    def _has_kernel(self, sides: tuple[int, int]) -> bool:
        chosen = kernels.resolve("dct_top_k", self.impl)
        kept = self._kept(math.prod(sides))
        return chosen != "xla" and kernels.dct_top_k_takes(sides, kept)

    def _by_kernel(
        self, messages: Sequence[jax.Array], grids: Sequence[Grid]
    ) -> tuple[SparsePayload, list[jax.Array]]:
        """The payload of messages cut into chunks of one shape, and what each is taken for."""
        sides, area = grids[0].sides, grids[0].area
        search = functools.partial(kernels.dct_top_k, values=self.values, impl=self.impl)
        found = [search(x, self._kept(area), sides) for x in messages]
        values, indices, decoded = zip(*found, strict=True)
        payload = pack_entries(jnp.concatenate(values), jnp.concatenate(indices), area, self.values)
        return payload, list(decoded)

    def _plainly(
        self, messages: Sequence[jax.Array], grids: Sequence[Grid]
    ) -> tuple[SparsePayload, list[jax.Array]]:
        """The same without the kernel."""
        chunks = jnp.concatenate([to_chunks(x, g) for x, g in zip(messages, grids, strict=True)])
        area, kept = grids[0].area, self._kept(grids[0].area)
        rows = dct(chunks).reshape(-1, area)
        payload = pack_largest(rows, kept, self.values)
        return payload, _to_leaves(scatter(payload, len(rows), area, kept), grids, messages)

    def _kept(self, area: int) -> int:
        return min(self.k, area)

    def _means(
        self, received: Sequence[SparsePayload], shapes: Sequence[tuple[int, int]]
    ) -> list[jax.Array]:
        """Means of coefficients, one worker's message added after the other."""

        def add(sums: Any, message: Sequence[SparsePayload]) -> tuple[Any, None]:
            result = []
            for (total, senders), payload in zip(sums, message, strict=True):
                count, length = total.shape
                sent, indices = unpack_largest(payload, count, length, self._kept(length))
                at = jnp.arange(count, dtype=jnp.int32)[:, None], indices
                result.append(
                    (
                        total.at[at].add(sent, unique_indices=True),
                        senders.at[at].add(sent != 0, unique_indices=True),
                    )
                )
            return result, None

        zeros = [(jnp.zeros(s, jnp.float32), jnp.zeros(s, jnp.int32)) for s in shapes]
        zeros = core.vary(zeros, tuple(pieces.axes_of_tree(received)))
        sums, _ = jax.lax.scan(add, zeros, received)
        if self.mean == "workers":
            return [total / jax.lax.axis_size(self.axis_name) for total, _ in sums]
        return [total / jnp.maximum(senders, 1) for total, senders in sums]


def _to_leaves(
    rows: jax.Array, grids: Sequence[Grid], like: Sequence[jax.Array]
) -> list[jax.Array]:
    """The leaves whose chunks' coefficients are the rows, one leaf after the other."""
    chunks, leaves = inverse_dct(rows.reshape(-1, *grids[0].sides)), []
    for grid, x in zip(grids, like, strict=True):
        own, chunks = chunks[: grid.chunks], chunks[grid.chunks :]
        leaves.append(from_chunks(own, grid, x.shape))
    return leaves


def _put(found: Sequence[jax.Array], members: Sequence[int], places: list[Any]) -> None:
    for i, x in zip(members, found, strict=True):
        places[i] = x
