"""Which cells hold what, for every device of a lane: tables in NumPy."""

import math
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from jaxopt_suite.optimizers.shampoo.blocks import Blocks, Shape

T = TypeVar("T")


class Tables(NamedTuple, Generic[T]):
    """What a device needs to know of its lane; a value beyond the end means nothing: zeros.

    Arrays of NumPy for all devices; of JAX for one of them; or the specs of the former.
    """

    send: T  # int32 [devices, parts, cells]: which of its atoms it sends to whom
    take: dict[str, T]  # int32 [devices, rows, pieces]: the cells that make up a block
    offsets: dict[str, T]  # int32 [devices, rows, k]: where in its pieces a block begins
    back: T  # int32 [devices, parts, cells]: which pieces it sends back to whom
    merge: T  # int32 [devices, slots, pieces]: the cells that are added up, for an atom each
    land: T | None  # int32 [parts, atoms, slots]: of all copies' slots those an atom is the sum of


class Needs(NamedTuple):
    """A piece of a block each: int arrays of one length, and whose stack they are of."""

    name: str
    row: np.ndarray
    piece: np.ndarray  # of the block
    part: np.ndarray  # of the leaf, over the lane's axes
    atom: np.ndarray  # of that part, among all atoms of the lane
    offset: np.ndarray  # [needs, k]: where in its pieces the block begins


class Places(NamedTuple):
    """The devices of a mesh, numbered in its order, as a lane sees them."""

    part: np.ndarray  # int [devices]: which part of a leaf it has
    copy: np.ndarray  # int [devices]: which copy of it
    device: np.ndarray  # int [parts, copies]: the inverse

    @classmethod
    def of(
        cls, mesh: Mapping[str, int], axes: tuple[str, ...], others: tuple[str, ...]
    ) -> "Places":
        """Of a mesh's sizes, for leaves split over ``axes`` with copies over ``others``."""
        sizes = tuple(mesh.values())
        where = dict(zip(mesh, np.indices(sizes).reshape(len(sizes), -1), strict=True))

        def number(names: tuple[str, ...]) -> np.ndarray:
            result = np.zeros(math.prod(sizes), np.int64)
            for name in names:
                result = result * mesh[name] + where[name]
            return result

        part, copy = number(axes), number(others)
        device = np.empty((part.max() + 1, copy.max() + 1), np.int64)
        device[part, copy] = np.arange(len(part))
        return cls(part, copy, device)


def make_tables(
    blocks: Blocks, needs: list[Needs], pieces: dict[str, Shape], atoms: int, places: Places
) -> Tables[np.ndarray]:
    """The tables of a lane.

    Args:
      blocks: how the leaves are cut.
      needs: the pieces of all blocks that the lane's leaves have a part in.
      pieces: of each stack, how many a block is made of, by dimension.
      atoms: how many each part of the leaves has, together.
      places: of the devices.
    """
    devices, parts = len(places.part), len(places.device)
    rows = {name: blocks.rows[name] // devices for name in pieces}
    # Pieces of all stacks are numbered through, as they lie on their owner.
    starts, total = {}, 0
    for name, spread in pieces.items():
        starts[name], total = total, total + rows[name] * math.prod(spread)
    owner = np.concatenate([n.row // rows[n.name] for n in needs])
    numbers = [
        starts[n.name] + n.row % rows[n.name] * math.prod(pieces[n.name]) + n.piece for n in needs
    ]
    number, part, atom = map(
        np.concatenate, (numbers, [n.part for n in needs], [n.atom for n in needs])
    )
    cell = _ranks(owner * parts + part)
    cells = int(cell.max()) + 1
    sender = places.device[part, places.copy[owner]]
    send = np.full((devices, parts, cells), atoms, np.int32)
    send[sender, places.part[owner], cell] = atom
    taken = np.full((devices, total), parts * cells, np.int32)
    taken[owner, number] = part * cells + cell
    back = np.full((devices, parts, cells), total, np.int32)
    back[owner, part, cell] = number
    merge, land = _way_back(sender, places.part[owner] * cells + cell, atom, atoms, places)
    merge[merge < 0] = parts * cells
    take = {
        name: taken[:, start : start + rows[name] * math.prod(pieces[name])].reshape(
            devices, rows[name], -1
        )
        for name, start in starts.items()
    }
    return Tables(send, take, _offsets(needs, rows, devices), back, merge, land)


def _way_back(
    device: np.ndarray, cell: np.ndarray, atom: np.ndarray, atoms: int, places: Places
) -> tuple[np.ndarray, np.ndarray | None]:
    """The tables ``merge``, -1 where there is nothing, and ``land``.

    A device adds up what it received of every atom, and then copies agree. Where each of them has
    few atoms, these are gathered, so many slots from every copy. Else there is a slot for every
    atom, and ``land`` is ``None``: an all-reduce sends each of them twice, but no slot that only a
    busier device needs.

    Args:
      device: of each piece, where it is received.
      cell: in which of the cells there.
      atom: which atom it belongs to.
      atoms: how many a part has.
      places: of the devices.
    """
    parts, copies = places.device.shape
    met, which = np.unique(device * atoms + atom, return_inverse=True)
    holder, held = met // atoms, met % atoms
    slot = _ranks(holder)
    slots = int(slot.max()) + 1
    gathered = copies > 1 and copies * slots <= 2 * atoms
    if not gathered:
        slot, slots = held, atoms
    time = _ranks(which)
    merge = np.full((len(places.part), slots, int(time.max()) + 1), -1, np.int32)
    merge[device, slot[which], time] = cell
    if not gathered:
        return merge, None
    part, again = places.part[holder], _ranks(places.part[holder] * atoms + held)
    land = np.full((parts, atoms, int(again.max()) + 1), copies * slots, np.int32)
    land[part, held, again] = places.copy[holder] * slots + slot
    return merge, land


def _offsets(needs: list[Needs], rows: dict[str, int], devices: int) -> dict[str, np.ndarray]:
    """Where blocks begin in their pieces; nothing for a stack all of whose begin at zero."""
    result = {}
    for name, n in rows.items():
        own = [x for x in needs if x.name == name]
        if any(x.offset.any() for x in own):
            result[name] = np.zeros((devices, n, own[0].offset.shape[1]), np.int32)
            for x in own:
                result[name][x.row // n, x.row % n] = x.offset
    return result


def _ranks(keys: np.ndarray) -> np.ndarray:
    """How many equal keys come before each."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.searchsorted(ordered, ordered)
    ranks = np.empty_like(keys)
    ranks[order] = np.arange(len(keys)) - first
    return ranks
