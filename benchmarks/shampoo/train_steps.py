"""Whole train steps with Shampoo and SOAP against AdamW's: forward, backward, update."""

import functools
from typing import Any

import optax

from benchmarks.shampoo import timing
from benchmarks.step_time.timing import train_step
from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import shampoo, soap

PRESET, BATCH, LENGTH = "small", 16, 256  # 4096 tokens a step
BLOCK, EVERY = 256, 10
STEPS, WARM_UP = 2 * EVERY, EVERY + 1  # each refresh twice, after the first root of all
LIMIT = 1.15  # times the mean of AdamW's


def measure() -> dict[str, Any]:
    """Times each optimizer's train step in turns with the others'."""
    common = {"block_size": BLOCK, "refresh_every": EVERY}
    optimizers = {
        "adamw": optax.adamw(1e-3),
        "shampoo": shampoo(1e-3, **common),
        "shampoo, staggered": shampoo(1e-3, refresh="staggered", **common),
        "soap": soap(1e-3, **common),
    }
    graphdef, params = model.build(model.PRESETS[PRESET], seed=0)
    make = functools.partial(train_step, graphdef, params, batch_size=BATCH, seq_len=LENGTH)
    steps = {name: make(tx) for name, tx in optimizers.items()}
    traces = timing.traces(steps, steps=STEPS, warm_up=WARM_UP)
    rows = {name: timing.summary(trace, cycle=EVERY) for name, trace in traces.items()}
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
