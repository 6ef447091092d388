"""What one accelerator can do, as its vendor publishes it: the figures a roofline is made of.

Peaks, not what a program reaches. A figure in which two sources differ has the other one in
``notes``; the one used is the vendor's.
"""

import dataclasses
import types
from collections.abc import Mapping
from typing import Literal

_GB, _GIB, _TB, _TFLOP = 1e9, 2**30, 1e12, 1e12
_GBIT = 1e9 / 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip, which is one or more JAX devices.

    Attributes:
      name: as topologies are named: ``v5e``, ``h200``.
      platform: ``tpu`` or ``cuda``.
      title: as its vendor calls it.
      hbm_bytes: high-bandwidth memory.
      hbm_bandwidth: of that memory, bytes/s.
      bf16_flops: dense bfloat16 matrix products, FLOP/s.
      link_bandwidth: to one neighbour of the torus (TPU) or to all of the host's other chips
        together (GPU), bytes/s in one direction.
      torus: dimensions of the torus that the chips form; 0 for GPUs, whose hosts are switched.
      network_bandwidth: to other hosts or slices over the data centre's network, bytes/s in one
        direction, one chip's share.
      sources: where the figures are from.
      notes: where sources differ.
      devices: JAX devices per chip, which share all of the above equally.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    title: str
    hbm_bytes: float
    hbm_bandwidth: float
    bf16_flops: float
    link_bandwidth: float
    torus: int
    network_bandwidth: float
    sources: tuple[str, ...]
    notes: str = ""
    devices: int = 1


_TPU7X = "Google Cloud documentation: TPU7x (Ironwood)"
_BOOK = "jax-ml, How to Scale Your Model: All About TPUs (link and network bandwidths)"
_GPU_BOOK = "jax-ml, How to Scale Your Model: How to Think About GPUs (link bandwidths)"

_ALL = (
    Chip(
        name="v4",
        platform="tpu",
        title="TPU v4",
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1200 * _GB,
        bf16_flops=275 * _TFLOP,
        link_bandwidth=45 * _GB,
        torus=3,
        network_bandwidth=6.25 * _GB,
        sources=("Google Cloud documentation: TPU v4", _BOOK),
        notes="pltpu.get_tpu_info_for_chip of JAX 0.10.2 has 1230 GB/s of memory bandwidth",
    ),
    Chip(
        name="v5e",
        platform="tpu",
        title="TPU v5e",
        hbm_bytes=16 * _GIB,
        hbm_bandwidth=819 * _GB,
        bf16_flops=197 * _TFLOP,
        link_bandwidth=45 * _GB,
        torus=2,
        network_bandwidth=3.125 * _GB,
        sources=("Google Cloud documentation: TPU v5e", _BOOK),
        notes="Google gives 400 GB/s for a chip's four links in both directions together, "
        "which is 50 GB/s a link in one direction; the book has 45",
    ),
    Chip(
        name="v5p",
        platform="tpu",
        title="TPU v5p",
        hbm_bytes=95 * _GIB,
        hbm_bandwidth=2765 * _GB,
        bf16_flops=459 * _TFLOP,
        link_bandwidth=90 * _GB,
        torus=3,
        network_bandwidth=6.25 * _GB,
        sources=(_TPU7X, _BOOK),
        notes="memory bandwidth: 2460 GB/s in pltpu.get_tpu_info_for_chip of JAX 0.10.2; links: "
        "Google gives 1200 GB/s for six in both directions, 100 GB/s each one way",
    ),
    Chip(
        name="v6e",
        platform="tpu",
        title="TPU v6e (Trillium)",
        hbm_bytes=32 * _GIB,
        hbm_bandwidth=1638 * _GB,
        bf16_flops=918 * _TFLOP,
        link_bandwidth=90 * _GB,
        torus=2,
        network_bandwidth=12.5 * _GB,
        sources=("Google Cloud documentation: TPU v6e", _TPU7X, _BOOK),
        notes="memory bandwidth: 1600 GB/s on the v6e page, 1638 on the TPU7x page; links: Google "
        "gives 800 GB/s for four in both directions, 100 GB/s each one way",
    ),
    Chip(
        name="tpu7x",
        platform="tpu",
        title="TPU7x (Ironwood)",
        hbm_bytes=192 * _GIB,
        hbm_bandwidth=7380 * _GB,
        bf16_flops=2307 * _TFLOP,
        link_bandwidth=90 * _GB,
        torus=3,
        network_bandwidth=12.5 * _GB,
        sources=(_TPU7X, _BOOK),
        notes="two devices a chip; links: Google gives 1200 GB/s for six in both directions, "
        "100 GB/s each one way",
        devices=2,
    ),
    Chip(
        name="h100",
        platform="cuda",
        title="NVIDIA H100 SXM",
        hbm_bytes=80 * _GB,
        hbm_bandwidth=3.35 * _TB,
        bf16_flops=989 * _TFLOP,
        link_bandwidth=450 * _GB,
        torus=0,
        network_bandwidth=400 * _GBIT,
        sources=("NVIDIA H100 data sheet; DGX H100 user guide (network)", _GPU_BOOK),
        notes="the data sheet's 1979 TFLOP/s are with sparsity",
    ),
    Chip(
        name="h200",
        platform="cuda",
        title="NVIDIA H200 SXM",
        hbm_bytes=141 * _GB,
        hbm_bandwidth=4.8 * _TB,
        bf16_flops=989 * _TFLOP,
        link_bandwidth=450 * _GB,
        torus=0,
        network_bandwidth=400 * _GBIT,
        sources=("NVIDIA H200 data sheet; DGX H200 user guide (network)", _GPU_BOOK),
        notes="the data sheet's 1979 TFLOP/s are with sparsity",
    ),
    Chip(
        name="b200",
        platform="cuda",
        title="NVIDIA B200 (HGX, DGX)",
        hbm_bytes=180 * _GB,
        hbm_bandwidth=8.0 * _TB,
        bf16_flops=2250 * _TFLOP,
        link_bandwidth=900 * _GB,
        torus=0,
        network_bandwidth=400 * _GBIT,
        sources=("NVIDIA DGX B200 user guide (memory, network)", _GPU_BOOK),
        notes="memory: the user guide's 1440 GB for eight; 192 GB in the book, of which DGX "
        "systems use 180",
    ),
)

CHIPS: Mapping[str, Chip] = types.MappingProxyType({chip.name: chip for chip in _ALL})
"""Every chip that can be planned for, by name."""
