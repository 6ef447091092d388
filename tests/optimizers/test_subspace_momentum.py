"""Facts about subspace momentum: the recursion by hand, refreshes, projections, program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradient_trees import assert_histories_close, gradients, run

from jaxopt_suite.optimizers import adam_sn, adam_snsm, projections, scale_by_subspace_momentum

# float32 against float64: an SVD, two products and a running mean. Entries are of order one.
ROUNDING = {"rtol": 1e-4, "atol": 3e-5}
MATRICES = {"square": (4, 4), "tall": (7, 3), "wide": (3, 5)}


class Basis:
    """The top-r singular directions of the smaller side, in float64."""

    def __init__(self, g, rank):
        u, _, vt = np.linalg.svd(g, full_matrices=False)
        self.tall = g.shape[0] > g.shape[1]
        self.basis = vt[:rank].T if self.tall else u[:, :rank]

    def down(self, x):
        return x @ self.basis if self.tall else self.basis.T @ x

    def up(self, x):
        return x @ self.basis.T if self.tall else self.basis @ x


class TopRows:
    """The r rows (columns, if not tall) of largest norm, in float64."""

    def __init__(self, g, rank):
        self.tall, self.shape = g.shape[0] > g.shape[1], g.shape
        norms = np.sum(g**2, axis=1 if self.tall else 0)
        self.index = np.argsort(-norms)[:rank]

    def down(self, x):
        return x[self.index] if self.tall else x[:, self.index]

    def up(self, x):
        out = np.zeros(self.shape)
        if self.tall:
            out[self.index] = x
        else:
            out[:, self.index] = x
        return out


def by_hand(grads, kind, *, rank, every, on_refresh, correction, phase="before_count", b1=0.9):
    """One matrix at a time, each step written out; returns N_t."""
    history = [{} for _ in grads]
    for name in grads[0]:
        p, m, held = None, None, 0
        for t, tree in enumerate(grads, start=1):
            g = tree[name]
            if g.ndim < 2:
                m = b1 * (0.0 if m is None else m) + (1 - b1) * g
                history[t - 1][name] = m / (1.0 if correction == "none" else 1 - b1**t)
                continue
            refresh = t == 1 or (t - 1 if phase == "before_count" else t) % every == 0
            stale = False
            if refresh:
                new = kind(g, rank)
                if m is None:
                    m = np.zeros_like(new.down(g))
                elif on_refresh == "reproject":
                    m = new.down(p.up(m))
                elif on_refresh.startswith("zero"):
                    m = np.zeros_like(m)
                stale = on_refresh == "official_code" and t > 1
                held = 0 if on_refresh == "zero_and_restart_count" else held
                p = new
            held += 1
            r = p.down(g)
            m = b1 * m + (1 - b1) * r
            shown = m / (1 - b1**held) if correction == "subspace" else m
            n = p.up(shown) + g - p.up(r)
            history[t - 1][name] = n / (1 - b1**t) if correction == "numerator" else n
            m = np.zeros_like(m) if stale else m
    return history


SETTINGS = [
    ("zero_and_restart_count", "subspace", "before_count"),
    ("zero", "subspace", "before_count"),
    ("zero", "numerator", "before_count"),
    ("reproject", "none", "before_count"),
    ("reproject", "subspace", "after_count"),
]
# Momentum used in another basis than its own depends on the signs of singular vectors, which no
# library promises: the official code's refresh can be written down for rows only.
STALE = [("official_code", "numerator", "after_count")]


@pytest.mark.parametrize(
    ("projection", "kind", "on_refresh", "correction", "phase"),
    [("svd", Basis, *s) for s in SETTINGS] + [("top_rows", TopRows, *s) for s in SETTINGS + STALE],
)
def test_equals_the_recursion_by_hand(projection, kind, on_refresh, correction, phase):
    grads = gradients(14, seed=3)
    tx = scale_by_subspace_momentum(
        rank=2,
        projection=projection,
        refresh_every=4,
        refresh_phase=phase,
        on_refresh=on_refresh,
        bias_correction=correction,
    )
    theirs = by_hand(
        grads, kind, rank=2, every=4, on_refresh=on_refresh, correction=correction, phase=phase
    )
    ours, _ = run(tx, grads)
    assert_histories_close(ours, theirs, **ROUNDING)


def test_keep_carries_the_numbers_over_into_the_new_rows():
    # With rows there is no sign to choose, so that "keep" is well defined and can be written down.
    grads = gradients(9, shapes={"tall": (7, 3)})
    ours, _ = run(
        scale_by_subspace_momentum(
            rank=2,
            projection="top_rows",
            refresh_every=3,
            on_refresh="keep",
            bias_correction="none",
        ),
        grads,
    )
    m, p, theirs = np.zeros((2, 3)), None, []
    for t, tree in enumerate(grads):
        p = TopRows(tree["tall"], 2) if t % 3 == 0 else p
        m = 0.9 * m + 0.1 * p.down(tree["tall"])
        theirs.append({"tall": p.up(m - p.down(tree["tall"])) + tree["tall"]})
    assert_histories_close(ours, theirs, **ROUNDING)


@pytest.mark.parametrize("projection", ["svd", "approx_svd", "uniform_rows", "top_rows"])
def test_full_rank_and_no_refresh_is_ordinary_momentum(projection):
    grads = gradients(10)
    ours, _ = run(
        scale_by_subspace_momentum(rank=100, projection=projection, refresh_every=100), grads
    )
    theirs, _ = run(optax.ema(0.9), grads)
    assert_histories_close(ours, theirs, **ROUNDING)


def test_full_rank_snsm_is_adam_sn():
    grads = gradients(10)
    ours, _ = run(adam_snsm(0.1, rank=100, refresh_every=100), grads)
    theirs, _ = run(adam_sn(0.1), grads)
    assert_histories_close(ours, theirs, **ROUNDING)


@pytest.mark.parametrize("projection", ["svd", "approx_svd", "uniform_rows", "top_rows"])
def test_without_memory_the_step_is_the_gradient_whatever_the_subspace(projection):
    grads = gradients(6)
    tx = scale_by_subspace_momentum(0.0, rank=2, projection=projection, refresh_every=2)
    ours, _ = run(tx, grads)
    assert_histories_close(ours, grads, **ROUNDING)


@pytest.mark.parametrize(
    ("phase", "refreshes"), [("before_count", [1, 5, 9]), ("after_count", [1, 4, 8])]
)
def test_refreshes_happen_at_the_steps_the_phase_names(phase, refreshes):
    grads = gradients(10, shapes={"w": (6, 4)})
    tx = scale_by_subspace_momentum(rank=1, refresh_every=4, refresh_phase=phase)
    params = {"w": jnp.zeros((6, 4))}
    state, seen = tx.init(params), []
    for t, g in enumerate(grads, start=1):
        before = state.projector["w"]
        _, state = tx.update({"w": jnp.asarray(g["w"], jnp.float32)}, state)
        if not np.array_equal(before, state.projector["w"]):
            seen.append(t)
    assert seen == refreshes


def test_a_gradient_that_is_not_finite_keeps_the_projector_it_had():
    tx = scale_by_subspace_momentum(rank=2, refresh_every=1)
    grads = [jnp.asarray(g["tall"], jnp.float32) for g in gradients(2, shapes={"tall": (7, 3)})]
    state = tx.init(grads[0])
    _, state = tx.update(grads[0], state)
    _, after = tx.update(grads[1].at[0, 0].set(jnp.nan), state)
    np.testing.assert_array_equal(after.projector, state.projector)
    assert not np.isnan(tx.init(grads[0]).projector).any()


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (33, 9)])
def test_approximate_svd_finds_a_planted_subspace(shape):
    rng = np.random.default_rng(0)
    a = min(shape)
    planted = np.linalg.qr(rng.normal(size=(a, 2)))[0]
    g = rng.normal(size=(max(shape), 2)) @ planted.T + 1e-3 * rng.normal(size=(max(shape), a))
    g = jnp.asarray(g if shape[0] > shape[1] else g.T, jnp.float32)
    proj = projections.make_projection("approx_svd", 2, sketch_scale=2)
    basis = np.asarray(proj.fit(g, jax.random.key(1)), np.float64)
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-6)  # float32 orthonormality
    # noise is 1e-3 of the signal, so is the angle, times the sketch's distortion (below 5 here)
    np.testing.assert_allclose(basis @ basis.T, planted @ planted.T, atol=5e-3)


def test_sketch_as_large_as_the_matrix_gives_the_exact_subspace():
    g = jnp.asarray(gradients(1, shapes={"w": (13, 5)})[0]["w"], jnp.float32)
    exact = projections.make_projection("svd", 3).fit(g, jax.random.key(0))
    sketched = projections.make_projection("approx_svd", 3, sketch_scale=100).fit(
        g, jax.random.key(0)
    )
    np.testing.assert_allclose(exact @ exact.T, sketched @ sketched.T, atol=1e-5)  # float32 SVD


def test_uniform_rows_are_distinct_and_depend_on_seed_path_and_refresh_only():
    shapes = {"a": (9, 3), "b": (9, 3)}
    grads = gradients(3, shapes=shapes)
    make = lambda seed: scale_by_subspace_momentum(
        rank=4, projection="uniform_rows", refresh_every=2, seed=seed
    )
    rows = lambda seed, grads: run(make(seed), grads)[1].projector
    first = rows(0, grads)
    assert len(set(np.asarray(first["a"]).tolist())) == 4
    assert not np.array_equal(first["a"], first["b"])
    assert not np.array_equal(first["a"], rows(1, grads)["a"])
    assert not np.array_equal(first["a"], rows(0, grads[:1])["a"])
    alone = rows(0, [{"b": g["b"]} for g in grads])
    np.testing.assert_array_equal(first["b"], alone["b"])


def test_a_stack_of_matrices_is_treated_as_its_matrices():
    grads = gradients(5, shapes={"stack": (3, 4, 6)})
    apart = [{str(i): g["stack"][i] for i in range(3)} for g in grads]
    for projection in ("svd", "top_rows"):
        tx = adam_snsm(0.1, rank=2, refresh_every=2, projection=projection)
        ours, _ = run(tx, grads)
        theirs, _ = run(tx, apart)
        joined = [{"stack": np.stack([t[str(i)] for i in range(3)])} for t in theirs]
        assert_histories_close(ours, joined, **ROUNDING)


@pytest.mark.parametrize(
    ("projection", "shape", "mu", "projector"),
    [
        ("svd", (7, 3), (7, 2), (3, 2)),
        ("svd", (3, 7), (7, 2), (3, 2)),
        ("svd", (2, 7, 3), (2, 7, 2), (2, 3, 2)),
        ("top_rows", (7, 3), (2, 3), (2,)),
        ("uniform_rows", (3, 7), (2, 3), (2,)),
        ("top_rows", (5, 3, 7), (5, 2, 3), (5, 2)),
    ],
)
def test_state_holds_what_the_memory_formula_says(projection, shape, mu, projector):
    state = scale_by_subspace_momentum(rank=2, projection=projection).init(jnp.zeros(shape))
    assert state.mu.shape == mu
    assert state.projector.shape == projector
    assert scale_by_subspace_momentum(rank=2).init({"v": jnp.zeros(5)}).projector == {"v": None}


def test_the_program_has_one_decomposition_a_shape_not_a_leaf():
    params = {f"a{i}": jnp.zeros((8, 4)) for i in range(5)} | {
        f"b{i}": jnp.zeros((3, 9)) for i in range(3)
    }
    tx = scale_by_subspace_momentum(rank=2)
    text = jax.jit(tx.update).lower(params, tx.init(params)).as_text()
    assert len(re.findall(r"custom_call @lapack_sgesdd", text)) == 2


def test_bfloat16_gradients_follow_the_float64_recursion():
    grads = gradients(8, dtype=jnp.bfloat16)
    ours, state = run(
        scale_by_subspace_momentum(rank=2, refresh_every=4), grads, dtype=jnp.bfloat16
    )
    wide = [{k: v.astype(np.float64) for k, v in g.items()} for g in grads]
    theirs = by_hand(
        wide, Basis, rank=2, every=4, on_refresh="zero_and_restart_count", correction="subspace"
    )
    assert_histories_close(
        ours, theirs, rtol=2**-7, atol=2**-8
    )  # one rounding of order-one entries
    assert state.mu["tall"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be an int of at least 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank must be an int, got 2.0 of type float"),
        ({"rank": jnp.asarray(2)}, TypeError, "list 'rank' in static_args"),
        ({"refresh_every": 0}, ValueError, "refresh_every must be an int of at least 1, got 0"),
        ({"projection": "qr"}, ValueError, "projection must be one of .* got 'qr'"),
        ({"sketch_scale": 2}, ValueError, "sketch_scale=2 is for projection='approx_svd'"),
        ({"on_refresh": "reset"}, ValueError, "on_refresh must be one of .* got 'reset'"),
        ({"bias_correction": True}, ValueError, "bias_correction must be one of .* got True"),
        ({"refresh_phase": 1}, ValueError, "refresh_phase must be one of .* got 1"),
        ({"seed": -1}, ValueError, "seed must be an int of at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        adam_snsm(0.1, **arguments)
