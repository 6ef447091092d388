"""What is in the compiled steps: where collectives stand, what they send, what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_suite import core, parallel
from jaxopt_suite.optimizers import (
    compressed_mean,
    compressors,
    diloco,
    feedback,
    streaming_diloco,
)
from jaxopt_suite.parallel import wire

AXIS = "worker"
PARAMS = {"in": jnp.ones((64, 32)), "out": jnp.ones((32, 64)), "bias": jnp.ones(32)}
BATCH = jax.ShapeDtypeStruct((16, 64), jnp.float32)


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["in"] + params["bias"][None]) @ params["out"] - x) ** 2)


def int4(axis):
    mean = compressed_mean(compressors.int4(), feedback=feedback.none(), axis_name=axis)
    return optax.chain(mean, optax.sgd(0.4, 0.9, nesterov=True))


LOOPS = {
    "diloco": lambda: diloco(optax.adam(0.1), sync_every=4, axis_name=AXIS),
    "streaming": lambda: streaming_diloco(
        optax.adam(0.1), int4(AXIS), sync_every=4, axis_name=AXIS, fragments=3, delay=1
    ),
}


def compiled(tx, sizes, *, active=False, **options):
    mesh = parallel.make_mesh(sizes)
    step = parallel.make_train_step(loss, tx, mesh, worker_axis=AXIS, **options)
    return step.lower(PARAMS, BATCH, active=active).compile(), mesh


@pytest.mark.parametrize(("name", "active"), [("diloco", False), ("streaming", True)])
def test_an_inner_step_sends_nothing_between_workers(name, active):
    specs = {"in": P(None, "model"), "out": P("model", None), "bias": P("model")}
    sizes = {"worker": 4, "model": 2}
    program, mesh = compiled(LOOPS[name](), sizes, active=active, param_specs=specs)
    among = [c for c in wire.collectives(program, mesh) if AXIS in c.axes]
    assert all(c.conditional for c in among)
    assert any(c.payload > 1000 for c in among)


def test_a_synchronisation_sends_the_parameters_once_and_two_numbers():
    program, mesh = compiled(LOOPS["diloco"](), {"worker": 8})
    sent = sum(c.nbytes for c in wire.collectives(program, mesh) if c.conditional)
    assert sent == 2 * 7 / 8 * (core.tree_bytes(PARAMS) + 8)


def test_a_fragment_in_four_bits_sends_its_codes_and_scales():
    """The two matrices are compressed; the bias, of 32 elements, goes with the third as it is."""
    program, mesh = compiled(LOOPS["streaming"](), {"worker": 8})
    found = [c for c in wire.collectives(program, mesh) if c.conditional]
    codes = [c for c in found if c.dtype == "u8"]
    piece = 64 * 32 // 8
    line = -(-compressors.int4().nbytes((piece,)) // 128) * 128
    assert sorted(c.payload for c in codes) == [8 * line] * 4  # two matrices, in two phases each
    assert {c.kind for c in codes} == {"all-to-all", "all-gather"}


def test_a_simulated_fleet_synchronises_in_a_conditional_too():
    """Were its predicate batched, vmap would make a selection of it, and every step pay for it."""
    tx = LOOPS["diloco"]()
    step = parallel.make_train_step(loss, tx, worker_axis=AXIS, workers=8)
    assert " conditional(" in step.lower(PARAMS, BATCH).compile().as_text()


def test_one_program_serves_all_steps_and_one_more_those_with_weights():
    step = parallel.make_train_step(loss, LOOPS["diloco"](), worker_axis=AXIS, workers=8)
    state, batch = step.init(PARAMS), np.ones(BATCH.shape, np.float32)
    for weights in ({}, {"active": np.ones(8)}):
        for _ in range(5):
            state, _ = step(state, batch, **weights)
    functions = step._prepare(PARAMS)[1]
    assert [f._cache_size() for f in functions] == [1, 1]


def test_a_device_keeps_parameters_inner_state_outer_parameters_and_their_momentum():
    """From the compiler's figures; each is split over the model axis as the parameters are."""
    specs = {"in": P(None, "model"), "out": P("model", None), "bias": P("model")}
    sizes = {"worker": 4, "model": 2}
    program, _ = compiled(LOOPS["diloco"](), sizes, param_specs=specs)
    alone, _ = compiled(optax.adam(0.1), sizes, param_specs=specs)
    own = core.tree_bytes(PARAMS) / 2
    found, inner = program.memory_analysis(), alone.memory_analysis()
    batch = 4 * BATCH.size / 4
    counters = 5 * 4  # Adam's and four of the loop
    assert found.argument_size_in_bytes == pytest.approx(5 * own + batch + counters, abs=64)
    assert found.alias_size_in_bytes == pytest.approx(5 * own + counters, abs=64)
    # Updates are a branch's result, which is not fused into the parameters: a copy of these more.
    assert found.temp_size_in_bytes <= inner.temp_size_in_bytes + 1.5 * own
