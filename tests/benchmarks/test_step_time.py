"""Step times: the least memory traffic by hand, interleaving, refreshes told apart."""

import importlib.util

import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks.step_time import __main__ as command
from benchmarks.step_time import programs, timing
from jaxopt_suite.optimizers import registry

PARAMS = {
    "w": jax.ShapeDtypeStruct((4, 3), jnp.float32),
    "b": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
}


def test_least_memory_traffic_by_hand():
    # Parameters and gradients: 12 * 4 + 3 * 2 = 54 bytes. State: one int32 and one float32 [5].
    state = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((5,), jnp.float32))
    assert programs.minimum_bytes(PARAMS, state) == 54 + 2 * 54 + 2 * 24


def test_the_compiled_update_is_the_optimizers_and_moves_at_least_the_least():
    params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    tx = optax.adam(0.1)
    program = programs.compile_update(tx, params)
    values, grads = programs.arrays(params, seed=0), programs.arrays(params, seed=1)
    updates, _ = tx.update(grads, tx.init(values), values)
    expected = optax.apply_updates(values, updates)
    runner = timing.Runner(program, tx, values, [grads])
    assert runner() > 0.0
    _, found = program.step(grads, jax.jit(tx.init)(values), jax.tree.map(jnp.copy, values))
    assert jnp.allclose(found["w"], expected["w"], rtol=1e-6)  # another fusion, one rounding
    assert program.minimum_bytes == 64 * 64 * 4 * 7 + 2 * 4  # g + 2p + 2(mu, nu) and a counter
    assert program.bytes_accessed >= program.minimum_bytes
    assert program.state_bytes == 64 * 64 * 4 * 2 + 4


def test_a_recipe_that_refreshes_is_timed_twice_and_others_once():
    alone = {name: recipe for name, recipe in registry().items() if not recipe.communicates}
    kinds = {name: [s.kind for s in programs.subjects(recipe)] for name, recipe in alone.items()}
    refreshing = {"adam_snsm", "shampoo", "soap", "galore"}
    for name, found in kinds.items():
        assert found == (["common step", "refresh step"] if name in refreshing else ["step"]), name


def test_rounds_alternate_in_order_and_the_warm_up_is_not_counted():
    calls = []

    def timer(name, times):
        return lambda: calls.append(name) or next(times)

    mine = timer("a", iter([1000.0, 3.0, 3.0, 6.0, 3.0]))
    theirs = timer("b", iter([1.0, 2.0, 2.0, 2.0, 2.0]))
    found = timing.compare(mine, theirs, rounds=4, warm_up=1)
    assert "".join(calls) == "baabbaabba"
    assert (found.ms, found.baseline_ms, found.ratio) == (3.0, 2.0, 1.5)
    assert (found.low, found.high) == (1.5, 1.875)  # quartiles of 1.5, 1.5, 3.0, 1.5
    assert found.rounds == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--optimizers", "grms"], "grams"), (["--preset", "huge"], "nano")],
)
def test_bad_arguments_are_refused_with_the_legal_values(words, message, capsys):
    assert command.main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [*command.TARGETS, command.BASELINE])
def test_targets_and_baseline_are_recipes(name):
    assert name in registry()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="a TPU compiler is here")
def test_a_topology_without_its_compiler_is_refused_with_the_extra_that_brings_it(capsys):
    assert command.main(["--topology", "v5e:2x2", "--optimizers", "grams"]) == 2
    assert "jaxopt-suite[tpu-aot]" in capsys.readouterr().err
