"""Kernels for GPUs without a GPU: when they are interpreted, how they are lowered and compiled."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_suite.parallel import topologies

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="this JAX has no public interpreter of Mosaic GPU; 0.11 has",
)
compiled = pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("jax_plugins", "jax_cuda12_plugin")),
    reason="needs jax-cuda12-pjrt, jax-cuda12-plugin and ptxas",
)
# With NumPy the interpreter multiplies, which warns of what is not finite.
numpy_is_quiet = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
TARGETS = [("h100", "sm_90a"), ("b200", "sm_100a")]


def looking_for_races():
    """What interprets a kernel, and ends it where a warpgroup reads what may not be written yet."""
    return plgpu.InterpretGPUParams(detect_races=True)


def lowered(fn, *arguments, platform="cuda"):
    return jax.jit(fn).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


def assert_its_own_kernel_on_each_platform(fn, arguments):
    for platform, target, other in (
        ("cuda", "mosaic_gpu_v2", "tpu_custom_call"),
        ("tpu", "tpu_custom_call", "mosaic_gpu_v2"),
    ):
        text = lowered(fn, *arguments, platform=platform)
        assert text.count(f"@{target}") == 1
        assert f"@{other}" not in text


def compile_programs(gpu, programs, temporary=100):
    """Compiles functions, each with its arguments; to be called in a process of its own.

    JAX keeps a compiled kernel by its text, and not by the GPU.
    """
    for fn, arguments in programs.values():
        program = program_for(gpu, fn, *arguments)
        assert program.as_text().count('custom_call_target="mosaic_gpu_v2"') == 1
        assert program.memory_analysis().temp_size_in_bytes < temporary  # nothing is laid out anew


def program_for(gpu, fn, *arguments):
    """What is compiled of a function for a GPU that is not there."""
    devices = np.array(topologies.describe(f"{gpu}:1x1x1").devices)
    place = NamedSharding(Mesh(devices, ("chip",), axis_types=(AxisType.Auto,)), P())
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in arguments]
    return jax.jit(fn).lower(*arguments).compile()


def reports(test_file, gpu, folder):
    """What the assembler says of each kernel that ``compile_for(gpu)`` of a test file compiles."""
    here = pathlib.Path(test_file)
    dump = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": str(folder)}
    paths = map(str, (here.parents[2], here.parents[2] / "tests" / "support"))
    env = {**os.environ, **dump, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
    command = f"import {here.stem} as tests; tests.compile_for({gpu!r})"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=here.parent, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [path.read_text() for path in folder.glob("*.ptxas")]


def assert_nothing_spilled(report, target):
    assert f"for '{target}'" in report
    assert "0 bytes spill stores, 0 bytes spill loads" in report
