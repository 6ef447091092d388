"""Facts about DeMo: the recursion by hand, its limits, who counts in a mean, what it sends."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from gradient_trees import gradients
from jax.sharding import PartitionSpec

from jaxopt_suite.core.varying import vary
from jaxopt_suite.optimizers.demo import demo, scale_by_demo
from jaxopt_suite.parallel import make_mesh, make_train_step, run_workers, wire

AXIS = "worker"
SHAPES = {
    "whole": (8, 12),
    "uneven": (7, 5),
    "stack": (2, 6, 9),
    "vector": (10,),
    "scalar": (),
    "prime": (13,),
    "empty": (0, 3),
}
SMALL = {"side": 4, "k": 3, "decay": 0.8}
never = lambda path, leaf: False
always = lambda path, leaf: True
compressed_matrices = lambda path, leaf: jnp.ndim(leaf) < 2
# float32 against float64: transforms and sums of some ten numbers, carried on for a few steps.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def of_workers(workers, steps, *, shapes=SHAPES, dtype=np.float32):
    """Gradients [workers, steps, ...] with signs that change; the workers' differ."""
    runs = [gradients(steps, shapes=shapes, seed=w, dtype=dtype) for w in range(workers)]
    return jax.tree.map(
        lambda *xs: np.stack(xs).reshape(workers, steps, *xs[0].shape), *itertools.chain(*runs)
    )


def run(tx, grads, *, mesh=None, **extra):
    """All updates [steps, ...], typed as equal on all workers, and each worker's last momentum."""

    def worker(own):
        params = jax.tree.map(lambda g: jnp.zeros_like(g[0]), own)

        def step(state, g):
            updates, state = tx.update(g, state, params, **extra)
            return state, updates

        state, history = jax.lax.scan(step, tx.init(params), own)
        return history, state.momentum

    run_all = run_workers(worker, axis_name=AXIS, mesh=mesh)
    return jax.tree.map(np.asarray, jax.jit(run_all)(grads))


def close(ours, expected, **tolerance):
    for name in expected:
        np.testing.assert_allclose(
            ours[name], expected[name], err_msg=name, **(tolerance or ROUNDING)
        )


# By hand, in NumPy and float64.


def cosines(n):
    matrix = np.array(
        [[np.cos(np.pi * i * (2 * j + 1) / (2 * n)) for j in range(n)] for i in range(n)]
    )
    matrix *= np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix


def cut(length, side, pad):
    """Side of a chunk and the length of the axis once padded."""
    side = min(side, length)
    if pad:
        return side, -(-length // side) * side
    return max(s for s in range(1, side + 1) if length % s == 0), length


def coefficients(x, side, pad):
    """The transformed chunks of one matrix, with their places: {(row, column): [a, b]}."""
    (a, rows), (b, columns) = (cut(n, side, pad) for n in x.shape)
    padded = np.zeros((rows, columns))
    padded[: x.shape[0], : x.shape[1]] = x
    return {
        (i, j): cosines(a) @ padded[i : i + a, j : j + b] @ cosines(b).T
        for i in range(0, rows, a)
        for j in range(0, columns, b)
    }


def matrix_of(chunks, shape):
    a, b = next(iter(chunks.values())).shape
    x = np.zeros((shape[0] + a, shape[1] + b))
    for (i, j), y in chunks.items():
        x[i : i + a, j : j + b] = cosines(a).T @ y @ cosines(b)
    return x[: shape[0], : shape[1]]


def kept_of(y, k):
    """The k largest magnitudes of a chunk, zeros elsewhere."""
    flat = np.zeros(y.size)
    largest = np.argsort(-np.abs(y.ravel()), kind="stable")[:k]
    flat[largest] = y.ravel()[largest]
    return flat.reshape(y.shape)


def exchange_by_hand(messages, *, side, k, pad, mean):
    """Mean and what was sent, of one matrix a worker."""
    shape = messages[0].shape
    sent = [{at: kept_of(y, k) for at, y in coefficients(x, side, pad).items()} for x in messages]
    means = {}
    for at in sent[0]:
        stacked = np.stack([s[at] for s in sent])
        senders = np.maximum(np.sum(stacked != 0, axis=0), 1)
        means[at] = stacked.sum(0) / (senders if mean == "senders" else len(messages))
    return matrix_of(means, shape), [matrix_of(s, shape) for s in sent]


def by_hand(grads, *, decay=0.999, side=64, k=32, pad=True, alpha=1.0, mean="senders"):
    """Means [steps, ...] and momenta [workers, ...] of one leaf, [workers, steps, ...]."""
    workers, steps, *shape = grads.shape
    matrices = (1, 1, *shape)[-max(2, len(shape)) :]
    g = grads.astype(np.float64).reshape(workers, steps, -1, *matrices[-2:])
    momentum, result = np.zeros((workers, *g.shape[2:])), np.zeros(g.shape[1:])
    for t in range(steps):
        momentum = decay * momentum + (1 - decay) * g[:, t]
        for which in range(g.shape[2]):
            result[t, which], sent = exchange_by_hand(
                momentum[:, which], side=side, k=k, pad=pad, mean=mean
            )
            momentum[:, which] -= alpha * np.array(sent)
    return result.reshape(steps, *shape), momentum.reshape(workers, *shape)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"workers": 1},
        {"pad": False},
        {"alpha": 0.2, "k": 5},
        {"mean": "workers"},
        {"side": 3, "k": 1, "decay": 0.0},
    ],
    ids=str,
)
def test_equals_the_recursion_by_hand(settings):
    settings = SMALL | settings
    grads = of_workers(settings.pop("workers", 3), 5)
    tx = scale_by_demo(axis_name=AXIS, phi="identity", dense=never, **settings)
    means, momenta = run(tx, grads)
    assert means.pop("empty").shape == (5, 0, 3)
    for name in means:
        mean, momentum = by_hand(grads[name], **settings)
        np.testing.assert_allclose(means[name], mean, err_msg=name, **ROUNDING)
        np.testing.assert_allclose(momenta[name], momentum, err_msg=name, **ROUNDING)


def test_the_default_direction_is_the_sign_of_the_mean_and_turns():
    grads = of_workers(3, 5, shapes={"x": (7, 5)})
    signs = run(scale_by_demo(axis_name=AXIS, dense=never, **SMALL), grads)[0]["x"]
    mean, _ = by_hand(grads["x"], **SMALL)
    clear = np.abs(mean) > 1e-5  # where rounding cannot turn the sign
    np.testing.assert_array_equal(signs[clear], np.sign(mean)[clear])
    assert np.sum(signs[1:] * signs[:-1] < 0) > 20  # or signs would be no test
    assert clear.mean() > 0.95


@pytest.mark.parametrize("dense", [never, always], ids=["all coefficients", "dense"])
def test_sending_everything_is_the_mean_of_the_gradients_and_leaves_no_momentum(dense):
    grads = of_workers(4, 4)
    settings = {"side": 16, "k": 256, "dense": dense}
    means, momenta = run(scale_by_demo(0.9, axis_name=AXIS, phi="identity", **settings), grads)
    close(means, {name: 0.1 * g.mean(0) for name, g in grads.items()})
    close(momenta, jax.tree.map(np.zeros_like, momenta), rtol=0, atol=1e-6)
    if dense is always:
        assert not any(x.any() for x in momenta.values())  # exactly
    signs, _ = run(scale_by_demo(0.9, axis_name=AXIS, **settings), grads)
    close(signs, {name: np.sign(g.mean(0)) for name, g in grads.items()}, rtol=0, atol=0)


def test_a_dense_leaf_is_one_of_which_all_coefficients_are_sent_for_any_alpha():
    grads = of_workers(3, 5)
    settings = {"axis_name": AXIS, "side": 16, "k": 256, "alpha": 0.3, "phi": "identity"}
    dense, all_sent = (run(scale_by_demo(0.9, dense=d, **settings), grads) for d in (always, never))
    close(dense[0], all_sent[0])
    close(dense[1], all_sent[1])
    expected, _ = by_hand(grads["whole"], decay=0.9, side=16, k=256, alpha=0.3)
    np.testing.assert_allclose(dense[0]["whole"], expected, **ROUNDING)


def from_coefficients(**entries):
    """A 4-by-4 matrix with the named coefficients, given as a12=value."""
    y = np.zeros((4, 4))
    for name, value in entries.items():
        y[int(name[1]), int(name[2])] = value
    return cosines(4).T @ y @ cosines(4)


def one_step(tx, *per_worker):
    grads = {"x": np.stack(per_worker)[:, None].astype(np.float32)}
    means, momenta = run(tx, grads)
    return cosines(4) @ means["x"][0] @ cosines(4).T, momenta["x"]


@pytest.mark.parametrize(("mean", "of_one"), [("senders", 1.0), ("workers", 1 / 3)])
def test_a_coefficient_is_averaged_over_the_workers_that_sent_it(mean, of_one):
    tx = scale_by_demo(0.0, axis_name=AXIS, side=4, k=2, mean=mean, phi="identity", dense=never)
    found, momenta = one_step(
        tx,
        from_coefficients(a00=3.0, a12=-6.0, a33=1.0),  # a33 is not among its largest two
        from_coefficients(a00=9.0, a33=5.0),
        from_coefficients(),  # sends two zeros, which are no votes
    )
    of_two = 0.5 if mean == "senders" else 1 / 3
    expected = np.zeros((4, 4))
    expected[0, 0], expected[1, 2], expected[3, 3] = 12 * of_two, -6 * of_one, 5 * of_one
    np.testing.assert_allclose(found, expected, atol=1e-5)  # rounding of numbers below 10
    left = [from_coefficients(a33=1.0), *[np.zeros((4, 4))] * 2]
    np.testing.assert_allclose(momenta, left, atol=1e-5)


def test_what_a_message_left_out_is_sent_later():
    grads = {"x": np.zeros((1, 3, 4, 4), np.float32)}
    grads["x"][0, 0] = from_coefficients(a00=8.0, a11=4.0, a22=2.0)
    tx = scale_by_demo(0.5, axis_name=AXIS, side=4, k=1, phi="identity", dense=never)
    means, _ = run(tx, grads)
    found = cosines(4) @ means["x"] @ cosines(4).T
    expected = np.zeros((3, 4, 4))  # half of the gradient enters; the rest halves every step
    expected[0, 0, 0], expected[1, 1, 1], expected[2, 2, 2] = 4.0, 1.0, 0.25
    np.testing.assert_allclose(found, expected, atol=1e-6)  # rounding


@pytest.mark.parametrize("values", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(), (1,), (64,), (65,), (17, 33), (128, 192), (3, 1, 5), (2, 3, 65, 7)]
)
def test_nothing_is_lost_what_was_sent_and_what_is_left_are_the_momentum(shape, values):
    grads = of_workers(1, 1, shapes={"x": shape})
    tx = scale_by_demo(0.0, axis_name=AXIS, k=8, values=values, phi="identity", dense=never)
    means, momenta = run(tx, grads)
    g, sent, left = grads["x"][0, 0], means["x"][0], momenta["x"][0]
    # One worker's mean is what it sent, rounded as it was: the residual makes up for the rounding.
    np.testing.assert_allclose(sent + left, g, rtol=1e-6, atol=2e-6)
    assert np.linalg.norm(left) <= np.linalg.norm(g) * (1 + 1e-6)
    if values == "bfloat16" and len(shape) == 2:
        exact = one_worker_exact(g)
        assert 1e-4 < np.max(np.abs(sent - exact)) < 2**-6 * np.max(np.abs(g)) * 8


def one_worker_exact(g):
    tx = scale_by_demo(0.0, axis_name=AXIS, k=8, phi="identity", dense=never)
    return run(tx, {"x": g[None, None]})[0]["x"][0]


def test_bfloat16_gradients_have_float32_momenta_and_the_float32_directions():
    grads = of_workers(2, 6, dtype=jnp.bfloat16)
    tx = scale_by_demo(axis_name=AXIS, dense=never, **SMALL)
    signs, momenta = run(tx, grads)
    exact, _ = run(tx, jax.tree.map(lambda g: g.astype(np.float32), grads))
    assert {x.dtype for x in signs.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in momenta.values()} == {jnp.dtype(np.float32)}
    close(signs, exact, rtol=0, atol=0)  # 0 and ±1 are exact in bfloat16


# Substrates.


SETTINGS = {
    "float32": {},
    "bfloat16, k odd": {"values": "bfloat16", "k": 5},
    "identity, all workers": {"phi": "identity", "mean": "workers", "alpha": 0.2},
    "12-bit indices": {"side": 20, "k": 3, "pad": False},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dense", [never, compressed_matrices], ids=["no leaf dense", "some dense"])
def test_a_fleet_and_eight_devices_agree_over_thirty_steps(settings, dense):
    grads = of_workers(8, 30, shapes={"x": (12, 20), "y": (7, 5), "v": (13,)})
    tx = scale_by_demo(axis_name=AXIS, dense=dense, **SMALL | settings)
    fleet, mesh = run(tx, grads), run(tx, grads, mesh=make_mesh({AXIS: 8}))
    # A CPU rounds the transforms of all workers' chunks at once otherwise than those of one's, and
    # may add up what is sent dense in any order. Signs are as clear of that as the seed made them.
    exact = settings.get("phi", "sign") == "sign"
    close(fleet[0], mesh[0], rtol=0, atol=0 if exact else 1e-6)
    close(fleet[1], mesh[1], rtol=0, atol=1e-6)


def test_parameters_on_all_devices_are_the_same_bits_after_many_steps():
    mesh, targets = make_mesh({AXIS: 8}), of_workers(8, 1, shapes={"x": (24, 20), "b": (3,)})
    tx = demo(optax.linear_schedule(0.1, 0.0, 200), axis_name=AXIS, dense=never, **SMALL)
    params = jax.tree.map(lambda t: jnp.zeros(t.shape[2:]), targets)

    def worker(params, target):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda x, t: vary(x, AXIS) - t[0], params, target)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=200)[0][0]

    found = run_workers(worker, axis_name=AXIS, mesh=mesh, in_axes=(None, 0))(params, targets)
    for name, x in found.items():
        copies = [np.asarray(shard.data) for shard in x.addressable_shards]
        assert len(copies) == 8
        assert all(np.array_equal(copies[0], copy) for copy in copies)
        mean = targets[name].mean(axis=(0, 1))
        # They are on the way to the workers' mean, though each only ever sent a few coefficients.
        assert np.mean((copies[0] - mean) ** 2) < 0.2 * np.mean(mean**2)


def problem():
    """A loss, parameters, their layouts and batches: three leaves that a model axis divides."""
    rng = np.random.default_rng(0)
    params = {
        "in": rng.normal(size=(16, 32)).astype(np.float32),
        "out": rng.normal(size=(32, 8)).astype(np.float32),
        "bias": np.zeros(8, np.float32),
    }
    specs = {
        "in": PartitionSpec(None, "model"),
        "out": PartitionSpec("model"),
        "bias": PartitionSpec(),
    }

    def loss(params, batch):
        hidden = jnp.tanh(batch[:, :16] @ params["in"])
        return jnp.mean((hidden @ params["out"] + params["bias"][None] - batch[:, 16:]) ** 2)

    batches = rng.normal(size=(10, 16, 24)).astype(np.float32)
    return loss, params, specs, batches


def train_step(tx, sizes, **options):
    loss, params, specs, batches = problem()
    mesh = None if sizes is None else make_mesh(sizes)
    specs = specs if sizes and "model" in sizes else None
    step = make_train_step(loss, tx, mesh, param_specs=specs, worker_axis=AXIS, **options)
    return step, params, batches


def losses(tx, sizes, **options):
    step, params, batches = train_step(tx, sizes, **options)
    state, seen = step.init(params), []
    for batch in batches:
        state, metrics = step(state, batch)
        seen.append(float(metrics.loss))
    return np.array(seen)


@pytest.mark.parametrize("sizes", [{AXIS: 4}, {AXIS: 4, "model": 2}])
def test_a_train_step_has_the_losses_of_the_fleet_where_shards_are_whole_chunks(sizes):
    tx = demo(1e-3, 0.9, axis_name=AXIS, side=8, k=4, dense=compressed_matrices, phi="identity")
    tx = optax.chain(optax.clip_by_global_norm(0.5), tx)
    fleet = losses(tx, None, workers=4)
    assert fleet[-1] != fleet[0]
    # Sums in another order, through ten steps.
    np.testing.assert_allclose(losses(tx, sizes), fleet, rtol=1e-5)


def closed_form(shapes, *, side, k, values):
    """Bytes of one worker's message, for shapes that all have chunks of side by side."""
    chunks = sum(int(np.prod(shape)) // side**2 for shape in shapes)
    coefficients = chunks * k
    index = coefficients if side**2 <= 256 else 3 * -(-coefficients // 2)  # 8 bits or 12
    nbytes = coefficients * {"float32": 4, "bfloat16": 2}[values] + index
    return -(-nbytes // 128) * 128


@pytest.mark.parametrize("values", ["float32", "bfloat16"])
@pytest.mark.parametrize("side", [8, 32])
def test_one_all_gather_of_the_closed_forms_bytes_and_one_all_reduce_for_dense_leaves(side, values):
    tx = scale_by_demo(axis_name=AXIS, side=side, k=37, values=values, dense=compressed_matrices)
    shapes, mesh = [(64, 96), (3, 32, 64)], make_mesh({AXIS: 8})
    grads = [jnp.zeros((8, *shape)) for shape in (*shapes, (9,))]
    step = run_workers(lambda g: tx.update(g, tx.init(g))[0], axis_name=AXIS, mesh=mesh)
    compiled = jax.jit(step).lower(grads).compile()
    nbytes = closed_form(shapes, side=side, k=37, values=values)
    found = wire.collectives(compiled, mesh)
    assert sorted((c.kind, c.dtype, c.payload, c.times) for c in found) == [
        ("all-gather", "u8", 8 * nbytes, 1),
        ("all-reduce", "f32", 4 * 9, 1),
    ]
    assert wire.bytes_sent(compiled) == 7 * nbytes + 2 * 7 / 8 * 4 * 9


def test_beside_a_model_axis_payloads_cross_between_workers_only():
    tx = demo(1e-3, axis_name=AXIS, side=8, k=4, dense=compressed_matrices)
    step, params, batches = train_step(tx, {AXIS: 4, "model": 2})
    compiled = step.lower(params, batches[0]).compile()
    found = [c for c in wire.collectives(compiled, step.mesh) if "optimizer" in c.op_name]
    gathers = [c for c in found if c.kind == "all-gather"]
    nbytes = closed_form([(16, 16), (16, 8)], side=8, k=4, values="float32")
    assert [(c.axes, c.payload) for c in gathers] == [((AXIS,), 4 * nbytes)]
    others = [c.payload for c in found if c.kind != "all-gather" and c.axes != (AXIS,)]
    assert sum(others) <= 4  # the flag of non-finite numbers


# Hostile input.


def test_without_gradients_nothing_moves_and_nothing_is_nan():
    grads = jax.tree.map(np.zeros_like, of_workers(2, 3))
    for dense in (never, None):
        updates, momenta = run(scale_by_demo(axis_name=AXIS, dense=dense), grads)
        assert not any(x.any() for x in (*updates.values(), *momenta.values()))


@pytest.mark.parametrize(
    ("value", "dense", "mesh"),
    [
        (np.nan, never, False),
        (np.inf, never, True),
        (-np.inf, compressed_matrices, False),
        (np.nan, compressed_matrices, True),
        (np.inf, always, False),
    ],
    ids=["nan, fleet", "inf, mesh", "-inf, fleet", "nan, mesh", "inf dense, fleet"],
)
def test_a_nan_on_one_worker_is_seen_by_all_and_poisons_no_later_step(value, dense, mesh):
    grads = of_workers(4, 4, shapes={"x": (9, 10), "y": (6, 6), "v": (7,)})
    tx = scale_by_demo(axis_name=AXIS, dense=dense, phi="identity", **SMALL)
    on = {"mesh": make_mesh({AXIS: 4}, devices=jax.devices()[:4])} if mesh else {}
    skipped = jax.tree.map(lambda g: np.delete(g, 1, axis=1), grads)
    expected = run(tx, skipped, **on)
    grads["x"][2, 1, 8, 9] = value
    updates, momenta = run(tx, grads, **on)
    for name in grads:
        assert np.isnan(updates[name][1]).all()
        np.testing.assert_array_equal(updates[name][[0, 2, 3]], expected[0][name])
    jax.tree.map(np.testing.assert_array_equal, momenta, expected[1])


def test_a_tree_without_leaves_and_none_leaves_pass():
    tx = scale_by_demo(axis_name=AXIS)
    for tree in ({}, {"a": None, "b": optax.MaskedNode()}):
        step = lambda _, tree=tree: tx.update(tree, tx.init(tree), tree)[0]
        assert run_workers(step, axis_name=AXIS)(jnp.arange(2)) == tree


# The recipe.


def recipe_run(tx, grads, params):
    def worker(own):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, tx.init(params)), own)[1]

    return jax.tree.map(np.asarray, run_workers(worker, axis_name=AXIS)(grads))


def test_weight_decay_is_decoupled_masked_and_looks_at_the_parameters_before_the_step():
    grads = jax.tree.map(np.zeros_like, of_workers(2, 1, shapes={"w": (4, 4), "b": (4,)}))
    params = {"w": jnp.full((4, 4), 3.0), "b": jnp.full((4,), 3.0)}
    tx = demo(0.1, weight_decay=0.5, mask={"w": True, "b": False}, axis_name=AXIS)
    updates = recipe_run(tx, grads, params)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * 3.0, rtol=1e-6)  # one product in float32
    np.testing.assert_array_equal(updates["b"], 0.0)


def test_rate_in_momentum_weighs_gradients_with_the_rate_of_their_step():
    grads = of_workers(2, 4, shapes={"x": (8, 8)})
    rate = lambda count: 0.5 / (1.0 + count)
    recipe = functools.partial(demo, rate, axis_name=AXIS, phi="identity", dense=never, **SMALL)
    params = {"x": jnp.zeros((8, 8))}
    inside = recipe_run(recipe(rate_in_momentum=True), grads, params)["x"]
    outside = recipe_run(recipe(), grads, params)["x"]
    rates = np.array([rate(t) for t in range(4)])[:, None, None]
    # 1 - decay is 0.2; by hand the weight of the gradient is put into the gradient.
    expected, _ = by_hand(grads["x"] * rates[None] / 0.2, **SMALL)
    np.testing.assert_allclose(inside, -rates * expected, **ROUNDING)
    plain, _ = by_hand(grads["x"], **SMALL)
    np.testing.assert_allclose(outside, -rates * plain, **ROUNDING)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"decay must be in \[0, 1\), got 1.0"),
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], got 0"),
        ({"k": 0}, "k must be an int of at least 1, got 0"),
        ({"side": 0}, "side must be an int of at least 1, got 0"),
        ({"values": "float16"}, "values must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"mean": "sum"}, "mean must be one of 'senders', 'workers', got 'sum'"),
        ({"phi": "muon"}, "phi must be one of 'sign', 'identity', got 'muon'"),
        ({"weight_decay": -0.1}, r"weight_decay must be in \[0, inf\), got -0.1"),
        ({"learning_rate": -1.0}, r"learning_rate must be in \[0, inf\), got -1"),
    ],
)
@pytest.mark.parametrize("dense", [None, never])
def test_bad_arguments_are_refused_by_name_value_and_range(arguments, message, dense):
    with pytest.raises(ValueError, match=message):
        demo(**{"learning_rate": 0.1, "axis_name": AXIS, "dense": dense} | arguments)


def test_an_axis_that_is_not_bound_is_refused_with_the_way_to_run_it():
    tx, x = demo(0.1, axis_name=AXIS), jnp.ones((4, 4))
    with pytest.raises(ValueError, match=r"demo communicates over axis_name='worker'.*run_workers"):
        tx.update(x, tx.init(x), x)
    with pytest.raises(TypeError, match=r"real floating-point parameters, got int32 at \['i'\]"):
        tx.init({"f": jnp.ones(2), "i": jnp.ones(2, jnp.int32)})
