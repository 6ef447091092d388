"""Which devices a collective runs over: three notations for groups, and their mesh axes.

A program numbers its devices by their position in ``mesh.devices.flat``. Its text says who talks to
whom in one of these ways::

    replica_groups={{0,1},{2,3}}                              members, group by group
    replica_groups=[2,4]<=[4,2]T(1,0)                         arange(8) as 4x2, transposed, as 2x4
    replica_groups=mesh['a'=4,'b'=2] {'a'}                    along the axes of a mesh
    replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a':(2)2}
                                                              a permuted mesh, part of an axis
    source_target_pairs={{0,1},{1,0}}                         for a collective-permute
"""

import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import AbstractMesh, Mesh

Groups = Sequence[Sequence[int]]

_INTEGERS = re.compile(r"\d+")
_MEMBERS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_AXIS_SIZE = re.compile(r"'?([^'=,]+)'?=(\d+)")
_AXIS = re.compile(r"'?([^':,]+)'?(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def replica_groups(attributes: str, num_partitions: int) -> Groups:
    """The groups of a collective's text; one group of all devices where it names none.

    Args:
      attributes: of the instruction, raw.
      num_partitions: of the module.

    Raises:
      ValueError: if the notation is none of those above.
    """
    by_axes = _AXES.search(attributes)
    if by_axes:
        return _along_axes(*by_axes.groups())
    iota = re.search(r"replica_groups=(\[\S+)", attributes)
    if iota:
        return _iota(iota[1]).tolist()
    listed = _MEMBERS.search(attributes)
    if listed is None and "replica_groups=" in attributes:
        raise _unknown(attributes[attributes.index("replica_groups=") :])
    rows = listed[1].split("},{") if listed and listed[1] else []
    return [_integers(row) for row in rows] or [list(range(num_partitions))]


def pairs(attributes: str) -> Groups:
    """Sources and targets, each pair of two different devices."""
    found = _PAIRS.search(attributes)
    rows = [_integers(row) for row in found[1].split("},{")] if found and found[1] else []
    return [row for row in rows if row[0] != row[1]]


def linked(edges: Groups) -> Groups:
    """The sets of devices that pairs link, directly or through others."""
    leader: dict[int, int] = {}

    def lead(device: int) -> int:
        while leader.setdefault(device, device) != device:
            device = leader[device]
        return device

    for source, target in edges:
        leader[lead(source)] = lead(target)
    sets: dict[int, list[int]] = {}
    for device in leader:
        sets.setdefault(lead(device), []).append(device)
    return list(sets.values())


def parts(mesh: Mesh | AbstractMesh, num_partitions: int) -> Groups:
    """The positions in the mesh that a program numbers from 0: all, or those of each TPU slice.

    A program for several TPU slices numbers the devices of each, in the order of the mesh.

    Raises:
      ValueError: if neither the mesh nor its slices have ``num_partitions`` devices.
    """
    if mesh.size == num_partitions:
        return [list(range(mesh.size))]
    indices = _slice_indices(mesh).ravel()
    found = [np.flatnonzero(indices == index).tolist() for index in np.unique(indices)]
    if any(len(part) != num_partitions for part in found):
        raise ValueError(
            f"the program is compiled for {num_partitions} devices (of each TPU slice, if there "
            f"are several), got mesh {dict(mesh.shape)} with {mesh.size}"
        )
    return found


def axes_of(
    groups: Groups, mesh: Mesh | AbstractMesh, *, num_partitions: int, whole: bool = True
) -> tuple[str, ...] | None:
    """The mesh axes along which the members of groups differ, in mesh order.

    Args:
      groups: of the program's numbers for devices.
      mesh: of the program.
      num_partitions: of the program; see ``parts``.
      whole: whether each group must be the whole product of these axes.

    Returns:
      None if a group is not that product, or groups differ in size.
    """
    if len({len(group) for group in groups}) > 1:
        return None
    if not groups:
        return ()
    members = np.array(groups, dtype=np.int64)
    positions = [np.array(part)[members] for part in parts(mesh, num_partitions)]
    coordinates = np.unravel_index(np.concatenate(positions), tuple(mesh.shape.values()))
    axes = tuple(
        name
        for name, along in zip(mesh.shape, coordinates, strict=True)
        if (along != along[:, :1]).any()
    )
    if whole and len(groups[0]) != math.prod(mesh.shape[name] for name in axes):
        return None
    return axes


def axes_between_slices(mesh: Mesh | AbstractMesh, count: int) -> tuple[str, ...] | None:
    """The mesh axes that lead from one TPU slice to another; None if ``count`` is not all."""
    indices = _slice_indices(mesh)
    if count != len(np.unique(indices)):
        return None
    return tuple(
        name
        for at, name in enumerate(mesh.axis_names)
        if (indices != indices.take([0], axis=at)).any()
    )


def _slice_indices(mesh: Mesh | AbstractMesh) -> np.ndarray:
    if isinstance(mesh, AbstractMesh):
        return np.zeros(tuple(mesh.shape.values()), np.int64)
    indices = [getattr(device, "slice_index", 0) for device in mesh.devices.flat]
    return np.array(indices).reshape(mesh.devices.shape)


def _along_axes(sizes: str, device_ids: str | None, axes: str) -> Groups:
    """Groups along some axes of a mesh, of which an axis may be used in part."""
    shape = {name: int(size) for name, size in _AXIS_SIZE.findall(sizes)}
    count = math.prod(shape.values())
    devices = np.arange(count) if device_ids is None else _device_ids(device_ids)
    parts = _AXIS.findall(axes)
    used = {name: (int(before or 1), int(size or 0)) for name, before, size in parts}
    if len(used) < len(parts):
        raise ValueError(f"groups over two parts of one axis are not read: {{{axes}}}")
    dims: list[int] = []
    grouped: list[int] = []
    for name, size in shape.items():
        before, part = used.get(name, (size, 1))
        part = part or size
        if name in used:
            grouped.append(len(dims) + 1)
        dims += [before, part, size // (before * part)]
    together = math.prod(dims[at] for at in grouped)
    last = range(len(dims) - len(grouped), len(dims))
    return np.moveaxis(devices.reshape(dims), grouped, last).reshape(-1, together).tolist()


def _device_ids(text: str) -> np.ndarray:
    return _iota(text) if "T(" in text or "<=" in text else np.array(_integers(text))


def _iota(text: str) -> np.ndarray:
    found = _IOTA.match(text)
    if found is None:
        raise _unknown(text)
    dims, reshape, order = (_integers(part or "") for part in found.groups())
    devices = np.arange(math.prod(reshape)).reshape(reshape)
    return devices.transpose(order or range(len(reshape))).reshape(dims or [-1])


def _unknown(text: str) -> ValueError:
    return ValueError(f"unknown notation for groups of devices: {text[:80]!r}")


def _integers(text: str) -> list[int]:
    return [int(number) for number in _INTEGERS.findall(text)]
