"""SOAP: by hand in NumPy, what it must equal, and moments at a change of basis."""

import functools

import jax
import jax.numpy as jnp
import mode_products as modes
import numpy as np
import optax
import pytest

from jaxopt_suite.optimizers.shampoo import scale_by_soap, soap
from jaxopt_suite.optimizers.shampoo.eigenbases import Bases

B1, B2, BETA, EPS = 0.9, 0.8, 0.7, 1e-8


def by_hand(gradients, *, every, first, skip=False, rotated=(True, True), uncorrected=False):
    """SOAP on a matrix, with a step of QR every so often; signs of columns cancel.

    ``first`` are the first bases: those of the null space of the first statistic are arbitrary, so
    that both sides must have the same.
    """
    m, n = gradients[0].shape
    bases, factors = [np.eye(m), np.eye(n)], [np.zeros((m, m)), np.zeros((n, n))]
    mean, nu, found = np.zeros((m, n)), np.zeros((m, n)), []

    def observe(g):
        for mode in range(2):
            factors[mode] = BETA * factors[mode] + (1 - BETA) * modes.gram(g, mode)

    for count, g in enumerate(gradients, start=1):
        if count == 1:
            observe(g)
            for mode in range(2):
                if rotated[mode]:
                    bases[mode] = first[mode]
                    turned = bases[mode].T @ factors[mode] @ bases[mode]
                    values = np.linalg.eigvalsh(factors[mode])[::-1]
                    np.testing.assert_allclose(turned, np.diag(values), atol=1e-12)
        t = count - skip
        if t == 0:
            found.append(np.zeros((m, n)))
            continue
        turned = bases[0].T @ g @ bases[1]
        mean = B1 * mean + (1 - B1) * turned
        nu = B2 * nu + (1 - B2) * turned**2
        bias = np.sqrt(1 - B2**t)
        root = (np.sqrt(nu) + EPS) / bias if uncorrected else np.sqrt(nu) / bias + EPS
        found.append(bases[0] @ (mean / (1 - B1**t) / root) @ bases[1].T)
        if count > 1:
            observe(g)
        if t % every:
            continue
        still = bases[0] @ mean @ bases[1].T
        for mode in range(2):
            if rotated[mode]:
                q, a = bases[mode], factors[mode]
                order = np.argsort(-np.diag(q.T @ a @ q), kind="stable")
                nu = np.take(nu, order, axis=mode)
                bases[mode] = np.linalg.qr(a @ q[:, order])[0]
        mean = bases[0].T @ still @ bases[1]
    return found


@pytest.mark.parametrize(
    ("shape", "ours", "theirs"),
    [
        ((5, 3), {}, {"skip": True}),
        ((4, 4), {"eps_mode": "uncorrected"}, {"skip": True}),
        ((5, 3), {"one_sided": True, "first_step": "update"}, {"rotated": (False, True)}),
        ((3, 5), {"one_sided": True, "first_step": "update"}, {"rotated": (True, False)}),
        ((4, 4), {"one_sided": True}, {"rotated": (False, True), "skip": True}),
    ],
)
def test_ten_steps_are_those_written_down_in_numpy(shape, ours, theirs):
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        gradients = [{"w": rng.normal(size=shape)} for _ in range(10)]
        tx = scale_by_soap(B1, B2, EPS, shampoo_beta=BETA, refresh_every=3, **ours)
        found, _ = modes.run(tx, gradients)
        (part,) = modes.run(tx, gradients[:1])[1].rotated.values()
        expected = by_hand(
            [g["w"] for g in gradients],
            every=3,
            first=[None if q is None else np.asarray(q[0]) for q in part.bases],
            uncorrected="eps_mode" in ours,
            **theirs,
        )
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        if step or not theirs.get("skip"):
            assert modes.relative_difference(one["w"], other) < 1e-7, step
        else:
            assert not one["w"].any()


@pytest.mark.parametrize("settings", [{}, {"mu_dtype": "bfloat16"}])
def test_vectors_get_adam_from_the_second_gradient_on(settings):
    gradients = modes.normal({"v": (6,), "s": ()}, 6, dtype=np.float32)
    found, _ = modes.run(scale_by_soap(B1, B2, EPS, refresh_every=2, **settings), gradients)
    expected, _ = modes.run(optax.scale_by_adam(B1, B2, EPS, **settings), gradients[1:])
    for one, other in zip(found[1:], expected, strict=True):
        for name in one:
            # bfloat16's moment is rounded in optax before it is used, and after it here.
            tolerance = 1e-2 if settings else 1e-5
            np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=tolerance)


def test_with_bases_held_at_the_identity_it_is_adam():
    gradients = modes.normal({"w": (5, 3)}, 6, dtype=np.float32)
    tx = scale_by_soap(B1, B2, EPS, refresh_every=100, first_step="skip")

    def hold(step, state):
        if step != 2:  # the first gradient made the bases, and no step
            return state
        part = state.rotated["5x3"]
        identity = lambda q: jnp.broadcast_to(jnp.eye(q.shape[-1]), q.shape)
        part = part._replace(bases=tuple(identity(q) for q in part.bases))
        return state._replace(rotated={"5x3": part})

    found, _ = modes.run(tx, gradients, each=hold)
    expected, _ = modes.run(optax.scale_by_adam(B1, B2, EPS), gradients[1:])
    for one, other in zip(found[1:], expected, strict=True):
        np.testing.assert_allclose(one["w"], other["w"], rtol=1e-5, atol=1e-6)


def test_a_vector_may_be_turned_too():
    gradients = modes.normal({"v": (4,)}, 1, dtype=np.float32)
    _, state = modes.run(scale_by_soap(rotate_vectors=True), gradients)
    column = np.asarray(state.rotated["4"].bases[0][0, :, 0])
    g = gradients[0]["v"]
    np.testing.assert_allclose(np.abs(column), np.abs(g) / np.linalg.norm(g), atol=1e-5)


def refreshed(factors, method="eigh"):
    """A matrix's moments before and after a change of its bases, to those of ``factors``."""
    rng = np.random.default_rng(0)
    bases = Bases(0.9, one_sided=False, rotate_vectors=False)
    part = bases.init((1, 3, 2), jnp.float32, jnp.float32)
    mu, nu = rng.normal(size=(1, 3, 2)), rng.uniform(1, 2, size=(1, 3, 2))
    part = part._replace(
        mu=jnp.asarray(mu, jnp.float32),
        nu=jnp.asarray(nu, jnp.float32),
        factors=tuple(jnp.asarray(f, jnp.float32)[None] for f in factors),
    )
    return part, bases.refresh({"3x2": part}, method=method)["3x2"]


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_a_first_moment_turns_with_the_bases_and_stays_the_same_matrix(method):
    a = np.random.default_rng(1).normal(size=(3, 3))
    b = np.random.default_rng(2).normal(size=(2, 2))
    before, after = refreshed((a @ a.T, b @ b.T), method)
    left, right = (np.asarray(q[0]) for q in after.bases)
    np.testing.assert_allclose(left @ after.mu[0] @ right.T, before.mu[0], atol=1e-5)
    assert np.abs(after.mu - before.mu).max() > 0.1


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_a_second_moment_follows_its_columns_where_eigenvalues_cross(method):
    before, after = refreshed((np.diag([1.0, 3.0, 2.0]), np.diag([1.0, 2.0])), method)
    order, other = [1, 2, 0], [1, 0]
    np.testing.assert_array_equal(after.nu[0], before.nu[0][jnp.asarray(order)][:, other])
    np.testing.assert_allclose(after.bases[0][0], np.eye(3)[:, order], atol=1e-6)
    np.testing.assert_allclose(after.mu[0], before.mu[0][jnp.asarray(order)][:, other], atol=1e-6)


@pytest.mark.parametrize("one_sided", [False, True])
def test_turning_the_problem_turns_the_update(one_sided):
    # Up to signs of columns, which cancel; one-sided, only where the basis is.
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        gradients = modes.normal({"w": (4, 4)}, 6)
        p, o = (np.linalg.qr(rng.normal(size=(4, 4)))[0] for _ in range(2))
        p = np.eye(4) if one_sided else p
        tx = scale_by_soap(refresh_every=2, one_sided=one_sided)
        plain, _ = modes.run(tx, gradients)
        turned, _ = modes.run(tx, [{"w": p @ g["w"] @ o} for g in gradients])
    for one, other in zip(plain, turned, strict=True):
        np.testing.assert_allclose(other["w"], p @ one["w"] @ o, atol=1e-6)


def test_where_v_is_the_product_of_the_eigenvalues_it_is_shampoo_with_exponent_one_half():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        g = rng.normal(size=(4, 3))
        left, right = (x @ x.T / 9 for x in (rng.normal(size=(4, 9)), rng.normal(size=(3, 9))))
        right *= np.trace(left) / np.trace(right)  # as those of L and R are
        tx = scale_by_soap(0.0, 0.0, 0.0, refresh_every=100)
        state = tx.init({"w": jnp.zeros((4, 3))})
        (values, q), (others, s) = np.linalg.eigh(left), np.linalg.eigh(right)
        nu = np.outer(values, others) / np.trace(left)
        turned = q.T @ g @ s
        # With b2=0 the moment is the square of the coordinates; make the gradient's those of V.
        part = state.rotated["4x3"]._replace(bases=(q[None], s[None]))
        state = state._replace(count=jnp.asarray(5, jnp.int32), rotated={"4x3": part})
        signs = np.sign(turned)
        updates, _ = tx.update({"w": q @ (signs * np.sqrt(nu)) @ s.T}, state)
    half = modes.root(left, 0.5) @ (q @ (signs * np.sqrt(nu)) @ s.T) @ modes.root(right, 0.5)
    np.testing.assert_allclose(updates["w"], np.sqrt(np.trace(left)) * half, rtol=1e-8)


def test_blocks_remainders_padding_and_order_change_nothing():
    gradients = modes.normal({"w": (6, 4), "u": (2, 2)}, 5, dtype=np.float32)
    settings = {"block_size": 2, "refresh_every": 2, "refresh": "together"}
    plain, _ = modes.run(scale_by_soap(**settings), gradients)
    padded, _ = modes.run(scale_by_soap(stack_multiple=4, **settings), gradients)
    pieces = lambda g: {
        f"{i}{j}": g["w"][2 * i : 2 * i + 2, 2 * j : 2 * j + 2] for i in range(3) for j in range(2)
    }
    alone, _ = modes.run(scale_by_soap(**settings), [pieces(g) for g in gradients])
    for one, other, parts in zip(plain, padded, alone, strict=True):
        for name in one:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-5)
        for name, piece in pieces(one).items():
            np.testing.assert_allclose(parts[name], piece, rtol=1e-4, atol=1e-5)


def test_in_two_hundred_steps_it_is_where_adam_is_in_a_thousand():
    # 0.5 |A W B - C|^2 with condition numbers of 100 and turned axes; the best of three rates.
    rng = np.random.default_rng(0)

    def of_condition_100(n):
        u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
        return jnp.asarray((u * np.logspace(0, -2, n)) @ v.T, jnp.float32)

    a, b = of_condition_100(12), of_condition_100(8)
    target = a @ jnp.asarray(rng.normal(size=(12, 8)), jnp.float32) @ b
    loss = lambda w: 0.5 * jnp.sum((a @ w @ b - target) ** 2)

    def best(make, steps):
        def train(rate):
            tx = make(optax.linear_schedule(rate, 0.0, steps))

            def step(carry, _):
                w, state = carry
                updates, state = tx.update(jax.grad(loss)(w), state, w)
                return (optax.apply_updates(w, updates), state), None

            w = jnp.zeros((12, 8))
            return loss(jax.lax.scan(step, (w, tx.init(w)), None, steps)[0][0])

        return min(float(jax.jit(train)(rate)) for rate in (0.03, 0.1, 0.3))

    adam = best(functools.partial(optax.adam, b1=0.95, b2=0.95), 1000)
    assert best(soap, 200) <= adam


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"b1": 1.0}, "b1 must be in"),
        ({"b2": -0.1}, "b2 must be in"),
        ({"eps": -1.0}, "eps must be in"),
        ({"shampoo_beta": 1.0}, "shampoo_beta must be in"),
        ({"block_size": 0}, "block_size must be"),
        ({"method": "svd"}, "method must be one of"),
        ({"first_step": "half"}, "first_step must be one of"),
        ({"eps_mode": "inside"}, "eps_mode must be one of"),
        ({"refresh": "never"}, "refresh must be one of"),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        scale_by_soap(**settings)


def test_the_program_grows_with_block_shapes_and_not_with_leaves():
    def operations(leaves):
        params = {f"w{i}": jnp.zeros((8, 4)) for i in range(leaves)}
        tx = scale_by_soap(block_size=4, refresh_every=2)
        text = modes.lowered(tx, params, "tpu")
        return [text.count(name) for name in ("@Eigh", "stablehlo.dot_general", "stablehlo.while")]

    few = operations(2)
    assert few == operations(9)
    assert few[0] > 0
