"""Which parts of sharded leaves go to the owners of which blocks: tables in NumPy, made once.

A stack's rows lie on the devices of a mesh in equal runs; a leaf lies as its PartitionSpec says.
What travels are *atoms*: a device's part of a leaf is cut into pieces of one shape, no larger than
a block, and a block is put together from the atoms that it overlaps. Leaves whose atoms have one
shape, dtype and mesh axes travel together, in a *lane*: one all-to-all over these axes. Along the
other axes, which hold copies of the leaf, every device has what the owners at its own place need;
on the way back what these have of an atom is added up there, and then among the copies.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_suite.optimizers.shampoo.blocks import Blocks, Region, Shape, name_of
from jaxopt_suite.optimizers.shampoo.tables import Needs, Places, Tables, make_tables

_SMALLEST = 4  # an atom at least a fourth as long as it might be, or the leaf is gathered there


@dataclasses.dataclass(frozen=True)
class Grid:
    """How every device's part of a leaf is cut into atoms.

    Attributes:
      spec: how the leaf is taken: its own spec, but for axes that cut it where no atom would fit.
      axes: the mesh axes of ``spec``, in order.
      parts: how many the leaf has along each merged dimension.
      atom: the shape of an atom.
      count: atoms of a part along each dimension, the last one padded where there is one part.
    """

    spec: PartitionSpec
    axes: tuple[str, ...]
    parts: Shape
    atom: Shape
    count: Shape


@dataclasses.dataclass(frozen=True)
class Lane:
    """Leaves that travel together.

    Attributes:
      leaves: their positions in the tree.
      axes: the mesh axes that they are exchanged over.
      others: those that hold copies of them.
      atom: the shape of what travels.
      pieces: of each stack that has blocks of theirs, how many a block is made of, by dimension.
      tables: whose first axis is split over all mesh axes; of ``land`` over ``axes``.
    """

    leaves: tuple[int, ...]
    axes: tuple[str, ...]
    others: tuple[str, ...]
    atom: Shape
    pieces: dict[str, Shape]
    tables: Tables[np.ndarray]


def make_lanes(
    blocks: Blocks,
    grids: Mapping[int, Grid],
    dtypes: Sequence[Any],
    mesh: Mapping[str, int],
) -> list[Lane]:
    """The lanes of a tree.

    Args:
      blocks: how its leaves are cut; all stacks divide evenly among the devices.
      grids: how they are cut into atoms; of all leaves that are not empty.
      dtypes: of the leaves.
      mesh: sizes of the axes that the stacks are spread over, in the order of the mesh.
    """
    together: dict[Any, list[int]] = {}
    for i, grid in grids.items():
        together.setdefault((grid.axes, grid.atom, jnp.dtype(dtypes[i])), []).append(i)
    return [
        _lane(blocks, {i: grids[i] for i in leaves}, axes, atom, mesh)
        for (axes, atom, _), leaves in together.items()
    ]


def make_grid(
    shape: Shape, merged: Shape, spec: PartitionSpec, block_size: int, mesh: Mapping[str, int]
) -> Grid:
    """How a leaf's parts are cut.

    Parts and blocks may be of any lengths: an atom is the longest divisor of a part that is no
    longer than a block. Where that is far too short, as for a prime length, and where a dimension
    is cut that is not the first of those merged with it, the leaf is gathered along it.

    Args:
      shape: of the leaf.
      merged: after merging.
      spec: its layout.
      block_size: largest length of a block.
      mesh: sizes of the axes.
    """
    given = [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec]
    given += [()] * (len(shape) - len(given))
    kept: list[tuple[str, ...]] = [()] * len(shape)
    parts, atom, count = [], [], []
    for size, first in zip(merged, _first_dimensions(shape, merged), strict=True):
        axes = () if first is None else tuple(a for a in given[first] if mesh.get(a, 1) > 1)
        n = math.prod(mesh[a] for a in axes)
        fits = n > 1 and shape[first or 0] % n == 0
        length = _longest_divisor(size // n, block_size) if fits else 0
        if length * _SMALLEST >= min(block_size, size // n):
            parts.append(n)
            kept[first or 0] = axes
            count.append(size // n // length)
        else:
            length = min(size, block_size)
            parts.append(1)
            count.append(-(-size // length))
        atom.append(length)
    spec = PartitionSpec(*(axes or None for axes in kept))
    over = tuple(axis for axes in kept for axis in axes)
    return Grid(spec, over, tuple(parts), tuple(atom), tuple(count))


def _lane(
    blocks: Blocks,
    grids: dict[int, Grid],
    axes: tuple[str, ...],
    atom: Shape,
    mesh: Mapping[str, int],
) -> Lane:
    regions = [r for r in blocks.regions if r.leaf in grids]
    pieces: dict[str, Shape] = {}
    for region in regions:
        name, found = name_of(region.block), _spans(region, grids[region.leaf])
        pieces[name] = tuple(map(max, found, pieces.get(name, found)))
    starts, atoms = {}, 0
    for i, grid in grids.items():
        starts[i], atoms = atoms, atoms + math.prod(grid.count)
    needs = [_needs(r, grids[r.leaf], pieces[name_of(r.block)], starts[r.leaf]) for r in regions]
    others = tuple(axis for axis in mesh if axis not in axes)
    tables = make_tables(blocks, needs, pieces, atoms, Places.of(mesh, axes, others))
    return Lane(tuple(grids), axes, others, atom, pieces, tables)


def _spans(region: Region, grid: Grid) -> Shape:
    """How many atoms a block of the region overlaps at most, along each dimension."""
    return tuple(
        int(np.max((x + length - 1) // a - x // a)) + 1
        for x, length, a in zip(_block_starts(region), region.block, grid.atom, strict=True)
    )


def _block_starts(region: Region) -> list[np.ndarray]:
    """Along each dimension, where the blocks begin in the leaf."""
    return [
        s + np.arange(g) * b
        for s, g, b in zip(region.start, region.grid, region.block, strict=True)
    ]


def _needs(region: Region, grid: Grid, pieces: Shape, first_atom: int) -> Needs:
    """All pieces of a region's blocks: products, dimension by dimension, of what each one says."""
    piece = part = atom = np.zeros((1, 1), np.int64)
    real = np.ones((1, 1), bool)
    offsets = []
    dimensions = zip(
        _block_starts(region), region.block, grid.atom, grid.count, grid.parts, pieces, strict=True
    )
    for start, length, a, count, parts, spread in dimensions:
        along = np.arange(spread)
        place = start[:, None] // a + along
        real = _crossed(np.logical_and, real, place <= (start[:, None] + length - 1) // a)
        piece = _crossed(lambda old, new, n=spread: old * n + new, piece, along + 0 * place)
        part = _crossed(lambda old, new, n=parts: old * n + new, part, place // count)
        atom = _crossed(lambda old, new, n=count: old * n + new, atom, place % count)
        offsets.append(start % a)
    row = region.row + np.arange(region.rows)[:, None] + 0 * piece
    offset = np.stack(np.meshgrid(*offsets, indexing="ij"), axis=-1).reshape(region.rows, 1, -1)
    offset = np.broadcast_to(offset, (*piece.shape, offset.shape[2]))
    kept = (x[real] for x in (row, piece, part, first_atom + atom, offset))
    return Needs(name_of(region.block), *kept)


def _crossed(join: Callable[..., np.ndarray], old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """``join`` of all pairs of blocks and, for each, of all pairs of pieces."""
    both = join(old[:, None, :, None], new[None, :, None, :])
    return both.reshape(old.shape[0] * new.shape[0], old.shape[1] * new.shape[1])


def _first_dimensions(shape: Shape, merged: Shape) -> list[int | None]:
    """Of each merged dimension the first of those that it was made of; None for a scalar's."""
    left = [i for i, size in enumerate(shape) if size != 1]
    if not left:
        return [None]
    result: list[int | None] = []
    for size in merged:
        result.append(left[0])
        while size > 1:
            size //= shape[left.pop(0)]
    return result


def _longest_divisor(size: int, limit: int) -> int:
    return next(n for n in range(min(size, limit), 0, -1) if size % n == 0)
