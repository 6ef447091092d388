"""What XLA has to know of a GPU to compile for it without one.

XLA takes a ``stream_executor.GpuTargetConfigProto`` in text form: the limits of a kernel (threads,
registers, shared memory), from which it makes blocks and tiles, and rates (cores, clock, memory),
from which it estimates which of two schedules is faster. Nothing of this is in the plan's own
figures, which are those of ``chips``.
"""

import dataclasses
import types
from collections.abc import Mapping

from jaxopt_suite.parallel.chips import CHIPS

_PROTO = """\
gpu_device_info {{
  cuda_compute_capability {{ major: {major} feature_extension: ACCELERATED_FEATURES }}
  core_count: {cores}
  fpus_per_core: 128
  clock_rate_ghz: {clock_ghz}
  l2_cache_size: {l2_bytes}
  device_memory_size: {memory_bytes}
  memory_bandwidth: {memory_bandwidth}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  device_address_bits: 64
  ecc_enabled: true
  device_vendor: "NVIDIA Corporation"
  name: "{title}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{title}"
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of GPU, as its compiler sees it.

    Attributes:
      chip: its name in ``chips.CHIPS``.
      major: compute capability; the minor number of all of them is 0.
      cores: streaming multiprocessors.
      clock_ghz: highest clock.
      l2_bytes: second-level cache.
    """

    chip: str
    major: int
    cores: int
    clock_ghz: float
    l2_bytes: int

    def text(self) -> str:
        """The description as a text-format ``GpuTargetConfigProto``."""
        chip = CHIPS[self.chip]
        return _PROTO.format(
            **dataclasses.asdict(self),
            title=chip.title,
            memory_bytes=int(chip.hbm_bytes),
            memory_bandwidth=int(chip.hbm_bandwidth),
        )


_MIB = 2**20

TARGETS: Mapping[str, Target] = types.MappingProxyType(
    {
        "h100": Target(chip="h100", major=9, cores=132, clock_ghz=1.98, l2_bytes=50 * _MIB),
        "h200": Target(chip="h200", major=9, cores=132, clock_ghz=1.98, l2_bytes=50 * _MIB),
        "b200": Target(chip="b200", major=10, cores=148, clock_ghz=1.965, l2_bytes=126 * _MIB),
    }
)
"""Streaming multiprocessors, clocks and caches from NVIDIA's Hopper and Blackwell documents; limits
of a kernel from the CUDA programming guide's table of compute capabilities 9.0 and 10.0."""
