"""The lengths of grafted updates, per block and per parameter, and the steps before any root."""

import itertools

import jax
import mode_products as modes
import numpy as np
import pytest

from jaxopt_suite.optimizers.shampoo import scale_by_shampoo

SHAPES = {"w": (6, 3), "v": (4,)}
B1, B2, EPS, STEPS = 0.8, 0.9, 1e-3, 6
KINDS = ["sgd", "adagrad", "rmsprop", "adam"]


def directions(kind, gradients):
    """What the grafted method would step along, at every step."""
    mean, nu, found = 0.0, 0.0, []
    for t, g in enumerate(gradients, start=1):
        mean = B1 * mean + (1 - B1) * g
        nu = nu + g**2 if kind == "adagrad" else B2 * nu + (1 - B2) * g**2
        used = nu / (1 - B2**t) if kind == "adam" else nu
        corrected = mean / (1 - B1**t)
        found.append(corrected if kind == "sgd" else corrected / (np.sqrt(used) + EPS))
    return found


def blocks(name, x):
    """Of two rows each; the vector of two entries."""
    return x.reshape(-1, 2, *x.shape[1:]) if name == "w" else x.reshape(2, 2)


def settings(kind, **others):
    given = {"graft": kind, "block_size": 2, "merge_dims": False} | others
    if kind in ("adagrad", "rmsprop", "adam"):
        given["graft_eps"] = EPS
    return given


@pytest.mark.parametrize(
    "kind",
    ["adam", *(pytest.param(k, marks=pytest.mark.exhaustive) for k in KINDS if k != "adam")],
)
def test_before_the_start_the_grafted_method_steps_and_then_gives_its_length(kind):
    with jax.enable_x64(True):
        gradients = modes.normal({"w": (6, 2), "v": (4,)}, STEPS)
        found, state = modes.run(
            scale_by_shampoo(B1, B2, refresh_every=3, **settings(kind)), gradients
        )
        bare, _ = modes.run(
            scale_by_shampoo(B1, B2, refresh_every=3, **settings("none")), gradients
        )
    assert (state.nu is None) == (kind == "sgd")
    for name in ("w", "v"):
        expected = directions(kind, [g[name] for g in gradients])
        for step in range(STEPS):
            ours = found[step][name]
            if step < 2:
                np.testing.assert_allclose(ours, expected[step], rtol=1e-12)
                continue
            per_block = zip(
                *(blocks(name, x) for x in (ours, expected[step], bare[step][name])), strict=True
            )
            for update, of_method, preconditioned in per_block:
                length = np.linalg.norm(of_method) / np.linalg.norm(preconditioned)
                np.testing.assert_allclose(update, length * preconditioned, rtol=1e-10)


@pytest.mark.parametrize(
    ("kind", "multiple"), [("adam", 4), pytest.param("sgd", 1, marks=pytest.mark.exhaustive)]
)
def test_per_parameter_all_blocks_of_a_leaf_have_one_factor(kind, multiple):
    with jax.enable_x64(True):
        gradients = modes.normal(SHAPES, STEPS)
        others = {"refresh_every": 2, "stack_multiple": multiple}
        tx = scale_by_shampoo(B1, B2, **settings(kind, graft_scope="parameter", **others))
        found, _ = modes.run(tx, gradients)
        bare, _ = modes.run(scale_by_shampoo(B1, B2, **settings("none", **others)), gradients)
    for name in SHAPES:
        expected = directions(kind, [g[name] for g in gradients])[-1]
        length = np.linalg.norm(expected) / np.linalg.norm(bare[-1][name])
        np.testing.assert_allclose(found[-1][name], length * bare[-1][name], rtol=1e-10)


@pytest.mark.parametrize(
    ("kind", "scope"),
    [("none", "block"), *itertools.product(KINDS, ["block", "parameter"])],
)
def test_blocks_without_a_gradient_do_not_move_and_the_others_do(kind, scope):
    gradients = modes.normal(SHAPES, 4, dtype=np.float32)
    for g in gradients:
        g["w"][2:4] = 0.0
    tx = scale_by_shampoo(**settings(kind, graft_scope=scope, refresh_every=2))
    found, state = modes.run(tx, gradients)
    for updates in found:
        assert not updates["w"][2:4].any()
        assert updates["w"][:2].all()
        assert updates["w"][4:].all()
    assert not any(part.failures.any() for part in state.preconditioners.values())


def test_the_moments_decay_is_that_of_the_statistics_unless_given():
    gradients = modes.normal(SHAPES, 3, dtype=np.float32)
    for b2, graft_b2, same_as in [(0.9, None, 0.9), (0.9, 0.5, 0.5), (1.0, None, 0.999)]:
        tx = scale_by_shampoo(0.0, b2, graft_b2=graft_b2, refresh_every=10)
        found, _ = modes.run(tx, gradients)
        nu = 0.0
        for t, (ours, g) in enumerate(zip(found, gradients, strict=True), start=1):
            nu = same_as * nu + (1 - same_as) * g["w"].astype(np.float64) ** 2
            expected = g["w"] / np.sqrt(nu / (1 - same_as**t))
            # 1 - 0.999 in float32 is off by 1.3e-5.
            np.testing.assert_allclose(ours["w"], expected, rtol=1e-4)
