"""Devices of a pod that need not exist: enough of them to compile for, by name.

``v5e:16x16`` is a slice of 256 TPU chips, ``h200:1x4x8`` four hosts of eight GPUs. JAX compiles for
them on any machine, with the compiler that comes in an optional package: ``libtpu`` for TPUs,
``jax-cuda12-pjrt`` for GPUs (no CUDA, no driver).
"""

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxopt_suite.parallel import gpu_targets
from jaxopt_suite.parallel.chips import CHIPS, Chip

SETTINGS: Mapping[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud's metadata server what machine this is
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any name: without one libtpu complains at length
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for the chips, and nothing here touches one
}
"""Environment of a process that compiles for TPUs it does not have; set before the first call."""

LEGAL = (
    "v4, v5p or tpu7x with three sizes (v5p:8x8x8), v5e or v6e with two (v5e:16x16, at most 16 "
    "each), h100, h200 or b200 with slices x hosts x GPUs per host (h200:1x4x8)"
)

_LARGEST = {"v5e": 16, "v6e": 16}  # chips along one side of the largest slice


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that can be compiled for.

    Attributes:
      name: as it was asked for.
      chip: what each device is, or a part of what it is.
      sizes: of the torus, in chips; for GPUs slices, hosts, and GPUs per host.
      devices: in the order in which JAX numbers them.
    """

    name: str
    chip: Chip
    sizes: tuple[int, ...]
    devices: tuple[Any, ...]

    def rings(self) -> tuple[bool, ...]:
        """Whether the torus is closed in each dimension, so that both directions lead round.

        Slices of v5e and v6e are closed along a side of 16; those of v4, v5p and TPU7x where every
        side is a multiple of 4, for they are then built of whole cubes.
        """
        if self.chip.torus == 2:
            return tuple(size == 16 for size in self.sizes)
        cubes = all(size % 4 == 0 for size in self.sizes)
        return tuple(cubes for _ in self.sizes)

    def bandwidth(self, mesh: Mesh, axes: tuple[str, ...]) -> tuple[float, str]:
        """What one device can send at most along ``axes`` of a mesh of these devices.

        Args:
          mesh: of ``devices``.
          axes: those along which a collective works.

        Returns:
          Bytes/s, and where they go in words. On a torus every dimension along which the devices
          lie counts with two links where it is closed and used whole, with one where not. Between
          hosts of GPUs, and between slices, it is the network's.
        """
        group = _along(mesh, axes)
        if self.chip.platform == "cuda":
            inside = len({device.process_index for device in group}) == 1
            rate = self.chip.link_bandwidth if inside else self.chip.network_bandwidth
            return rate, "NVLink" if inside else "network between hosts"
        links = 0
        for dimension, ring in enumerate(self.rings()):
            extent = len({device.coords[dimension] for device in group})
            if extent > 1:
                links += 2 if ring and extent == self.sizes[dimension] else 1
        links = max(links, 1)  # the two devices of one chip
        rate = links * self.chip.link_bandwidth / self.chip.devices
        return rate, f"{links} torus link{'s' if links > 1 else ''}"


def describe(name: str) -> Topology:
    """The devices of a topology.

    Args:
      name: chip and sizes, such as ``v5e:16x16``, ``v5p:8x8x8`` or ``h200:1x4x8``.

    Raises:
      ValueError: if there is no such topology.
      ModuleNotFoundError: if the compiler for it is not installed; the message says which extra to
        install.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    chip = CHIPS.get(found[1]) if found else None
    sizes = tuple(int(size) for size in found[2].split("x")) if found else ()
    largest = _LARGEST.get(chip.name, math.inf) if chip else 0
    rank = (chip.torus or 3) if chip else 0
    if chip is None or len(sizes) != rank or not all(0 < size <= largest for size in sizes):
        raise ValueError(f"topology {name!r} does not exist; it must be {LEGAL}")
    _require(chip)
    try:
        pod = _tpu(name, chip, sizes) if chip.platform == "tpu" else _gpu(chip, sizes)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology {name!r} is refused by the compiler: {error}") from error
    return Topology(name, chip, sizes, tuple(pod.devices))


def _tpu(name: str, chip: Chip, sizes: tuple[int, ...]) -> Any:
    options: dict[str, Any] = {}
    if any(size % 2 for size in sizes[:2]):  # hosts have two by two chips, or a single one
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # one device a chip
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **options)


def _gpu(chip: Chip, sizes: tuple[int, ...]) -> Any:
    return topologies.get_topology_desc(
        platform="cuda",
        target_config=gpu_targets.TARGETS[chip.name].text(),
        topology="x".join(map(str, sizes)),
    )


def _require(chip: Chip) -> None:
    """Raises unless the compiler for ``chip`` is installed."""
    if chip.platform == "tpu":
        packages, extra = ["libtpu"], "tpu-aot"
    else:
        packages, extra = ["jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"], "gpu-aot"
    if not any(is_installed(package) for package in packages):
        raise ModuleNotFoundError(
            f"compiling for {chip.title} needs an extra: pip install 'jaxopt-suite[{extra}]'"
        )


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _along(mesh: Mesh, axes: tuple[str, ...]) -> list[Any]:
    """The devices of a group that differ in their position along ``axes`` only."""
    position = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    return list(np.ravel(mesh.devices[position]))
