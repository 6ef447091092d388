"""Whole train steps with Shampoo and SOAP against AdamW's: forward, backward, update."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.shampoo import timing
from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import shampoo, soap
from jaxopt_suite.parallel import make_train_step

PRESET, BATCH, LENGTH = "small", 16, 256  # 4096 tokens a step
BLOCK, EVERY = 256, 10
STEPS, WARM_UP = 2 * EVERY, EVERY + 1  # each refresh twice, after the first root of all
LIMIT = 1.15  # times the mean of AdamW's


def measure() -> dict[str, Any]:
    """Times each optimizer's train step in turns with the others'."""
    sizes = model.PRESETS[PRESET]
    common = {"block_size": BLOCK, "refresh_every": EVERY}
    optimizers = {
        "adamw": optax.adamw(1e-3),
        "shampoo": shampoo(1e-3, **common),
        "shampoo, staggered": shampoo(1e-3, refresh="staggered", **common),
        "soap": soap(1e-3, **common),
    }
    steps = {name: _step(tx, sizes) for name, tx in optimizers.items()}
    traces = timing.traces(steps, steps=STEPS, warm_up=WARM_UP)
    rows = {name: timing.summary(trace) for name, trace in traces.items()}
    for name, row in rows.items():
        row["over_adamw"] = round(row["mean"] / rows["adamw"]["mean"], 3)
        print(timing.line(name, row), f"{row['over_adamw']:6.3f} times AdamW's", flush=True)
    return {
        "preset": PRESET,
        "batch_size": BATCH,
        "seq_len": LENGTH,
        "settings": {**common, "graft": "adam", "solver": "eigh"},
        "steps": rows,
    }


def kept(row: dict[str, Any]) -> bool:
    """Whether Shampoo's step takes no longer than promised."""
    return all(
        row["steps"][name]["over_adamw"] <= LIMIT for name in ("shampoo", "shampoo, staggered")
    )


def _step(tx: optax.GradientTransformation, sizes: model.ModelConfig) -> Callable[[], float]:
    graphdef, params = model.build(sizes, seed=0)
    step = make_train_step(functools.partial(model.loss_fn, graphdef), tx, None)
    tokens = np.random.default_rng(0).integers(0, sizes.vocab_size, (BATCH, LENGTH + 1))
    tokens = tokens.astype(np.int32)
    state = step.init(jax.tree.map(jnp.copy, params))

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, tokens)
        jax.block_until_ready((state, metrics))
        return 1e3 * (time.perf_counter() - start)

    return run
