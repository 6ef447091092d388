"""What every test runs under: the CPU, eight devices, no silent rank promotion, fixed examples."""

import os
import pathlib

import hypothesis

ROOT = pathlib.Path(__file__).resolve().parent.parent

# These must stand before JAX is imported, and reach the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    # Thousands of small programs are compiled and run once: without LLVM's optimiser the suite
    # takes a third less time. XLA's own passes, and so the programs' operations, are as ever.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads fight those of the workers
os.environ["PYTHONPATH"] = str(ROOT)  # child processes import the checkout, as the tests do

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first call of a jitted function compiles. No database: a run depends on no other.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")
