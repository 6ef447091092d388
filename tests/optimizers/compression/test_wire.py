"""Bytes in the compiled program are those of the closed forms, and no whole tensor is sent."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_suite import parallel
from jaxopt_suite.optimizers.compression import compressors
from jaxopt_suite.optimizers.compression.exchange import choose, sent_bytes
from jaxopt_suite.optimizers.compression.mean import compressed_mean
from jaxopt_suite.parallel import wire

WORKERS, MODEL = 4, 2
WHOLE = {"up": (32, 64), "down": (64, 32), "bias": (24,)}
SPECS = {"up": P(None, "model"), "down": P("model", None), "bias": P()}
LOCAL = {"up": (32, 32), "down": (32, 32), "bias": (24,)}  # what a device holds

slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)

KINDS = {
    "dense": ["all-reduce"],
    "mean": ["all-reduce"],
    "gather": ["all-gather"],
    "two_phase": ["all-to-all", "all-gather"],
}


def traffic(compressor, exchange):
    """Collectives of one train step along the workers' axis, without those of metrics and flags."""
    tx = compressed_mean(
        compressor,
        axis_name="worker",
        exchange=exchange,
        dense=lambda path, leaf: leaf.size < 100,
    )
    mesh = parallel.make_mesh({"worker": WORKERS, "model": MODEL})
    step = parallel.make_train_step(
        lambda p, x: jnp.mean(jnp.tanh(x @ p["up"]) @ p["down"]) + jnp.sum(p["bias"] ** 2),
        optax.chain(tx, optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        mesh,
        worker_axis="worker",
        param_specs=SPECS,
    )
    params = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in WHOLE.items()}
    batch = jax.ShapeDtypeStruct((8, 32), jnp.float32)
    found = wire.collectives(step.lower(params, batch).compile(), mesh)
    assert all(c.exact and c.times == 1 for c in found)
    return [c for c in found if "worker" in c.axes and "metrics" not in c.op_name]


@pytest.mark.parametrize(
    ("compressor", "exchange"),
    [
        (compressors.sign(), "two_phase"),
        slow(compressors.sign(), "gather"),
        slow(compressors.int8(16), "two_phase"),
        slow(compressors.fp8(), "auto"),
        slow(compressors.ternary(), "auto"),
        (compressors.top_k(fraction=0.05), "gather"),
        slow(compressors.top_k(2, chunk=64, values="bfloat16"), "two_phase"),
        slow(compressors.dct_top_k(4, side=16), "gather"),
        (compressors.random_k(fraction=0.1), "mean"),
    ],
)
def test_a_step_sends_the_closed_form_along_the_workers_axis_and_nothing_else(compressor, exchange):
    found = traffic(compressor, exchange)
    flag = [c for c in found if c.axes == ("worker", "model")]
    assert [c.payload for c in flag] == [4]  # whether all numbers are finite
    found = [c for c in found if c not in flag]

    way = choose(compressor, LOCAL["up"], WORKERS, exchange)
    matrices = sum(sent_bytes(compressor, LOCAL[name], WORKERS, way) for name in ("up", "down"))
    copies = {"gather": WORKERS - 1, "two_phase": 2 * (WORKERS - 1)}.get(way)
    if copies:  # buffers of whole lines of 128 bytes
        matrices = copies * math.ceil(matrices / copies / 128) * 128
    bias = sent_bytes(compressor, LOCAL["bias"], WORKERS, "dense")
    assert sum(c.nbytes for c in found) == matrices + bias
    # One collective a phase for all matrices. The bias, which lies over other axes than they do,
    # has an all-reduce of its own, unless XLA joins it with theirs.
    expected = KINDS[way] if way == "mean" else [*KINDS[way], "all-reduce"]
    assert sorted(c.kind for c in found) == sorted(expected)
    assert all(c.payload < 4 * 32 * 32 for c in found if c.dtype == "f32")


def test_powersgd_sends_two_rounds_of_factors():
    found = [c for c in traffic(compressors.low_rank(2), "auto") if c.axes == ("worker",)]
    assert {c.kind for c in found} == {"all-reduce"}
    # P and Q of both matrices, as a device holds them: 32 rows and 32 columns each, rank 2.
    assert sum(c.payload for c in found) == 4 * (2 * 2 * (32 + 32) + 24)
    assert sum(c.nbytes for c in found) == 2 * 3 / 4 * 4 * (2 * 2 * (32 + 32) + 24)
