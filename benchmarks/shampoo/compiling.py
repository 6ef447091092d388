"""Seconds to trace and compile the update, by the number of layers: blocks keep their shapes."""

import dataclasses
import time
from typing import Any

import jax

from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import registry

PRESET, LAYERS = "125m", (12, 13, 48)  # the preset's own number is among them
OPTIMIZERS = ("adamw", "shampoo", "soap")
SECONDS = 20.0  # promised for the preset as it is


def measure() -> dict[str, Any]:
    """Compiles the update of each optimizer for each number of layers, from nothing."""
    rows = [_compile(name, layers) for name in OPTIMIZERS for layers in LAYERS]
    return {"preset": PRESET, "limit_seconds": SECONDS, "updates": rows}


def kept(row: dict[str, Any]) -> bool:
    """Whether the preset's own update compiles in the time promised."""
    own = model.PRESETS[PRESET].n_layers
    return all(x["trace"] + x["compile"] <= SECONDS for x in row["updates"] if x["layers"] == own)


def _compile(name: str, layers: int) -> dict[str, Any]:
    params = model.abstract_params(dataclasses.replace(model.PRESETS[PRESET], n_layers=layers))
    tx = registry()[name].make(registry()[name].learning_rate)
    state = jax.eval_shape(tx.init, params)
    jax.clear_caches()
    start, processor = time.perf_counter(), time.process_time()
    lowered = jax.jit(tx.update).lower(params, state, params)
    traced = time.perf_counter()
    lowered.compile()
    ended = time.perf_counter()
    row = {
        "optimizer": name,
        "layers": layers,
        "leaves": len(jax.tree.leaves(params)),
        "trace": round(traced - start, 2),
        "compile": round(ended - traced, 2),
        "processor": round(time.process_time() - processor, 2),
    }
    print(
        f"{name:8s} {layers:3d} layers, {row['leaves']:4d} leaves: "
        f"traced in {row['trace']:6.2f} s, compiled in {row['compile']:6.2f} s",
        flush=True,
    )
    return row
