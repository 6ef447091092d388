"""AdamW with moments of 8 bits: what it keeps, where it is Adam, and where codes lie on a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxopt_suite import core, kernels, parallel
from jaxopt_suite.optimizers import adamw_8bit, scale_by_adam_8bit

LIKE = {"embed": (96, 128), "w": (64, 512), "stack": (2, 32, 128), "b": (512,), "scalar": ()}


def tree(seed, shapes=None):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {name: draw(shape) for name, shape in (shapes or LIKE).items()}


def run(tx, steps=6, shapes=None):
    params = tree(0, shapes)
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for step in range(steps):
        updates, state = update(tree(step + 1, shapes), state, params)
        found.append(updates)
    return found, state


@pytest.mark.parametrize(
    ("shape", "block", "size"),
    [
        ((1024, 4096), 256, 1024 * 4096 * (2 + 8 / 256)),
        ((1024, 4096), 2048, 1024 * 4096 * (2 + 8 / 2048)),
        ((8, 16, 256), 256, 8 * 16 * 256 * (2 + 8 / 256)),
        ((512, 1376), 256, 512 * (2 * 1376 + 8 * 6)),  # of a row's six blocks the last is shorter
        ((100_000,), 256, 2 * 100_000 + 8 * 391),
        ((4096, 1), 256, 4096 * 8),  # a scale for every entry would be more
        ((4095,), 256, 4095 * 8),
        ((64, 63), 256, 64 * 63 * 8),
        ((0, 8192), 256, 0),
        ((), 256, 8),
    ],
)
def test_the_state_takes_exactly_so_many_bytes(shape, block, size):
    rule = scale_by_adam_8bit(block=block)
    state = jax.eval_shape(rule.init, {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)})
    assert core.tree_bytes(state._replace(count=None)) == size


def test_the_first_step_is_adams_to_the_last_digits_and_small_leaves_stay_so():
    ours, _ = run(scale_by_adam_8bit())
    adam, _ = run(optax.scale_by_adam())
    whole = run(scale_by_adam_8bit(min_size=10**9))[0]
    for name in LIKE:
        # optax's float32 power in the bias correction is off by up to 1.3e-5
        np.testing.assert_allclose(ours[0][name], adam[0][name], rtol=3e-5)
        for step in range(6):
            np.testing.assert_allclose(whole[step][name], adam[step][name], rtol=3e-5, atol=1e-6)
    for name in ("b", "scalar"):
        np.testing.assert_array_equal(ours[5][name], whole[5][name])
    for name in ("embed", "w", "stack"):
        apart = np.linalg.norm(ours[5][name] - whole[5][name]) / np.linalg.norm(whole[5][name])
        assert 1e-4 < apart < 0.05  # moments of two digits


def test_what_is_kept_is_within_half_a_code_of_the_moments():
    _, state = run(scale_by_adam_8bit(), steps=1)
    moments = kernels.Moments8(*(part["w"] for part in state[1:]))
    mu, nu = kernels.adam8_decode(moments)
    g = tree(1)["w"]
    for found, exact in ((mu, 0.1 * g), (nu, 0.001 * g**2)):
        scale = jnp.repeat(jnp.abs(exact).reshape(64, 2, 256).max(axis=2), 256, axis=1)
        # Codes are 1.4 % of the scale apart in the first decade, signed, and nearer below.
        assert float(jnp.max(jnp.abs(found - exact) / scale)) < 0.0075


def test_it_learns_what_adamw_learns():
    target, x = tree(3, {"w": (64, 128)})["w"], tree(4, {"x": (256, 64)})["x"]
    loss = lambda p: jnp.mean(jnp.square(jnp.tanh(x @ p["w"]) - jnp.tanh(x @ target)))

    def train(tx):
        params = {"w": jnp.zeros((64, 128))}

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        last, _ = jax.lax.scan(step, (params, tx.init(params)), length=200)
        return float(loss(last[0]))

    ours, adam = train(adamw_8bit(0.03)), train(optax.adamw(0.03))
    assert ours == pytest.approx(adam, rel=0.1)
    assert ours < 0.02 * float(loss({"w": jnp.zeros((64, 128))}))


def test_a_gradient_that_is_no_number_stops_its_coordinate_only_and_for_one_step():
    tx, params = scale_by_adam_8bit(), tree(0)
    update, state, bad = jax.jit(tx.update), tx.init(params), tree(1)
    bad = {**bad, "w": bad["w"].at[3, 4].set(jnp.nan), "b": bad["b"].at[5].set(-jnp.inf)}
    updates, state = update(bad, state)
    assert not updates["w"][3, 4]
    assert not updates["b"][5]
    assert jnp.isfinite(updates["w"]).all()
    again, _ = update(tree(2), state)
    assert again["w"][3, 4]
    assert again["b"][5]
    np.testing.assert_array_equal(updates["w"][0], update(tree(1), tx.init(params))[0]["w"][0])


LAYOUTS = {
    "rows": P("data"),
    "whole blocks": P(None, "model"),
    "both": P("data", "model"),
}


PARAMS, BATCH = {"w": (64, 512)}, {"x": (8, 64)}


def step_on_mesh(tx, spec):
    """A train step of one matrix."""
    mesh = parallel.make_mesh({"data": 2, "model": 2}, devices=jax.devices()[:4])
    loss = lambda p, batch: jnp.sum(jnp.square(batch["x"] @ p["w"])) + jnp.sum(p["w"] ** 3)
    return parallel.make_train_step(loss, tx, mesh, param_specs={"w": spec})


def on_mesh(spec, impl, block=128):
    """The state after two steps."""
    step = step_on_mesh(adamw_8bit(0.1, impl=impl, block=block), spec)
    state = step.init(tree(0, PARAMS))
    for _ in range(2):
        state, _ = step(state, tree(1, BATCH))
    return state


def mostly_equal(found, expected):
    """But for the few entries of which a moment was near a tie: a program adds in its own order."""
    return (np.abs(found - expected) > 1e-5).mean() < 1e-3


@functools.cache
def on_one_device():
    return on_mesh(P(), "xla")


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_a_mesh_changes_no_code_and_codes_lie_as_the_parameters_do(layout, impl):
    state = on_mesh(LAYOUTS[layout], impl)
    expected = on_one_device()
    ours, whole = state.opt_state[0], expected.opt_state[0]
    assert (
        ours.mu["w"].sharding.spec == ours.nu["w"].sharding.spec == state.params["w"].sharding.spec
    )
    for name in ("mu", "nu"):
        apart = np.abs(np.asarray(getattr(ours, name)["w"], int) - getattr(whole, name)["w"])
        assert apart.max() <= 1  # the sum of products is another
        assert apart.mean() < 1e-3
        scales = f"{name}_scales"
        np.testing.assert_allclose(
            getattr(ours, scales)["w"], getattr(whole, scales)["w"], rtol=1e-5
        )
    assert mostly_equal(state.params["w"], expected.params["w"])


@pytest.mark.parametrize("impl", ["xla", "interpret"])
def test_nothing_crosses_a_mesh_that_does_not_for_adamw(impl):
    def collectives(tx):
        program = step_on_mesh(tx, LAYOUTS["both"]).lower(tree(0, PARAMS), tree(1, BATCH))
        kinds = r" = \S+ (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)\("
        return sorted(re.findall(kinds, program.compile().as_text()))

    assert collectives(adamw_8bit(0.1, impl=impl, block=128)) == collectives(optax.adamw(0.1))


def test_where_a_device_has_pieces_of_blocks_the_compiler_keeps_their_meaning():
    split = on_mesh(P(None, "model"), "interpret", block=512)  # 256 on each
    whole = on_mesh(P(), "xla", block=512)
    assert mostly_equal(split.params["w"], whole.params["w"])
    np.testing.assert_allclose(
        split.opt_state[0].mu_scales["w"], whole.opt_state[0].mu_scales["w"], rtol=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"min_size": -1}, ValueError, "min_size must be"),
        ({"block": 2.0}, TypeError, "block"),
        ({"block": 192, "impl": "pallas"}, ValueError, "multiple of 128, got block=192"),
        ({"impl": "gpu"}, ValueError, "impl must be one of 'auto'"),
        ({"b2": 1.0}, ValueError, "b2 must be"),
    ],
)
def test_what_there_is_not_is_refused(settings, error, message):
    with pytest.raises(error, match=message):
        scale_by_adam_8bit(**settings)
