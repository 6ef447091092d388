"""Times of single updates: ours, staggered or not, and Meta's Distributed Shampoo, in turns."""

import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.parity import reference
from benchmarks.parity.shampoo import METHOD
from benchmarks.shampoo import timing
from benchmarks.step_time import programs
from benchmarks.step_time.timing import Runner
from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import shampoo, soap

PRESET, BLOCK, EVERY = "small", 256, 10
STEPS, WARM_UP = 4 * EVERY, EVERY + 1  # each refresh four times, after the first root of all
RATE, B1, B2 = 1e-3, 0.9, 0.999
TIMES_FASTER_ON_AVERAGE, TIMES_FASTER_AT_SLOWEST = 2.0, 5.0
STAGGERED_OVER_MEDIAN = 1.5
FASTER = "mean", "slowest", "slowest_of_cycle"  # how much faster is said of these
META = "Distributed Shampoo"


def measure(path: pathlib.Path) -> dict[str, Any]:
    """Times all of them on the same random gradients, another one each step.

    Raises:
      UserError: if ``path`` is not the reference, or PyTorch is not installed.
    """
    commit = reference.check(METHOD, path)
    official = reference.load(METHOD, path)
    params = model.abstract_params(model.PRESETS[PRESET])
    draws = [programs.arrays(params, seed=seed) for seed in range(1, 4)]
    common = {"block_size": BLOCK, "refresh_every": EVERY}
    ours = {
        "shampoo": shampoo(RATE, B1, B2, **common),
        "shampoo, staggered": shampoo(RATE, B1, B2, refresh="staggered", **common),
        "soap": soap(RATE, B1, B2, **common),
        "adamw": optax.adamw(RATE, B1, B2),
    }
    with reference.quiet():
        subjects = {META: _theirs(official, params, draws)}
        subjects |= {name: _ours(tx, params, draws) for name, tx in ours.items()}
        traces = timing.traces(subjects, steps=STEPS, warm_up=WARM_UP)
    rows = {name: timing.summary(trace, cycle=EVERY) for name, trace in traces.items()}
    for name, row in rows.items():
        print(timing.line(name, row), flush=True)
    theirs = rows[META]
    times_faster = {
        name: {key: round(theirs[key] / rows[name][key], 2) for key in FASTER}
        for name in ("shampoo", "shampoo, staggered")
    }
    staggered = rows["shampoo, staggered"]
    over_median = {key: round(staggered[key] / staggered["median"], 3) for key in FASTER[1:]}
    result = {
        "preset": PRESET,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "settings": {**common, "graft": "adam", "solver": "eigh", "betas": (B1, B2)},
        "reference": f"{METHOD.repository} at {commit}",
        "updates": rows,
        "times_faster": times_faster,
        "staggered_over_median": over_median,
    }
    print(times_faster, f"staggered over its median: {over_median}")
    return result


def kept(row: dict[str, Any]) -> bool:
    """Whether one schedule is as much faster as promised, and staggered steps are even."""
    both = (
        times["mean"] >= TIMES_FASTER_ON_AVERAGE
        and times["slowest_of_cycle"] >= TIMES_FASTER_AT_SLOWEST
        for times in row["times_faster"].values()
    )
    even = row["staggered_over_median"]["slowest_of_cycle"] <= STAGGERED_OVER_MEDIAN
    return any(both) and even


def _ours(tx: optax.GradientTransformation, shapes: Any, draws: list[Any]) -> Callable[[], float]:
    return Runner(programs.compile_update(tx, shapes), tx, programs.arrays(shapes, seed=0), draws)


def _theirs(official: Any, shapes: Any, draws: list[Any]) -> Callable[[], float]:
    import torch  # the reference's own dependency, none of ours

    as_tensor = lambda x: torch.from_numpy(np.array(x))
    params = [
        as_tensor(x).requires_grad_() for x in jax.tree.leaves(programs.arrays(shapes, seed=0))
    ]
    grads = [[as_tensor(x) for x in jax.tree.leaves(draw)] for draw in draws]
    optimizer = official.DistributedShampoo(
        params,
        lr=RATE,
        betas=(B1, B2),
        epsilon=1e-12,
        max_preconditioner_dim=BLOCK,
        precondition_frequency=EVERY,
        grafting_config=official.AdamPreconditionerConfig(beta2=B2, epsilon=1e-8),
    )
    count = 0

    def run() -> float:
        nonlocal count
        for param, grad in zip(params, grads[count % len(grads)], strict=True):
            param.grad = grad.clone()
        count += 1
        start = time.perf_counter()
        optimizer.step()
        return 1e3 * (time.perf_counter() - start)

    return run
