"""AdamW for a tree of many small leaves: a loop a leaf, or one over all of them packed.

Packed is ``optax.flatten``: gradients and parameters are laid end to end in every step, and updates
cut apart again. A kernel over a packed list would have to win by more than that costs, or take
every leaf as an operand of its own.
"""

import functools
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import _results
from jaxopt_suite.parallel import topologies

LEAVES, ENTRIES = 500, 1024
ROUNDS = 30
CHIPS = {"v5e": "v5e:2x2", "h100": "h100:1x1x1"}
WAYS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "tree": lambda: optax.adamw(1e-3),
    "packed": lambda: optax.flatten(optax.adamw(1e-3)),
}


def measure(
    chips: Sequence[str] = (),
    *,
    leaves: int = LEAVES,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, Any]]:
    """A row for the CPU, with times, and one for each chip.

    Args:
      chips: of these alone; none: all whose compilers are installed.
      leaves: of the tree.
      clock: seconds.

    Raises:
      UserError: for a chip there is not.
      ModuleNotFoundError: if the compiler for one that was asked for is not installed.
    """
    _results.check_names("chip", chips, ["cpu", *CHIPS])
    params = {f"leaf_{i}": jax.ShapeDtypeStruct((ENTRIES,), jnp.float32) for i in range(leaves)}
    if not chips or "cpu" in chips:
        found = {name: _compiled(make(), params, None, clock) for name, make in WAYS.items()}
        programs = {name: program for name, (program, _) in found.items()}
        times = _times(programs, params, clock)
        row = {name: figures | {"ms": times[name]} for name, (_, figures) in found.items()}
        yield _shown({"chip": "cpu", "leaves": leaves, "entries": ENTRIES} | row)
    for chip, topology in CHIPS.items():
        if chips and chip not in chips:
            continue
        try:
            devices = np.array(topologies.describe(topology).devices[:1])
        except ModuleNotFoundError as missing:
            if chips:
                raise
            print(f"{chip}: {missing}", flush=True)
            continue
        mesh = Mesh(devices, ("chip",), axis_types=(AxisType.Auto,))
        place = NamedSharding(mesh, PartitionSpec())
        row = {name: _compiled(make(), params, place, clock)[1] for name, make in WAYS.items()}
        yield _shown({"chip": chip, "leaves": leaves, "entries": ENTRIES} | row)


def _step(tx: optax.GradientTransformation, params: Any, state: Any, gradients: Any) -> Any:
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def _compiled(
    tx: optax.GradientTransformation, params: Any, place: Any, clock: Callable[[], float]
) -> tuple[Any, dict[str, Any]]:
    """The step's program, and what can be read off it."""
    there = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(functools.partial(_step, tx), donate_argnums=(0, 1))
    lowered = step.lower(there(params), there(state), there(params))
    start = clock()
    program = lowered.compile()
    seconds = clock() - start
    entry = program.as_text().partition("ENTRY")[2]
    return program, {
        "loops": len(re.findall(r"\s(?:fusion|concatenate|copy)\(", entry)),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }


def _times(programs: dict[str, Any], params: Any, clock: Callable[[], float]) -> dict[str, float]:
    """Median milliseconds of a step, taken in turns."""
    full = lambda value: jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), params)
    states = {name: (full(1.0), WAYS[name]().init(full(1.0))) for name in programs}
    gradients, found = full(0.1), {name: [] for name in programs}
    for _ in range(ROUNDS):
        for name, program in programs.items():
            start = clock()
            states[name] = jax.block_until_ready(program(*states[name], gradients))
            found[name].append(1e3 * (clock() - start))
    return {name: statistics.median(times) for name, times in found.items()}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    for name in WAYS:
        figures = {key: round(value, 1) for key, value in row[name].items()}
        print(f"{row['chip']:5s} {row['leaves']} leaves, {name:6s} {figures}", flush=True)
    return row
