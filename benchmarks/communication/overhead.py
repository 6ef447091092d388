"""Time to compress and decompress a gradient, against the train step that it comes from."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.step_time.timing import compare, milliseconds, train_step
from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import registry
from jaxopt_suite.optimizers.compression import compressors
from jaxopt_suite.optimizers.compression.compressor import Compressor

PRESET, BATCH, LENGTH, ROUNDS = "small", 16, 128, 7
LIMIT = 0.15  # of the train step's time

SUBJECTS: Mapping[str, Compressor] = {
    "int8()": compressors.int8(),
    "sign()": compressors.sign(),
    "top_k(fraction=0.01)": compressors.top_k(fraction=0.01),
    "top_k(32, chunk=4096)": compressors.top_k(32, chunk=4096),
    "dct_top_k(32)": compressors.dct_top_k(32),
    "low_rank(4)": compressors.low_rank(4),
}
_PROMISED = ("int8()", "sign()", "top_k(fraction=0.01)")


def measure() -> Iterator[dict[str, Any]]:
    """One row: every compressor's time with error feedback, over the step's, timed in turns."""
    sizes = model.PRESETS[PRESET]
    graphdef, params = model.build(sizes, seed=0)
    tx = registry()["adamw"].make(1e-3)
    step = train_step(graphdef, params, tx, batch_size=BATCH, seq_len=LENGTH)
    entries = []
    for name, compressor in SUBJECTS.items():
        found = compare(_round_trip(compressor, params), step, rounds=ROUNDS, warm_up=1)
        entries.append({"compressor": name, **dataclasses.asdict(found)})
        print(f"{name:24s} {found.ms:8.1f} ms, {found.ratio:.3f} of the step", flush=True)
    yield {
        "preset": PRESET,
        "batch_size": BATCH,
        "seq_len": LENGTH,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "limit": LIMIT,
        "entries": entries,
    }


def kept(rows: list[dict[str, Any]]) -> bool:
    """Whether those that a limit is promised for keep it."""
    return all(
        entry["ratio"] <= LIMIT
        for row in rows
        for entry in row["entries"]
        if entry["compressor"] in _PROMISED
    )


def _round_trip(compressor: Compressor, params: Any) -> Callable[[], float]:
    """Encodes all leaves, each with its residual, decodes them, keeps the new residuals."""
    leaves = jax.tree.leaves(params)
    keys = list(jax.random.split(jax.random.key(0), len(leaves)))
    # As heavy-tailed as gradients are.
    draw = lambda key, x: jax.random.t(key, 3.0, x.shape)
    grads = [draw(key, x) for key, x in zip(keys, leaves, strict=True)]

    @functools.partial(jax.jit, donate_argnums=0)
    def program(residuals: list[jax.Array], grads: list[jax.Array]) -> tuple[Any, Any]:
        messages = [e + g for e, g in zip(residuals, grads, strict=True)]
        payloads = [compressor.encode(x, key) for x, key in zip(messages, keys, strict=True)]
        # Between the two the payload travels: XLA must not see that it is decoded at once.
        payloads = jax.lax.optimization_barrier(payloads)
        decoded = [compressor.decode(p, x) for p, x in zip(payloads, messages, strict=True)]
        return [x - y for x, y in zip(messages, decoded, strict=True)], decoded

    residuals = [jnp.zeros_like(g) for g in grads]

    def run() -> Any:
        nonlocal residuals
        residuals, decoded = program(residuals, grads)
        return residuals, decoded

    return functools.partial(milliseconds, run)
