"""Facts about the machine and the software that a measurement is reported with."""

import importlib.metadata
import os
import pathlib
import platform

import jax

import jaxopt_suite

_DISTRIBUTIONS = ("jax", "jaxlib", "flax", "optax", "numpy")


def versions() -> dict[str, str]:
    """Versions of everything that decides what is computed, by name."""
    known = {"jaxopt-suite": jaxopt_suite.__version__, "python": platform.python_version()}
    return known | {name: importlib.metadata.version(name) for name in _DISTRIBUTIONS}


def processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def hardware() -> str:
    """What JAX computes on, in words: kind and number of devices, processor and cores."""
    devices = jax.devices()
    kind = devices[0].device_kind
    accelerator = "" if kind == "cpu" else f"{len(devices)} x {kind}; "
    return f"{accelerator}{processor()}, {os.cpu_count()} cores, {platform.system()}"
