"""What every test runs under: the CPU, eight devices, no silent rank promotion, fixed examples."""

import atexit
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

import hypothesis

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Thousands of small programs are compiled and run once. Without LLVM's optimiser the suite takes a
# third less time, and without MLIR's emitter of fusions they are compiled in half of the rest.
# XLA's own passes, and so the programs' operations, are as ever. An unknown flag ends the process.
XLA_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")

# These must stand before JAX is imported, and reach the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS))
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads fight those of the workers
os.environ["PYTHONPATH"] = str(ROOT)  # child processes import the checkout, as the tests do

# What one test has compiled, no other test, worker or child process of this run compiles again. The
# folder is the run's own, so that no run depends on another. Names and line numbers are part of a
# key: a test that reads a program's text reads its own.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxopt-suite-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first call of a jitted function compiles. No database: a run depends on no other.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")
