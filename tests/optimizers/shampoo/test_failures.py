"""What is put out of order on purpose: training goes on, and the state counts it."""

import functools

import jax
import jax.numpy as jnp
import mode_products as modes
import numpy as np
import pytest

from jaxopt_suite.optimizers import roots
from jaxopt_suite.optimizers.shampoo import scale_by_shampoo, scale_by_soap

METHODS = {
    "shampoo": functools.partial(scale_by_shampoo, merge_dims=False),
    "soap": scale_by_soap,
}
SHAPES = {"a": (4, 4), "b": (4, 2), "c": (4, 4)}  # "a" and "c" share a stack


def parts(state):
    """The stacks, whatever the method calls them."""
    return state.preconditioners if hasattr(state, "preconditioners") else state.rotated


def put_parts(state, new):
    field = "preconditioners" if hasattr(state, "preconditioners") else "rotated"
    return state._replace(**{field: new})


def with_nan(name, row):
    """NaN in one row's statistics at step 20."""

    def change(step, state):
        if step != 20:
            return state
        part = parts(state)[name]
        broken = part._replace(factors=tuple(f.at[row, 0, 0].set(jnp.nan) for f in part.factors))
        return put_parts(state, parts(state) | {name: broken})

    return change


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("refresh", ["together", "staggered"])
def test_broken_statistics_fail_alone_are_counted_and_recover(method, refresh):
    gradients = modes.normal(SHAPES, 30, dtype=np.float32)
    tx = METHODS[method](block_size=4, refresh_every=3, refresh=refresh)
    counts = []

    def each(step, state):
        state = with_nan("4x4", 1)(step, state)
        counts.append({name: np.asarray(part.failures) for name, part in parts(state).items()})
        return state

    plain, _ = modes.run(tx, gradients)
    found, state = modes.run(tx, gradients, each=each)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((found, state)))
    for one, other in zip(plain, found, strict=True):
        for name in ("a", "b"):  # "c" is row 1
            np.testing.assert_array_equal(one[name], other[name])
    failures = np.stack([count["4x4"] for count in counts])
    assert failures.max(0).tolist() == [[0, 0], [1, 1]]
    assert not failures[:20].any()
    assert not failures[-1].any()  # the next refresh succeeded
    norms = [np.linalg.norm(x["c"]) for x in found]
    assert max(norms[19:]) < 2 * max(norms[:19])
    assert min(norms[19:]) > 0.5 * min(norms[:19])


@pytest.mark.parametrize("refresh", ["together", "staggered"])
def test_statistics_that_began_again_have_the_scale_of_the_old_ones(refresh):
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=(4, 4)))
    gradients = [{"w": ((u * [4.0, 3.0, 2.0, 1.0]) @ vt).astype(np.float32)} for _ in range(30)]
    tx = METHODS["shampoo"](refresh_every=3, refresh=refresh, graft="none")
    found, _ = modes.run(tx, gradients, each=with_nan("4x4", 0))
    for updates in found[2:]:
        # The polar factor of the mean, which is that of all gradients; damped by 1e-6, float32.
        np.testing.assert_allclose(updates["w"], u @ vt, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e30])
def test_a_bad_gradient_counts_as_zero_in_its_block_and_changes_no_other(method, bad):
    gradients = modes.normal(SHAPES, 8, dtype=np.float32)
    as_zero = [{name: x.copy() for name, x in g.items()} for g in gradients]
    gradients[4]["a"][2, 1] = bad
    as_zero[4]["a"][:] = 0.0
    tx = METHODS[method](refresh_every=2)
    found, state = modes.run(tx, gradients)
    expected, _ = modes.run(tx, as_zero)
    assert not found[4]["a"].any()
    expected[4]["a"] = np.zeros((4, 4), np.float32)
    for one, other in zip(found, expected, strict=True):
        for name in SHAPES:
            np.testing.assert_array_equal(one[name], other[name])
    assert {name: n[:, 0].tolist() for name, n in state.skipped.items()} == {
        "4x4": [1, 0],
        "4x2": [0],
    }
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_gradients_stands_still_and_a_frozen_one_comes_back_to_life(method):
    gradients = modes.normal(SHAPES, 130, dtype=np.float32)
    for step, g in enumerate(gradients):
        g["b"][:] = 0.0
        if 10 <= step < 110:
            g["a"][:] = 0.0
    found, state = modes.run(METHODS[method](refresh_every=5), gradients)
    assert not any(x["b"].any() for x in found)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((found, state)))
    assert not any(part.failures.any() for part in parts(state).values())
    norms = {name: [np.linalg.norm(x[name]) for x in found] for name in ("a", "c")}
    # 100 steps of 0.95 leave 6e-3 of SOAP's moments, a root of which is 8e-2; then a first step may
    # be long, 1 / sqrt(1 - 0.95).
    assert norms["a"][109] < 0.1 * norms["a"][9]
    assert max(norms["a"][110:]) < 5 * max(norms["c"])
    assert norms["a"][-1] > 0.2 * norms["c"][-1]


@pytest.mark.parametrize("start_step", [1, 10])
def test_the_first_gradients_after_a_refresh_without_any_are_not_enlarged(start_step):
    gradients = modes.normal({"w": (4, 4), "v": (3,)}, 19, dtype=np.float32)
    for g in gradients[:10]:
        g["w"][:] = 0.0
        g["v"][:] = 0.0
    tx = METHODS["shampoo"](0.0, refresh_every=10, start_step=start_step, graft="none")
    found, state = modes.run(tx, gradients)
    for updates, g in zip(found[10:], gradients[10:], strict=True):
        for name in g:
            np.testing.assert_array_equal(updates[name], g[name])  # there has been no root yet
    assert not any(part.failures.any() for part in state.preconditioners.values())


def test_a_root_that_cannot_be_taken_is_counted_in_a_row_and_the_one_before_stays():
    gradients = modes.normal({"w": (4, 3)}, 6, dtype=np.float32)
    impossible = roots.CoupledNewton(max_residual=1e-30)
    tx = METHODS["shampoo"](refresh_every=2, graft="none", solver=impossible)
    found, state = modes.run(tx, gradients)
    assert all(np.isfinite(x["w"]).all() for x in found)
    for part in state.preconditioners.values():
        assert (np.asarray(part.failures) == 3).all()
        for root in part.roots:
            np.testing.assert_array_equal(root[0], np.eye(root.shape[-1]))


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("method", METHODS)
def test_narrow_gradients_are_worked_on_in_float32(method, dtype):
    gradients = modes.normal(SHAPES, 6, dtype=np.float32)
    narrow = [jax.tree.map(lambda x: jnp.asarray(x, dtype), g) for g in gradients]
    exact = [jax.tree.map(lambda x: np.asarray(x, np.float32), g) for g in narrow]
    tx = METHODS[method](refresh_every=2)
    found, state = modes.run(tx, narrow)
    expected, _ = modes.run(tx, exact)
    for one, other in zip(found, expected, strict=True):
        for name in SHAPES:
            assert one[name].dtype == dtype
            rounded = np.asarray(jnp.asarray(other[name], dtype), np.float32)
            # Two programs may round to neighbours.
            spacing = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(
                one[name].astype(np.float32), rounded, rtol=2 * spacing, atol=1e-5
            )
    floating = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floating} == {np.dtype("float32")}


def test_stored_parts_have_the_dtypes_asked_for_and_the_steps_stay_close():
    gradients = modes.normal(SHAPES, 8, dtype=np.float32)
    settings = {"refresh_every": 2, "momentum": 0.5, "damping": roots.Relative(1e-2)}
    plain, _ = modes.run(METHODS["shampoo"](**settings), gradients)
    narrow = dict.fromkeys(("mu_dtype", "factor_dtype", "root_dtype"), "bfloat16")
    found, state = modes.run(METHODS["shampoo"](**narrow, **settings), gradients)
    for tree in (state.mu, state.trace, [p.factors + p.roots for p in parts(state).values()]):
        assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state.nu)} == {jnp.dtype("float32")}
    for one, other in zip(plain, found, strict=True):
        for name in SHAPES:
            # bfloat16's 4e-3, of four things, and more in a root's small eigenvalues.
            assert modes.relative_difference(other[name], one[name]) < 0.1


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_float64_parameters_keep_a_float64_state_whatever_the_gradients(method):
    with jax.enable_x64(True):
        for dtype in (np.float64, np.float32):
            gradients = modes.normal({"w": (4, 3)}, 2, dtype=dtype)
            tx = METHODS[method](refresh_every=1)
            state = tx.init({"w": jnp.zeros((4, 3), jnp.float64)})
            _, new = tx.update(gradients[0], state)
            dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
            assert dtypes(new) == dtypes(state)
