"""Meshes from a line of text: ``data=4,model=2``."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = {
    "worker": "workers that keep values of their own and talk through the optimizer",
    "data": "the batch is split; parameters are whole on every device",
    "fsdp": "the batch is split, and so are the parameters",
    "model": "matrix products are split (tensor parallelism)",
}
"""The axes that the command line and the models know; a mesh made by hand may have any others."""

BATCH_AXES = ("worker", "data", "fsdp")
"""Those of ``AXES`` that split the batch."""


def parse_mesh(text: str) -> dict[str, int]:
    """Reads ``NAME=SIZE,NAME=SIZE``, such as ``data=4,model=2``.

    Returns:
      Sizes by name, in the order given: the last axis changes fastest over the devices.

    Raises:
      ValueError: if the text has another form, an axis is unknown or comes twice, or a size is not
        a positive integer.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, _, size = (part.strip() for part in item.partition("="))
        if name not in AXES:
            raise ValueError(f"a mesh has axes {', '.join(AXES)}, got {name!r} in {text!r}")
        if name in sizes:
            raise ValueError(f"axis {name!r} comes twice in {text!r}")
        if not (size.isascii() and size.isdigit() and int(size) > 0):
            raise ValueError(f"axis {name!r} needs a positive size, got {size!r} in {text!r}")
        sizes[name] = int(size)
    return sizes


def make_mesh(
    sizes: Mapping[str, int],
    *,
    devices: Sequence[Any] | None = None,
    axis_types: AxisType = AxisType.Auto,
) -> Mesh:
    """A mesh of the first devices, laid out along the physical links where the backend has them.

    Args:
      sizes: sizes by axis name; the last axis changes fastest.
      devices: what to make it of; None: ``jax.devices()``. Those of a topology that is only
        described will do.
      axis_types: of every axis.

    Raises:
      ValueError: if there are too few devices, or more processes than the mesh would span.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape, needed = tuple(sizes.values()), math.prod(sizes.values())
    if needed > len(devices):
        raise ValueError(
            f"mesh {format_mesh(sizes)} needs {needed} devices, and there are {len(devices)}"
        )
    if needed == len(devices) and devices[0].platform == "tpu":
        grid = _along_the_links(shape, devices)
    else:
        # In the order of the processes: neighbours of the last axis share a host.
        grid = np.array(devices[:needed]).reshape(shape)
    left_out = {d.process_index for d in devices} - {d.process_index for d in grid.flat}
    if left_out:
        raise ValueError(
            f"mesh {format_mesh(sizes)} leaves process {min(left_out)} without a device: it has "
            f"{needed} of {len(devices)}"
        )
    return Mesh(grid, tuple(sizes), axis_types=(axis_types,) * len(sizes))


def _along_the_links(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """TPU devices as an array whose axes follow the torus, slices apart along the first axis.

    Slices are joined by a slow network, so only one axis may cross it.
    """
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise ValueError(
            f"the first axis of a mesh over {slices} slices must be a multiple of {slices}, "
            f"got shape {shape}"
        )
    within, across = (shape[0] // slices, *shape[1:]), (slices,) + (1,) * (len(shape) - 1)
    return mesh_utils.create_hybrid_device_mesh(
        within, across, devices, allow_split_physical_axes=True
    )


def format_mesh(sizes: Mapping[str, int]) -> str:
    """The text that ``parse_mesh`` reads."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())
