"""Gradients to the devices that own their blocks, and directions back: all that crosses a mesh."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxopt_suite.core.collectives import gather_equal
from jaxopt_suite.optimizers.shampoo.blocks import Blocks, Shape, Stacks, tiles, untiled
from jaxopt_suite.optimizers.shampoo.routes import Grid, Lane
from jaxopt_suite.optimizers.shampoo.tables import Tables


class Route(NamedTuple):
    """The ways of all leaves; its functions run inside a ``shard_map`` over the mesh axes."""

    blocks: Blocks
    grids: dict[int, Grid]  # of the leaves that are not empty
    lanes: list[Lane]
    axes: tuple[str, ...]  # that the stacks are spread over

    def table_specs(self) -> list[Tables[PartitionSpec]]:
        """How the lanes' tables are split."""
        whole = PartitionSpec(self.axes)
        return [
            Tables(
                send=whole,
                take=dict.fromkeys(lane.tables.take, whole),
                offsets=dict.fromkeys(lane.tables.offsets, whole),
                back=whole,
                merge=whole,
                land=None if lane.tables.land is None else PartitionSpec(lane.axes or None),
            )
            for lane in self.lanes
        ]

    def to_owners(
        self, leaves: Sequence[jax.Array], tables: list[Tables[jax.Array]], dtype: Any
    ) -> Stacks:
        """This device's rows of every stack.

        Args:
          leaves: this device's parts.
          tables: this device's, of every lane, without their first axis.
          dtype: of the result; the leaves travel in their own.
        """
        stacks: Stacks = {}
        for lane, table in zip(self.lanes, tables, strict=True):
            atoms = jnp.concatenate([self._atoms(leaves[i], i) for i in lane.leaves])
            cells = _exchanged(_picked(atoms, table.send), lane.axes).astype(dtype)
            for name, take in table.take.items():
                block = self.blocks.shape(name)[1:]
                offsets = table.offsets.get(name)
                rows = _assembled(_picked(cells, take), lane.pieces[name], block, offsets)
                stacks[name] = stacks[name] + rows if name in stacks else rows
        return stacks

    def to_holders(
        self, stacks: Stacks, tables: list[Tables[jax.Array]], leaves: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """This device's parts of every leaf, in the shapes and dtypes of ``leaves``."""
        result = list(leaves)
        for lane, table in zip(self.lanes, tables, strict=True):
            dtype = leaves[lane.leaves[0]].dtype
            pieces = jnp.concatenate(
                [
                    _taken_apart(
                        stacks[name].astype(dtype), spread, lane.atom, table.offsets.get(name)
                    )
                    for name, spread in lane.pieces.items()
                ]
            )
            cells = _exchanged(_picked(pieces, table.back), lane.axes)
            # Blocks that meet within an atom have zeros where the other one is.
            atoms = jnp.sum(_picked(cells, table.merge), axis=1)
            if table.land is not None:
                atoms = gather_equal(atoms, lane.others, tiled=True)
                atoms = jnp.sum(_picked(atoms, table.land), axis=1)
            elif lane.others:
                atoms = jax.lax.psum(atoms, lane.others)
            for i in lane.leaves:
                own, atoms = jnp.split(atoms, [math.prod(self.grids[i].count)])
                result[i] = self._leaf(own, i).reshape(leaves[i].shape)
        return result

    def _atoms(self, leaf: jax.Array, i: int) -> jax.Array:
        """A part of leaf i in atoms, ``[atoms, *atom]``; behind its end are zeros."""
        grid = self.grids[i]
        leaf = leaf.reshape(self._part(i))
        missing = [n * a - s for n, a, s in zip(grid.count, grid.atom, leaf.shape, strict=True)]
        return tiles(jnp.pad(leaf, [(0, n) for n in missing]), grid.count, grid.atom)

    def _leaf(self, atoms: jax.Array, i: int) -> jax.Array:
        """The inverse, in its merged shape."""
        grid = self.grids[i]
        return untiled(atoms, grid.count, grid.atom)[tuple(slice(n) for n in self._part(i))]

    def _part(self, i: int) -> Shape:
        """The shape of a part of leaf i, merged."""
        merged, parts = self.blocks.merged[i], self.grids[i].parts
        return tuple(size // n for size, n in zip(merged, parts, strict=True))


def _picked(rows: jax.Array, which: jax.Array) -> jax.Array:
    """``rows[which]``, zeros where there is no such row."""
    return jnp.take(rows, which, axis=0, mode="fill", fill_value=0)


def _exchanged(cells: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """From ``[to part, cells, *atom]`` to what came, ``[parts * cells, *atom]``."""
    if axes:
        cells = jax.lax.all_to_all(cells, axes, split_axis=0, concat_axis=0, tiled=True)
    return cells.reshape(-1, *cells.shape[2:])


def _assembled(
    pieces: jax.Array, spread: Shape, block: Shape, offsets: jax.Array | None
) -> jax.Array:
    """Blocks ``[rows, *block]`` from ``[rows, pieces, *atom]``, ``offsets [rows, k]`` into them."""
    joined = jax.vmap(lambda x: untiled(x, spread, x.shape[1:]))(pieces)
    if offsets is None:
        return joined[(slice(None), *(slice(n) for n in block))]
    return jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, at, block))(joined, offsets)


def _taken_apart(
    rows: jax.Array, spread: Shape, atom: Shape, offsets: jax.Array | None
) -> jax.Array:
    """The inverse, all in one stack ``[rows * pieces, *atom]``; zeros where no block is."""
    size = tuple(n * a for n, a in zip(spread, atom, strict=True))
    if offsets is None:
        offsets = jnp.zeros((len(rows), len(size)), jnp.int32)
    put = lambda x, at: jax.lax.dynamic_update_slice(jnp.zeros(size, x.dtype), x, at)
    cut = jax.vmap(lambda x, at: tiles(put(x, at), spread, atom))(rows, offsets)
    return cut.reshape(-1, *atom)
