"""Shampoo: its statistics and roots by hand, what it must equal, what must change nothing."""

import itertools
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import mode_products as modes
import numpy as np
import optax
import pytest

from jaxopt_suite.optimizers import roots
from jaxopt_suite.optimizers.shampoo import scale_by_shampoo, shampoo

PLAIN = {"graft": "none", "refresh_every": 1, "merge_dims": False}
SHAPES = {"matrix": (5, 3), "tensor": (4, 3, 2), "vector": (7,), "one": (1, 1)}
EPSILON = 1e-6


@pytest.fixture(name="x64")
def _x64():
    with jax.enable_x64(True):
        yield


def by_hand(gradients, *, b1, b2, epsilon, exponent=None):
    """Ungrafted and unblocked, a new root at every step; one array a step."""
    shape = np.squeeze(gradients[0]).shape or (1,)
    exponent = exponent or 1 / (2 * len(shape))
    mean, factors, found = np.zeros(shape), [np.zeros((d, d)) for d in shape], []
    for t, g in enumerate(gradients, start=1):
        g = g.reshape(shape)
        mean = b1 * mean + (1 - b1) * g
        update = mean / (1 - b1**t)
        for mode, d in enumerate(shape):
            weight, correction = (1, 1) if b2 == 1 else (1 - b2, 1 - b2**t)
            factors[mode] = b2 * factors[mode] + weight * modes.gram(g, mode)
            damped = factors[mode] / correction + epsilon * np.eye(d)
            update = modes.times(update, modes.root(damped, exponent), mode)
        found.append(update.reshape(gradients[0].shape))
    return found, factors


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("b1", "b2", "exponent"), [(0.0, 1.0, None), (0.9, 0.95, 0.4)])
def test_statistics_and_updates_of_25_steps_are_those_written_down_in_numpy(b1, b2, exponent):
    gradients = modes.normal(SHAPES, 25)
    tx = scale_by_shampoo(b1, b2, damping=roots.Absolute(EPSILON), exponent=exponent, **PLAIN)
    found, state = modes.run(tx, gradients)
    for name in SHAPES:
        expected, factors = by_hand(
            [g[name] for g in gradients], b1=b1, b2=b2, epsilon=EPSILON, exponent=exponent
        )
        for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            # Float64 and a condition of up to 1e8 under a root: 1e-16 * 1e8.
            assert modes.relative_difference(ours[name], theirs) < 1e-7, (name, step)
        block = "x".join(map(str, np.squeeze(gradients[0][name]).shape or (1,)))
        part = state.preconditioners[block]
        for ours, theirs in zip(part.factors, factors, strict=True):
            np.testing.assert_allclose(ours[0], theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_on_a_vector_it_is_full_matrix_adagrad_and_on_one_entry_adagrad():
    gradients = modes.normal({"row": (1, 6), "one": (1, 1), "scalar": ()}, 12)
    tx = scale_by_shampoo(0.0, 1.0, damping=roots.Absolute(EPSILON), **PLAIN)
    found, _ = modes.run(tx, gradients)
    total, squares = EPSILON * np.eye(6), {"one": EPSILON, "scalar": EPSILON}
    for ours, g in zip(found, gradients, strict=True):
        total = total + np.outer(g["row"], g["row"])
        expected = modes.root(total, 0.5) @ g["row"][0]
        assert modes.relative_difference(ours["row"][0], expected) < 1e-8  # as above
        for name in squares:
            squares[name] = squares[name] + g[name] ** 2
            np.testing.assert_allclose(ours[name], g[name] / np.sqrt(squares[name]), rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_without_damping_the_first_step_is_the_polar_factor():
    g = modes.normal({"w": (4, 4)}, 1)
    for b2 in (0.3, 1.0):
        tx = scale_by_shampoo(0.9, b2, damping=roots.Absolute(0.0), **PLAIN)
        (found,), _ = modes.run(tx, g)
        u, _, vt = np.linalg.svd(g[0]["w"])
        np.testing.assert_allclose(found["w"], u @ vt, atol=1e-9)


@pytest.mark.usefixtures("x64")
def test_turning_the_problem_turns_the_update():
    gradients = modes.normal({"w": (5, 3)}, 6)
    p = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    o = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    tx = scale_by_shampoo(0.9, 0.9, damping=roots.Absolute(EPSILON), **PLAIN)
    plain, _ = modes.run(tx, gradients)
    turned, _ = modes.run(tx, [{"w": p @ g["w"] @ o} for g in gradients])
    for one, other in zip(plain, turned, strict=True):
        np.testing.assert_allclose(other["w"], p @ one["w"] @ o, atol=1e-8)  # condition of 1e6


@pytest.mark.parametrize("graft", ["none", "adam"])
def test_the_scale_of_the_loss_changes_nothing(graft):
    gradients = modes.normal({"w": (5, 4), "v": (3,)}, 6, dtype=np.float32)
    tx = scale_by_shampoo(
        refresh_every=2, graft=graft, start_step=1, graft_eps=1e-20, merge_dims=False
    )
    plain, _ = modes.run(tx, gradients)
    by = np.float32(2.0**-20)  # a power of two, so that only rounding to the bit is left
    scaled, _ = modes.run(tx, [jax.tree.map(lambda x: by * x, g) for g in gradients])
    for one, other in zip(plain, scaled, strict=True):
        for name in one:
            assert modes.relative_difference(other[name], one[name]) < 1e-5


def test_blocks_with_remainders_are_leaves_of_their_own():
    gradients = modes.normal({"w": (7, 5), "t": (3, 5, 4)}, 6, dtype=np.float32)

    def pieces(tree):
        cuts = {
            (name, *corner): x[tuple(slice(c, c + 3) for c in corner)]
            for name, x in tree.items()
            for corner in itertools.product(*(range(0, n, 3) for n in x.shape))
        }
        return {str(key): x for key, x in cuts.items()}

    settings = {"merge_dims": False, "refresh_every": 2, "momentum": 0.5, "nesterov": True}
    whole, _ = modes.run(scale_by_shampoo(block_size=3, **settings), gradients)
    # Dimensions of one are dropped in a leaf, and are there in a block: fewer roots.
    alone = scale_by_shampoo(block_size=3, **settings)
    parts, _ = modes.run(alone, [pieces(g) for g in gradients])
    for one, other in zip(whole, parts, strict=True):
        for name, x in pieces(one).items():
            if 1 not in x.shape:
                np.testing.assert_allclose(x, other[name], rtol=1e-4, atol=1e-5)  # float32 roots


def test_a_block_size_from_the_largest_dimension_on_is_no_blocking():
    gradients = modes.normal({"w": (7, 5)}, 4, dtype=np.float32)
    found = [
        modes.run(scale_by_shampoo(block_size=n, refresh_every=2, merge_dims=False), gradients)[0]
        for n in (7, 4096)
    ]
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one["w"], other["w"])


@pytest.mark.parametrize(
    "refresh", ["staggered", pytest.param("together", marks=pytest.mark.exhaustive)]
)
def test_neither_the_order_of_leaves_nor_padding_of_stacks_changes_a_step(refresh):
    settings = {"block_size": 3, "refresh_every": 1, "refresh": refresh}
    gradients = modes.normal({"a": (6, 3), "b": (3, 3), "c": (3,)}, 4, dtype=np.float32)
    turned = [{"c": g["a"], "b": g["b"], "a": g["c"]} for g in gradients]
    plain, _ = modes.run(scale_by_shampoo(**settings), gradients)
    padded, _ = modes.run(scale_by_shampoo(stack_multiple=4, **settings), gradients)
    other, _ = modes.run(scale_by_shampoo(**settings), turned)
    for one, with_padding, in_turn in zip(plain, padded, other, strict=True):
        for name, same in {"a": "c", "b": "b", "c": "a"}.items():
            # Batched products may round otherwise in stacks of another length.
            np.testing.assert_allclose(with_padding[name], one[name], rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(in_turn[same], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_comes_after_everything_else(nesterov):
    gradients = modes.normal({"w": (4, 3)}, 5, dtype=np.float32)
    plain, _ = modes.run(scale_by_shampoo(refresh_every=2), gradients)
    tx = scale_by_shampoo(refresh_every=2, momentum=0.8, nesterov=nesterov)
    found, _ = modes.run(tx, gradients)
    trace = 0.0
    for ours, u in zip(found, plain, strict=True):
        trace = 0.8 * trace + u["w"]
        expected = u["w"] + 0.8 * trace if nesterov else trace
        np.testing.assert_allclose(ours["w"], expected, rtol=1e-5, atol=1e-6)  # float32


def test_uncorrected_moments_are_smaller_by_the_correction():
    gradients = modes.normal({"w": (4, 3)}, 3, dtype=np.float32)
    settings = PLAIN | {"damping": roots.Relative(1e-2)}
    corrected, _ = modes.run(scale_by_shampoo(0.9, 0.99, **settings), gradients)
    plain, _ = modes.run(scale_by_shampoo(0.9, 0.99, bias_correction=False, **settings), gradients)
    for t, (one, other) in enumerate(zip(corrected, plain, strict=True), start=1):
        factor = (1 - 0.9**t) / np.sqrt(1 - 0.99**t)
        # Relative damping: the root is of degree -1/2 in the statistics together.
        np.testing.assert_allclose(other["w"], factor * one["w"], rtol=1e-3, atol=1e-5)


def test_a_fraction_and_the_float_next_to_it_are_one_exponent():
    gradients = modes.normal({"w": (4, 3)}, 2, dtype=np.float32)
    found = [
        modes.run(scale_by_shampoo(exponent=e, **PLAIN), gradients)[0][-1]["w"]
        for e in (Fraction(2, 5), 1 / 2.5)
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    "solver", ["coupled_newton", pytest.param("newton_db", marks=pytest.mark.exhaustive)]
)
def test_another_solver_gives_the_same_step(solver):
    gradients = modes.normal({"w": (6, 4), "v": (3,)}, 8, dtype=np.float32)
    settings = {"refresh_every": 8, "damping": roots.Relative(1e-3), "merge_dims": False}
    expected, _ = modes.run(scale_by_shampoo(**settings), gradients)
    found, state = modes.run(scale_by_shampoo(solver=solver, **settings), gradients)
    for name in ("w", "v"):
        # Roots agree to 1e-4 at a condition of 1e3.
        assert modes.relative_difference(found[-1][name], expected[-1][name]) < 1e-3
    assert not any(part.failures.any() for part in state.preconditioners.values())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"b1": 1.0}, ValueError, "b1 must be in"),
        ({"b2": 1.1}, ValueError, "b2 must be in"),
        ({"block_size": 0}, ValueError, "block_size must be"),
        ({"stack_multiple": 0}, ValueError, "stack_multiple must be"),
        ({"exponent": 0.0}, ValueError, "exponent must be in"),
        ({"exponent": Fraction(3, 2)}, ValueError, r"exponent must be in \(0, 1\]"),
        ({"exponent": 1e-3}, ValueError, "denominator up to 64.*0.001"),
        ({"solver": "svd"}, ValueError, "solver must be one of"),
        ({"damping": 1e-6}, TypeError, "damping must be"),
        ({"solver": "coupled_newton", "exponent": 0.4}, ValueError, "5/2"),
        ({"solver": "newton_db", "damping": roots.PseudoInverse()}, ValueError, "PseudoInverse"),
        ({"graft": "adamw"}, ValueError, "graft must be one of"),
        ({"graft_scope": "tensor"}, ValueError, "graft_scope must be one of"),
        ({"graft_b2": 1.0}, ValueError, "graft_b2 must be in"),
        ({"graft_b2": 0.9, "graft": "adagrad"}, ValueError, "graft_b2.*'adagrad'"),
        ({"graft_scope": "parameter", "graft": "none"}, ValueError, "graft_scope.*'none'"),
        ({"graft_eps": -1.0}, ValueError, "graft_eps must be in"),
        ({"momentum": 1.0}, ValueError, "momentum must be in"),
        ({"nesterov": True}, ValueError, "nesterov=True needs momentum"),
    ],
)
def test_arguments_without_a_meaning_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        scale_by_shampoo(**settings)


def test_a_solver_that_cannot_take_the_roots_is_refused_at_init():
    tx = scale_by_shampoo(solver="newton_db", merge_dims=False)
    tx.init({"w": jnp.zeros((3, 4))})
    with pytest.raises(ValueError, match="order"):  # 6
        tx.init({"w": jnp.zeros((3, 4, 5))})


def test_the_recipe_adds_decoupled_decay_and_the_rate():
    gradients = modes.normal({"w": (4, 3), "v": (3,)}, 3, dtype=np.float32)
    params = modes.normal({"w": (4, 3), "v": (3,)}, 1, seed=1, dtype=np.float32)[0]
    rule, _ = modes.run(scale_by_shampoo(refresh_every=2), gradients, params=params)
    mask = {"w": True, "v": False}
    tx = shampoo(optax.constant_schedule(0.1), weight_decay=0.5, mask=mask, refresh_every=2)
    found, _ = modes.run(tx, gradients, params=params)
    for one, u in zip(found, rule, strict=True):
        # Two programs, and roots in float32 of statistics whose condition is up to 1e3.
        np.testing.assert_allclose(one["w"], -0.1 * (u["w"] + 0.5 * params["w"]), rtol=1e-3)
        np.testing.assert_allclose(one["v"], -0.1 * u["v"], rtol=1e-3)


def test_the_program_grows_with_block_shapes_and_not_with_leaves():
    def operations(leaves):
        params = {f"w{i}": jnp.zeros((8, 4)) for i in range(leaves)}
        tx = scale_by_shampoo(block_size=4)
        text = modes.lowered(tx, params, "tpu")
        return [text.count(name) for name in ("@Eigh", "stablehlo.dot_general", "stablehlo.case")]

    few = operations(2)
    assert few == operations(9)
    assert few[0] > 0


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the loops are for CPUs")
@pytest.mark.parametrize("schedule", ["together", "staggered"])
def test_on_a_cpu_no_stack_is_copied(schedule):
    # XLA copies what a loop writes over if it may still be read there: 6 stacks of 8 MB.
    params = {"w": jax.ShapeDtypeStruct((64 * 16, 64 * 32), jnp.float32)}
    tx = scale_by_shampoo(block_size=64, refresh=schedule)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    compiled = step.lower(params, jax.eval_shape(tx.init, params)).compile()
    copies = re.findall(r"= f32\[512,64,64\]\S* copy\(", compiled.as_text())
    assert not copies
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 512 * 64 * 64 * 4


def test_all_blocks_of_one_size_have_their_roots_taken_at_once():
    params = {f"w{i}": jnp.zeros((4, n)) for i, n in enumerate((4, 4, 3, 2))}
    tx = scale_by_shampoo(merge_dims=False, solver="newton_db")
    # Sizes 4, 3 and 2: a loop for each of the two stages of a fourth root, and power iteration's.
    assert modes.lowered(tx, params, "tpu").count("stablehlo.while") == 9
