"""A tree of arrays cut into blocks, and all blocks of one shape in one stack.

A program then has as many operations as there are block shapes, and a slice or two for each leaf.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_suite import core

Shape = tuple[int, ...]
Stacks = dict[str, jax.Array]  # by block shape, as in "256x128": [blocks, 256, 128]


@dataclasses.dataclass(frozen=True)
class Region:
    """A part of a leaf that consists of whole blocks of one shape.

    Attributes:
      leaf: its position in the tree.
      start: of its first entry, in the leaf's merged shape.
      grid: how many blocks it has along each dimension.
      block: their shape.
      row: of its first block in the stack; the others follow, the last dimension fastest.
    """

    leaf: int
    start: Shape
    grid: Shape
    block: Shape
    row: int

    @property
    def rows(self) -> int:
        """How many blocks it has."""
        return math.prod(self.grid)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a list of leaves is cut.

    Attributes:
      shapes: of the leaves.
      merged: the same after merging.
      regions: of all leaves, in the order of the leaves.
      rows: length of each stack, by name; with padding.
    """

    shapes: tuple[Shape, ...]
    merged: tuple[Shape, ...]
    regions: tuple[Region, ...]
    rows: dict[str, int]

    def shape(self, name: str) -> Shape:
        """Of a stack: ``(rows, *block)``."""
        return self.rows[name], *map(int, name.split("x"))

    def stack(self, leaves: Sequence[jax.Array]) -> Stacks:
        """The blocks of all leaves; rows of padding are zero.

        Args:
          leaves: arrays of ``shapes``, of one dtype.

        Returns:
          For each block shape an array ``[rows, *block]``.
        """
        parts: dict[str, list[_Part]] = {name: [] for name in self.rows}
        for region in self.regions:
            leaf = leaves[region.leaf].reshape(self.merged[region.leaf])
            as_it_lies = leaf.shape[1:] == region.block[1:]
            parts[name_of(region.block)].append(_Part(_cut(leaf, region), as_it_lies))
        return {name: _joined(found, self.rows[name]) for name, found in parts.items()}

    def unstack(self, stacks: Stacks, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """The inverse of ``stack``, in the dtypes of ``leaves``; an empty leaf is given back."""
        found: dict[int, dict[Shape, jax.Array]] = {}
        for region in self.regions:
            rows = stacks[name_of(region.block)][region.row : region.row + region.rows]
            found.setdefault(region.leaf, {})[region.start] = untiled(
                rows, region.grid, region.block
            )
        result = list(leaves)
        for i, pieces in found.items():
            result[i] = _assembled(pieces).reshape(self.shapes[i]).astype(leaves[i].dtype)
        return result

    def owners(self, name: str) -> np.ndarray:
        """The leaf that each row of a stack belongs to, int32 ``[rows]``; -1 for padding."""
        owners = np.full(self.rows[name], -1, np.int32)
        for region in self.regions:
            if name_of(region.block) == name:
                owners[region.row : region.row + region.rows] = region.leaf
        return owners


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How trees are cut, whatever their leaves; the attributes are arguments of ``cut``."""

    block_size: int
    merge_dims: bool
    stack_multiple: int

    def __post_init__(self) -> None:
        core.check_int("block_size", self.block_size)
        core.check_int("stack_multiple", self.stack_multiple)

    def blocks(self, tree: Any) -> Blocks:
        """The blocks of a tree of arrays, or of their shapes and dtypes."""
        return cut(
            [jnp.shape(x) for x in jax.tree.leaves(tree)],
            block_size=self.block_size,
            merge_dims=self.merge_dims,
            multiple=self.stack_multiple,
        )


def cut(
    shapes: Sequence[Shape], *, block_size: int, merge_dims: bool = True, multiple: int = 1
) -> Blocks:
    """Plans the cutting of leaves.

    A leaf's dimensions are merged (``merge``) and each cut into pieces of ``block_size``, the last
    of which is as long as what is left: no block has padding inside.

    Args:
      shapes: of the leaves.
      block_size: largest length of a block's dimension.
      merge_dims: whether to merge small dimensions.
      multiple: every stack is padded with zero blocks to a multiple of this.
    """
    merged = tuple(merge(shape, block_size) if merge_dims else unit(shape) for shape in shapes)
    regions: list[Region] = []
    rows: dict[str, int] = {}
    for i, shape in enumerate(merged):
        segments = [_segments(size, block_size) for size in shape]
        for combination in itertools.product(*segments):
            start, grid, block = zip(*combination, strict=True)
            name = name_of(block)
            regions.append(Region(i, start, grid, block, rows.get(name, 0)))
            rows[name] = rows.get(name, 0) + math.prod(grid)
    padded = {name: -(-count // multiple) * multiple for name, count in rows.items()}
    return Blocks(tuple(shapes), merged, tuple(regions), padded)


def merge(shape: Shape, limit: int) -> Shape:
    """Joins neighbouring dimensions, the last ones first, as long as they have up to ``limit``.

    Dimensions of one are dropped; a scalar becomes a vector of one.

    Example:
      >>> merge((32, 3, 64, 64), 8192)
      (96, 4096)
      >>> merge((3, 3, 64, 64), 256)
      (3, 192, 64)
    """
    merged: list[int] = []
    for size in reversed(unit(shape)):
        if merged and merged[0] * size <= limit:
            merged[0] *= size
        else:
            merged.insert(0, size)
    return tuple(merged)


def unit(shape: Shape) -> Shape:
    """The shape without dimensions of one; ``(1,)`` if there are no others."""
    return tuple(size for size in shape if size != 1) or (1,)


def name_of(block: Shape) -> str:
    """The key of a stack of such blocks: ``"256x128"``."""
    return "x".join(map(str, block))


def wide(tree: Any) -> Any:
    """The dtype of the arithmetic: float32, or float64 if a leaf is."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(tree))


def usable(gradients: Stacks) -> dict[str, jax.Array]:
    """Which blocks' squares are numbers: for each stack bool ``[rows]``."""
    return {name: jnp.isfinite(square_lengths(g)) for name, g in gradients.items()}


def square_lengths(blocks: jax.Array) -> jax.Array:
    """The sum of squares of each block: ``[rows]``."""
    return jnp.sum(jnp.square(blocks), axis=tuple(range(1, blocks.ndim)))


def _segments(size: int, block_size: int) -> list[tuple[int, int, int]]:
    """Start, number of blocks and their length: of the whole blocks, and of what is left."""
    whole, rest = divmod(size, block_size)
    segments = [(0, whole, block_size)] if whole else []
    return segments + ([(whole * block_size, 1, rest)] if rest else [])


def tiles(x: jax.Array, grid: Shape, block: Shape) -> jax.Array:
    """An array of ``grid`` whole blocks, as a stack ``[rows, *block]``; the last ones fastest."""
    order = len(block)
    split = [n for pair in zip(grid, block, strict=True) for n in pair]
    axes = (*range(0, 2 * order, 2), *range(1, 2 * order, 2))
    return x.reshape(split).transpose(axes).reshape(-1, *block)


def untiled(rows: jax.Array, grid: Shape, block: Shape) -> jax.Array:
    """The inverse of ``tiles``."""
    order = len(block)
    axes = [
        axis for pair in zip(range(order), range(order, 2 * order), strict=True) for axis in pair
    ]
    part = rows.reshape(*grid, *block).transpose(axes)
    return part.reshape([g * b for g, b in zip(grid, block, strict=True)])


def _cut(leaf: jax.Array, region: Region) -> jax.Array:
    """``[rows, *block]``."""
    stop = [s + g * b for s, g, b in zip(region.start, region.grid, region.block, strict=True)]
    return tiles(jax.lax.slice(leaf, region.start, stop), region.grid, region.block)


class _Part(NamedTuple):
    """Of a stack, what comes from one leaf."""

    blocks: jax.Array  # [rows, *block]
    as_it_lies: bool  # whether the leaf's memory holds just these, one after the other


def _joined(parts: Sequence[_Part], rows: int) -> jax.Array:
    """One array of ``rows``; zero where there are not so many."""
    kinds = [part.as_it_lies for part in parts]
    return jax.lax.platform_dependent(
        *[part.blocks for part in parts],
        cpu=lambda *blocks: _written_in_turn(map(_Part, blocks, kinds), rows),
        default=lambda *blocks: _concatenated(blocks, rows),
    )


def _concatenated(parts: Sequence[jax.Array], rows: int) -> jax.Array:
    stack = jnp.concatenate(parts)
    missing = rows - len(stack)
    return jnp.pad(stack, [(0, missing)] + [(0, 0)] * (stack.ndim - 1)) if missing else stack


def _written_in_turn(parts: Iterable[_Part], rows: int) -> jax.Array:
    """Each part is cut straight into its place; XLA would cut all of them first, and then join.

    Neighbours that need no cutting are joined: one kernel to compile, not one for each of them.
    """
    pieces: list[jax.Array] = []
    for as_it_lies, found in itertools.groupby(parts, key=operator.attrgetter("as_it_lies")):
        blocks = [part.blocks for part in found]
        pieces += [jnp.concatenate(blocks)] if as_it_lies else blocks
    if len(pieces) == 1:
        return _concatenated(pieces, rows)
    stack, start = jnp.zeros((rows, *pieces[0].shape[1:]), pieces[0].dtype), 0
    stack = core.vary(stack, frozenset().union(*map(core.varying_axes, pieces)))
    for piece in pieces:
        stack = jax.lax.dynamic_update_slice_in_dim(stack, piece, start, 0)
        start += len(piece)
    return stack


def _assembled(pieces: dict[Shape, jax.Array]) -> jax.Array:
    """A leaf from its parts, which are keyed by where they start."""
    axis = len(next(iter(pieces))) - 1
    while len(pieces) > 1:
        lines: dict[Shape, list[jax.Array]] = {}
        for start in sorted(pieces):
            lines.setdefault((*start[:axis], 0, *start[axis + 1 :]), []).append(pieces[start])
        pieces = {start: jnp.concatenate(line, axis) for start, line in lines.items()}
        axis -= 1
    return next(iter(pieces.values()))
