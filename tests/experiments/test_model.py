"""The transformer against a plain NumPy one, its gradients, its sizes and its parameter tree."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxopt_suite.experiments import model
from jaxopt_suite.experiments.model import PRESETS, ModelConfig
from jaxopt_suite.parallel.meshes import make_mesh

_SMALL = ModelConfig(d_model=32, n_layers=2, n_heads=2, d_ff=48, vocab_size=17)


def _tokens(batch: int, length: int, vocab_size: int = 17) -> jax.Array:
    drawn = np.random.default_rng(0).integers(0, vocab_size, (batch, length))
    return jnp.asarray(drawn, jnp.int32)


@functools.cache
def _sharpened():
    """A small model whose logits are of order one, so that a wrong one cannot hide near zero."""
    graphdef, params = model.build(_SMALL, seed=1)
    scale = lambda path, x: x * (2.0 if "head" in jax.tree_util.keystr(path) else 1.0)
    return graphdef, jax.tree_util.tree_map_with_path(scale, params)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, tokens):
    return model.nnx.merge(graphdef, params)(tokens)


_loss = jax.jit(model.loss_fn, static_argnums=0)


# --- a second, slow definition in NumPy float64, one sequence and one head at a time


def _numpy_norm(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def _numpy_turn(x):
    """Rotary positions as complex numbers: the pair (i, i + k/2) turned by position * frequency."""
    half = x.shape[-1] // 2
    frequency = 10_000.0 ** (-np.arange(half) / half)
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.outer(np.arange(len(x)), frequency))
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _numpy_attention(x, p, head_size):
    out = np.zeros_like(x)
    for first in range(0, x.shape[1], head_size):
        head = slice(first, first + head_size)
        q, k = _numpy_turn(x @ p["query"][:, head]), _numpy_turn(x @ p["key"][:, head])
        for t in range(len(x)):
            weight = np.exp(k[: t + 1] @ q[t] / math.sqrt(head_size))
            out[t, head] = weight / weight.sum() @ (x[: t + 1] @ p["value"][:, head])
    return out @ p["output"]


def _numpy_logits(params, tokens, config):
    x = params["embedding"][tokens]
    for i in range(config.n_layers):
        p = params["blocks"][str(i)]
        normed = _numpy_norm(x, p["attention_norm"]["scale"])
        x = x + _numpy_attention(normed, p["attention"], config.head_size)
        normed = _numpy_norm(x, p["mlp_norm"]["scale"])
        gate = normed @ p["mlp"]["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (normed @ p["mlp"]["up"])) @ p["mlp"]["down"]
    return _numpy_norm(x, params["final_norm"]["scale"]) @ params["head"]


def _numpy(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# --- what it computes


def test_logits_and_loss_equal_a_plain_numpy_transformer():
    graphdef, params = _sharpened()
    noise = np.random.default_rng(1)
    # Norm scales start at one, where a missing one would not show.
    params = jax.tree.map(lambda x: x * noise.uniform(0.5, 1.5, x.shape).astype(np.float32), params)
    tokens = _tokens(2, 12)
    expected = np.stack([_numpy_logits(_numpy(params), row, _SMALL) for row in tokens[:, :-1]])
    got = _logits(graphdef, params, tokens[:, :-1])
    assert got.dtype == jnp.float32
    assert expected.std() > 0.3
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)  # f32 sums of 48 terms, values ~1

    log_total = np.log(np.exp(expected).sum(-1))
    chosen = np.take_along_axis(expected, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    loss = _loss(graphdef, params, tokens)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)
    np.testing.assert_allclose(loss, (log_total - chosen).mean(), rtol=1e-5)  # as above, averaged


def test_rms_norm_by_hand():
    norm = model.RMSNorm(2, eps=0.0)
    norm.scale[...] = jnp.asarray([1.0, 10.0])
    got = norm(jnp.asarray([[[3.0, 4.0], [-1.0, 7.0]]]))  # mean squares 12.5 and 25
    expected = [[[3 / math.sqrt(12.5), 40 / math.sqrt(12.5)], [-1 / 5, 70 / 5]]]
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # one float32 rsqrt and two products


def test_a_later_token_never_changes_an_earlier_logit():
    graphdef, params = _sharpened()
    tokens = _tokens(2, 10)
    for position in (0, 4, 9):
        changed = tokens.at[:, position].set((tokens[:, position] + 1) % 17)
        difference = _logits(graphdef, params, tokens) - _logits(graphdef, params, changed)
        assert not difference[:, :position].any()
        assert (jnp.abs(difference[:, position:]).max(axis=-1) > 1e-6).all()


def test_rotary_scores_depend_on_the_distance_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    tables = model.rotary_tables(20, 8)
    turn = lambda x: model.rotate(jnp.broadcast_to(x, (1, 1, 20, 8)), tables)[0, 0]
    scores = turn(query) @ turn(key).T
    for distance in (-3, 0, 7):
        line = jnp.diagonal(scores, distance)
        np.testing.assert_allclose(line, line[0], rtol=0, atol=1e-5)  # cos and sin in float32
    assert jnp.abs(scores[0, 0] - scores[0, 7]) > 0.1


def test_bfloat16_computes_near_float32_and_keeps_parameters_and_logits_float32():
    _, params = _sharpened()
    graphdef, own = model.build(_SMALL, seed=1, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(own)} == {jnp.dtype(jnp.float32)}
    tokens = _tokens(2, 12)
    wide, narrow = _logits(_sharpened()[0], params, tokens), _logits(graphdef, params, tokens)
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, wide, rtol=0, atol=0.1)  # 8 bits, some ten roundings
    assert (narrow != wide).any()


def test_the_gradient_of_every_leaf_predicts_how_the_loss_changes():
    graphdef, params = _sharpened()
    loss = functools.partial(_loss, graphdef, tokens=_tokens(2, 12))
    leaves, treedef = jax.tree.flatten(params)
    for i, gradient in enumerate(jax.tree.leaves(jax.jit(jax.grad(loss))(params))):
        slope = float(jnp.vdot(gradient, gradient))
        step = 5e-3 / math.sqrt(slope) * min(1.0, math.sqrt(slope) * 40)
        moved = [
            loss(treedef.unflatten([*leaves[:i], leaves[i] + s * gradient, *leaves[i + 1 :]]))
            for s in (step, -step)
        ]
        measured = float(moved[0] - moved[1]) / (2 * step)
        # Rounding of a float32 loss near 3 against a change of at least 1e-4; curvature is smaller.
        assert measured == pytest.approx(slope, rel=0.02), i


def test_thirty_adam_steps_learn_one_batch():
    graphdef, params = model.build(_SMALL, seed=0)
    tx, tokens = optax.adam(2e-2), _tokens(2, 17)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(lambda p: model.loss_fn(graphdef, p, tokens))(params)
        updates, state = tx.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for _ in range(30):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(math.log(17), abs=0.5)  # logits start small
    assert losses[-1] < 0.1 * losses[0]


# --- how it is computed: in a loop, anew in the backward pass, on a mesh


def _value_and_grad_in_float64(**options):
    with jax.enable_x64(True):
        graphdef, params = model.build(_SMALL, seed=1, dtype=jnp.float64, **options)
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        loss = functools.partial(model.loss_fn, graphdef, tokens=_tokens(2, 12))
        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(loss))(wide))


@pytest.mark.parametrize(
    "options",
    [{"scan_layers": True}, {"remat": True}, {"scan_layers": True, "remat": True}],
    ids=str,
)
def test_a_loop_over_layers_and_recomputation_change_nothing(options):
    (loss, grads), (expected, expected_grads) = (
        _value_and_grad_in_float64(**chosen) for chosen in (options, {})
    )
    assert loss.dtype == np.float64
    # Float64 in another fusion: a loss near 3, gradients of at most 0.5.
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
    jax.tree.map(close, grads, expected_grads)


@pytest.mark.slow
def test_a_loop_compiles_one_layer_and_recomputation_keeps_less_for_the_backward_pass():
    deep = dataclasses.replace(_SMALL, n_layers=4)

    def compiled(**options):
        graphdef, params = model.build(deep, seed=0, **options)
        grad = jax.jit(jax.grad(functools.partial(model.loss_fn, graphdef)))
        return grad.lower(params, _tokens(8, 65)).compile()

    plain, loop, anew = (
        compiled(),
        compiled(scan_layers=True),
        compiled(scan_layers=True, remat=True),
    )
    assert loop.as_text().count(" dot(") < plain.as_text().count(" dot(") / 2
    temporary = lambda program: program.memory_analysis().temp_size_in_bytes
    assert temporary(anew) < 0.6 * temporary(loop)


def test_matrices_are_split_by_columns_then_by_rows_and_over_fsdp_besides():
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    specs = model.param_specs(_SMALL, mesh)
    block = specs["blocks"]["0"]
    assert block["attention"]["query"] == PartitionSpec("fsdp", "model")
    assert block["attention"]["output"] == PartitionSpec("model", "fsdp")
    assert block["mlp"]["down"] == PartitionSpec("model", "fsdp")
    assert "model" not in jax.tree.leaves(tuple(specs["head"]))
    whole = model.param_specs(_SMALL, make_mesh({"data": 8}))
    assert set(jax.tree.leaves(whole)) == {PartitionSpec()}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"model": 4}, "mesh axis 'model' of size 4 must divide n_heads = 2"),
        ({"data": 4, "model": 2}, "mesh axis 'model' of size 2 must divide d_ff = 49"),
    ],
)
def test_a_model_axis_that_does_not_divide_heads_or_width_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        model.param_specs(dataclasses.replace(_SMALL, d_ff=49), make_mesh(sizes))


# --- sizes, initial values, the tree


@pytest.mark.parametrize(
    ("name", "millions"),
    [("nano", 0.27), ("tiny", 1.0), ("small", 10.0), ("125m", 125.0), ("1b", 1000.0)],
)
def test_presets_have_the_parameters_their_names_say(name, millions):
    assert model.n_params(PRESETS[name]) == pytest.approx(millions * 1e6, rel=0.1)
    d, n, f = PRESETS[name].d_model, PRESETS[name].n_layers, PRESETS[name].d_ff
    assert model.n_params(PRESETS[name]) == n * (4 * d * d + 3 * d * f + 2 * d) + d + 2 * 256 * d
    assert f % 32 == 0
    assert f == pytest.approx(8 / 3 * d, abs=16)


def test_abstract_parameters_are_the_shapes_of_built_ones():
    _, params = model.build(PRESETS["nano"], seed=0)
    abstract = model.abstract_params(PRESETS["nano"])
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(abstract))
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(abstract) == shapes(params)
    assert model.n_params(PRESETS["nano"]) == sum(x.size for x in jax.tree.leaves(params))


def test_parameters_are_nested_dicts_of_strings_with_a_leaf_for_each_matrix():
    _, params = model.build(_SMALL, seed=0)
    paths = {
        tuple(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert all(isinstance(name, str) for path in paths for name in path)
    assert paths["blocks", "0", "attention", "query"] == (32, 32)
    assert paths["blocks", "1", "mlp", "down"] == (48, 32)
    assert paths["head",] == (32, 17)
    assert len(paths) == 2 * 9 + 3


def test_initial_parameters_have_the_stated_scale_and_first_loss_is_log_of_256():
    graphdef, params = model.build(PRESETS["nano"], seed=0)
    block = params["blocks"]["0"]
    spread = lambda x: pytest.approx(float(jnp.std(x)), rel=0.05)  # 9,216 draws or more: 1 % noise
    assert spread(block["attention"]["query"]) == 96**-0.5
    assert spread(block["attention"]["output"]) == 96**-0.5 / 2  # two layers
    assert spread(block["mlp"]["down"]) == 256**-0.5 / 2
    assert spread(params["embedding"]) == 96**-0.5
    assert spread(params["head"]) == 96**-0.5 / 2
    loss = _loss(graphdef, params, _tokens(4, 33, vocab_size=256))
    # Logits of deviation 1/2 add 1/8; a mean of 128 of them is off by 0.5 / sqrt(128) = 0.04.
    assert float(loss) == pytest.approx(math.log(256) + 1 / 8, abs=0.12)


def test_the_seed_decides_the_parameters_and_not_the_program():
    (first, one), (again, same), (other, two) = (model.build(_SMALL, seed=s) for s in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one["head"] != two["head"]).any()
    assert first == again == other
    assert hash(first) == hash(other)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"d_model": 0}, "d_model must be an int of at least 1, got 0"),
        ({"n_heads": 3}, "multiple of 2 \\* n_heads = 6 .*, got 32"),
        ({"n_heads": 32}, "multiple of 2 \\* n_heads = 64 .*, got 32"),
    ],
)
def test_impossible_sizes_are_refused(bad, message):
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 48}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(sizes | bad))
