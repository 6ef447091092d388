"""Facts about Grams: the recursion by hand, the limits of kappa, what the sign does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradient_trees import assert_histories_close, gradients, run

from jaxopt_suite.optimizers import grams, scale_by_grams

# float32 against float64: 25 steps of rounding in two running means and one division.
ROUNDING = {"rtol": 2e-6, "atol": 1e-7}


def by_hand(grads, *, b1=0.9, b2=0.999, eps=1e-8, kappa=-1.0, eps_mode="corrected"):
    history = []
    m = {k: np.zeros_like(v) for k, v in grads[0].items()}
    v = {k: np.zeros_like(x) for k, x in grads[0].items()}
    for t, tree in enumerate(grads, start=1):
        step = {}
        for k, g in tree.items():
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g**2
            c1, c2 = 1 - b1**t, 1 - b2**t
            if eps_mode == "corrected":
                u = (m[k] / c1) / (np.sqrt(v[k] / c2) + eps)
            else:
                u = np.sqrt(c2) / c1 * m[k] / (np.sqrt(v[k]) + eps)
            step[k] = np.where(np.sign(g) == np.sign(u), u, kappa * u)
        history.append(step)
    return history


@pytest.mark.parametrize("eps_mode", ["corrected", "uncorrected"])
@pytest.mark.parametrize("kappa", [-1.0, -0.3, 0.0, 1.0])
def test_equals_the_recursion_by_hand(kappa, eps_mode):
    grads = gradients(25)
    settings = {"b1": 0.8, "b2": 0.99, "eps": 1e-3, "kappa": kappa, "eps_mode": eps_mode}
    ours, _ = run(scale_by_grams(**settings), grads)
    assert_histories_close(ours, by_hand(grads, **settings), **ROUNDING)


def test_default_is_the_sign_of_the_gradient_times_adams_magnitude():
    grads = gradients(12)
    ours, _ = run(scale_by_grams(), grads)
    adam, _ = run(optax.scale_by_adam(), grads)
    flipped = 0
    for g, step, other in zip(grads, ours, adam, strict=True):
        for k in g:
            np.testing.assert_array_equal(np.sign(step[k]), np.sign(g[k].astype(np.float32)))
            # optax's float32 power in the bias correction is off by up to 1.3e-5
            np.testing.assert_allclose(np.abs(step[k]), np.abs(other[k]), rtol=3e-5)
            flipped += np.sum(np.sign(step[k]) != np.sign(other[k]))
    assert flipped > 50  # otherwise this test could not tell Grams from Adam


def test_kappa_one_is_adam_also_where_the_gradient_is_zero():
    grads = gradients(10)
    for tree in grads[3:]:
        tree["tall"][:4] = 0.0
    ours, _ = run(scale_by_grams(kappa=1.0), grads)
    adam, _ = run(optax.scale_by_adam(), grads)
    assert_histories_close(ours, adam, rtol=3e-5, atol=1e-7)  # optax's bias correction, as above


@pytest.mark.parametrize(("kappa", "moves"), [(-1.0, False), (0.0, False), (0.5, True)])
def test_a_coordinate_without_gradient_moves_only_for_positive_kappa(kappa, moves):
    grads = gradients(6)
    grads[-1]["vector"][2] = 0.0
    ours, state = run(scale_by_grams(kappa=kappa), grads)
    assert state.mu["vector"][2] != 0.0
    assert (ours[-1]["vector"][2] != 0.0) == moves


def test_loss_falls_monotonically_on_an_ill_conditioned_quadratic_where_adam_overshoots():
    loss = lambda x: 0.5 * jnp.sum(jnp.array([1.0, 100.0]) * x**2)

    def largest_rise(kappa):
        tx, x = grams(0.03, kappa=kappa), jnp.array([1.0, 1.0])

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.grad(loss)(x), state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), loss(x)

        _, losses = jax.jit(lambda: jax.lax.scan(step, (x, tx.init(x)), length=400))()
        # Below 1e-4 the step is longer than the way to the minimum and any such method chatters.
        return float(jnp.max(jnp.where(losses[:-1] > 1e-4, jnp.diff(losses), -jnp.inf)))

    assert largest_rise(kappa=-1.0) < 0
    assert largest_rise(kappa=1.0) > 0.01


def test_weight_decay_is_decoupled_and_masked():
    params = {"w": jnp.full((2, 2), 3.0), "b": jnp.full((2,), 3.0)}
    grads = jax.tree.map(jnp.zeros_like, params)
    tx = grams(0.1, weight_decay=0.5, mask={"w": True, "b": False})
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * 3.0, rtol=1e-6)  # one product in float32
    np.testing.assert_array_equal(updates["b"], 0.0)


def test_bfloat16_gradients_keep_float32_moments_and_follow_the_float32_run():
    grads = gradients(10, dtype=jnp.bfloat16)
    ours, state = run(scale_by_grams(), grads, dtype=jnp.bfloat16)
    exact = by_hand([{k: v.astype(np.float64) for k, v in g.items()} for g in grads])
    assert state.mu["tall"].dtype == state.nu["tall"].dtype == jnp.float32
    assert_histories_close(ours, exact, rtol=2**-8, atol=1e-6)  # one rounding of the result


def test_mu_dtype_narrows_only_the_first_moment():
    state = scale_by_grams(mu_dtype=jnp.bfloat16).init({"w": jnp.ones((2, 3))})
    assert state.mu["w"].dtype == jnp.bfloat16
    assert state.nu["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 1.0}, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": -0.1}, r"b2 must be in \[0, 1\), got -0.1"),
        ({"eps": -1e-8}, r"eps must be in \[0, inf\), got -1e-08"),
        ({"eps": float("nan")}, "eps must be .* got nan"),
        ({"kappa": 2.0}, r"kappa must be in \[-1, 1\], got 2.0"),
        ({"eps_mode": "hf"}, "eps_mode must be one of 'corrected', 'uncorrected', got 'hf'"),
    ],
)
def test_bad_arguments_are_refused_by_name_value_and_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        grams(0.1, **arguments)


def test_bad_rates_and_types_are_refused():
    with pytest.raises(ValueError, match=r"learning_rate must be in \[0, inf\), got -0.1"):
        grams(-0.1)
    with pytest.raises(TypeError, match=r"b1 must be a number, got '0\.9' of type str"):
        grams(0.1, b1="0.9")
    with pytest.raises(TypeError, match=r"real floating-point parameters, got int32 at \['i'\]"):
        grams(0.1).init({"f": jnp.ones(2), "i": jnp.ones(2, jnp.int32)})
