"""Layouts of optimizer state: every recipe, optax's wrappers, ZeRO-1, and states made up."""

import math
import re
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_suite.core import tree_bytes
from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import registry
from jaxopt_suite.parallel.meshes import make_mesh
from jaxopt_suite.parallel.specs import check_specs, fsdp_specs, undivided, zero_specs
from jaxopt_suite.parallel.state_specs import state_specs

SIZES = {"data": 2, "fsdp": 2, "model": 2}
SMALL = model.ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=2, d_ff=48)
RECIPES = registry()
# One update of the others takes an axis; test_substrates has theirs.
ALONE = [name for name, recipe in RECIPES.items() if not recipe.communicates]
# Stacks that the devices divide, of few shapes, which compile in less time.
STACKS = {"block_size": 16, "stack_multiple": 8}
HYPERPARAMETERS = {"shampoo": {"refresh_every": 2, **STACKS}, "soap": STACKS}


def transformation(name):
    recipe = RECIPES[name]
    axis = {"axis_name": "worker"} if recipe.communicates else {}
    return recipe.make(1e-2, **axis, **HYPERPARAMETERS.get(name, {}))


def like(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def shardings(specs, mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def layouts(tx, params, specs, mesh, **options):
    """The specs of a state, held to its structure and to what the mesh can carry out."""
    state = jax.eval_shape(tx.init, params)
    found = state_specs(tx, params, specs, mesh, **options)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    check_specs(state, found, mesh)
    return found


def split_model(mesh):
    """Parameters of a small transformer, and a layout with tensor parallelism and FSDP."""
    params = model.abstract_params(SMALL)
    tensor = jax.tree.map(lambda p: P(None, "model") if p.ndim == 2 else P(), params)
    return params, fsdp_specs(params, mesh, specs=tensor)


# The registry.


def random_tree(tree, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), tree)


@pytest.mark.parametrize("name", ALONE)
def test_a_recipe_with_its_state_split_takes_the_steps_it_takes_on_one_device(name):
    mesh, tx = make_mesh(SIZES), transformation(name)
    like_params, specs = split_model(mesh)
    of_params = shardings(specs, mesh)
    of_state = shardings(layouts(tx, like_params, specs, mesh, shard_state_over=("data",)), mesh)
    # float64: factorisations amplify what rounding does to sums that run in another order.
    with jax.enable_x64(True):
        params = random_tree(like_params, 0)
        split = jax.jit(tx.init, out_shardings=of_state)(params)
        whole, placed = jax.jit(tx.init)(params), jax.device_put(params, of_params)
        update = jax.jit(tx.update, out_shardings=(of_params, of_state))
        reference = jax.jit(tx.update)
        for step in (1, 2):  # with and, where a method has such, without a refresh
            grads = random_tree(like_params, step)
            ours, split = update(jax.device_put(grads, of_params), split, placed)
            theirs, whole = reference(grads, whole, params)
            # Sums of thousands of terms, each rounded to 1e-16, in updates of about 1e-2.
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
    for x, sharding in zip(jax.tree.leaves(split), jax.tree.leaves(of_state), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)


@pytest.mark.parametrize("name", RECIPES)
def test_zero_1_leaves_each_device_an_eighth_of_the_state_and_what_does_not_divide(name):
    mesh, tx = make_mesh({"data": 8}), transformation(name)
    params = model.abstract_params(model.PRESETS["tiny"])
    specs = layouts(tx, params, None, mesh, shard_state_over=("data",))
    make = lambda: tx.init(jax.tree.map(lambda p: jnp.zeros(p.shape, p.dtype), params))
    state = jax.jit(make, out_shardings=shardings(specs, mesh))()
    held = dict.fromkeys(jax.devices(), 0)
    for shard in (s for x in jax.tree.leaves(state) for s in x.addressable_shards):
        held[shard.device] += shard.data.nbytes
    whole = undivided(state, specs, mesh, ("data",))
    rest = sum(u.nbytes for u in whole)
    assert max(held.values()) <= 1.02 * (tree_bytes(state) - rest) / 8 + rest
    # Not met by listing everything: what stays whole is counters, coefficients and placeholders.
    assert all(math.prod(u.shape) <= 3 for u in whole)


def test_an_elementwise_update_in_the_layout_of_zero_1_moves_nothing():
    mesh = make_mesh(SIZES)
    params, specs = split_model(mesh)
    zero = zero_specs(params, specs, mesh, ("data",))
    for name in ("adamw", "lion", "grams", "sgd", "schedule_free"):
        tx = RECIPES[name].make(1e-2)
        of_state = shardings(state_specs(tx, params, specs, mesh, shard_state_over=("data",)), mesh)
        of_params = shardings(zero, mesh)
        update = jax.jit(
            tx.update,
            in_shardings=(of_params, of_state, of_params),
            out_shardings=(of_params, of_state),
        )
        text = update.lower(params, jax.eval_shape(tx.init, params), params).compile().as_text()
        collective = r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
        assert not re.search(collective, text), name


# Wrappers. The shapes of the parameters differ, so that a leaf's shape tells whose it is.

PARAMS = {"w": like(8, 12), "b": like(16), "stack": like(4, 8, 6), "scalar": like()}
SPECS = {"w": P("fsdp", "model"), "b": P("model"), "stack": P(None, "fsdp"), "scalar": P()}
BY_SHAPE = {PARAMS[name].shape: SPECS[name] for name in PARAMS}

_adamw = optax.adamw(1e-3)
_matrices = jax.tree.map(lambda p: p.ndim > 1, PARAMS)
_labels = jax.tree.map(lambda p: "m" if p.ndim > 1 else "v", PARAMS)
WRAPPED = {
    "chain": optax.chain(optax.clip_by_global_norm(1.0), _adamw, optax.ema(0.9)),
    "masked": optax.masked(_adamw, _matrices),
    "partition": optax.partition({"m": optax.sgd(0.1, momentum=0.9), "v": _adamw}, _labels),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    "MultiSteps": optax.MultiSteps(_adamw, 4),
    "apply_if_finite": optax.apply_if_finite(_adamw, 3),
    "schedule_free": optax.contrib.schedule_free(optax.rmsprop(1e-3), 1e-3),
    "nested": optax.inject_hyperparams(
        lambda rate: optax.MultiSteps(optax.masked(optax.adam(rate), _matrices), 2)
    )(rate=1e-3),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), _adamw),
    "nothing": optax.identity(),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_below_any_wrapper_a_leaf_of_a_parameters_shape_has_its_spec(name):
    mesh, tx = make_mesh(SIZES), WRAPPED[name]
    found = layouts(tx, PARAMS, SPECS, mesh)
    for leaf, spec in zip(
        jax.tree.leaves(jax.eval_shape(tx.init, PARAMS)), jax.tree.leaves(found), strict=True
    ):
        assert spec == BY_SHAPE.get(leaf.shape, P())


def test_lookahead_hands_its_fast_parameters_to_a_state_that_still_follows_them():
    mesh, tx = make_mesh(SIZES), optax.lookahead(_adamw, 5, 0.5)
    both = lambda tree: optax.LookaheadParams(tree, tree)
    found = layouts(tx, both(PARAMS), both(SPECS), mesh)
    assert found.fast_state[0].mu == SPECS


def test_the_stacked_history_of_lbfgs_follows_its_parameter_behind_the_stack():
    found = layouts(optax.scale_by_lbfgs(memory_size=4), PARAMS, SPECS, make_mesh(SIZES))
    history = {"w": P(None, "fsdp", "model"), "b": P(None, "model"), "scalar": P()}
    assert found.diff_params_memory == {**history, "stack": P(None, None, "fsdp")}


def test_a_parameter_is_found_by_the_longest_path():
    """``w`` at the top and ``a/w`` below it have one shape and two layouts."""
    params, specs = (
        {"w": like(8, 8), "a": {"w": like(8, 8)}},
        {"w": P("data"), "a": {"w": P("model")}},
    )
    assert layouts(_adamw, params, specs, make_mesh(SIZES))[0].mu == specs


# Shapes.


def test_rows_and_columns_of_adafactor_keep_the_entries_of_what_is_left():
    tx = optax.adafactor(1e-3, min_dim_size_to_factor=2, momentum=0.9)
    found = layouts(tx, PARAMS, SPECS, make_mesh(SIZES))[0]
    assert (found.v_row["w"], found.v_col["w"], found.v["w"]) == (P("fsdp"), P("model"), P())
    assert (found.v_row["b"], found.v["b"]) == (P(), P("model"))
    # optax factors the two largest dimensions, 8 and 6: the row is [4, 6], the column [4, 8].
    shapes = jax.eval_shape(tx.init, PARAMS)[0]
    assert {found.v_row["stack"], found.v_col["stack"]} == {P(), P(None, "fsdp")}
    assert {shapes.v_row["stack"].shape, shapes.v_col["stack"].shape} == {(4, 6), (4, 8)}


class Odd(NamedTuple):
    leaves: Any


def keeps(**shapes):
    """A transformation whose state has, for each parameter, zeros of the given shape."""
    zeros = lambda _: Odd({name: jnp.zeros(shape) for name, shape in shapes.items()})
    return optax.GradientTransformation(zeros, lambda updates, state, params=None: (updates, state))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((8, 12), P("fsdp", "model")),
        ((8, 1), P("fsdp")),
        ((1, 12), P(None, "model")),
        ((4, 12), P(None, "model")),  # a projection of the rows
        ((8, 3), P("fsdp")),  # and of the columns
        ((12, 3), P("model")),  # the projection itself
        ((8,), P("fsdp")),
        ((12,), P("model")),
        ((5, 8, 12), P(None, "fsdp", "model")),  # a stack of copies
        ((1,), P()),
        ((), P()),
        ((0, 0), P()),
        ((16, 5, 5), P(("data", "fsdp", "model"))),  # blocks
        ((12, 8, 8), P(("data", "fsdp"))),  # twelve blocks on four devices
        ((5, 5), P()),
    ],
)
def test_a_leaf_of_another_shape_keeps_the_entries_of_the_dimensions_it_has(shape, expected):
    found = layouts(keeps(w=shape), {"w": PARAMS["w"]}, {"w": SPECS["w"]}, make_mesh(SIZES))
    assert found.leaves["w"] == expected


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((8, 4), P("fsdp", "model"), P("fsdp", "model")),  # blocks of 128 in rows of 512
        ((8, 4), P(None, ("fsdp", "model")), P(None, ("fsdp", "model"))),
        ((8, 2), P(None, ("fsdp", "model")), P()),  # a device has half a block
        ((8, 16), P("fsdp", "model"), P("fsdp")),  # 32 entries each: it may be a rank
        ((8, 3), P("fsdp", "model"), P("fsdp")),
        ((8, 1), P("fsdp", "model"), P("fsdp")),
    ],
)
def test_numbers_that_belong_to_blocks_of_a_row_lie_where_the_blocks_do(shape, spec, expected):
    found = layouts(keeps(w=shape), {"w": like(8, 512)}, {"w": spec}, make_mesh(SIZES))
    assert found.leaves["w"] == expected


def test_what_is_left_of_a_square_matrix_takes_the_entry_of_its_own_place():
    square, spec, mesh = {"w": like(8, 8)}, {"w": P("fsdp", "model")}, make_mesh(SIZES)
    expected = {(8, 1): P("fsdp"), (1, 8): P(None, "model"), (8,): P("fsdp"), (8, 4): P("fsdp")}
    expected |= {(4, 8): P(None, "model"), (8, 8, 8): P(None, "fsdp", "model")}
    for shape, wanted in expected.items():
        assert layouts(keeps(w=shape), square, spec, mesh).leaves["w"] == wanted


def test_parameters_that_are_one_array_and_no_tree():
    mesh, tx = (
        make_mesh(SIZES),
        optax.chain(optax.trace(0.9), optax.adafactor(1e-3, min_dim_size_to_factor=2)),
    )
    found = layouts(tx, PARAMS["w"], SPECS["w"], mesh, shard_state_over=("data",))
    assert found[0].trace == P(("data", "fsdp"), "model")
    assert (found[1][0].count, found[1][0].v_row, found[1][0].v) == (P(), P(("data", "fsdp")), P())


class Blocks(NamedTuple):
    """The state of a preconditioner whose blocks, of all parameters, lie in stacks."""

    count: Any
    factors: Any
    roots: Any
    key: Any


def test_stacked_blocks_are_spread_over_all_devices_but_not_over_workers():
    def init(params):
        del params
        return Blocks(
            jnp.int32(0), (jnp.zeros((16, 4, 4)), jnp.zeros((6, 8, 8))), None, jax.random.key(0)
        )

    tx = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    found = layouts(tx, PARAMS, SPECS, make_mesh(SIZES), shard_state_over=("data",))
    assert found == Blocks(P(), (P(("data", "fsdp", "model")), P("data")), None, P())
    mesh = make_mesh({"worker": 2, "data": 2, "model": 2})
    specs = {**SPECS, "w": P(None, "model"), "stack": P()}
    found = layouts(tx, PARAMS, specs, mesh, worker_axis="worker")
    assert found.factors == (P(("data", "model")), P("data"))


def test_a_long_vector_of_all_parameters_is_spread_and_a_short_one_is_not():
    mesh = make_mesh(SIZES)
    for rows, expected in ((2**14, P(("data", "fsdp", "model"))), (8, P())):
        params = {"v": like(rows, 8), "w": like(rows, 8)}
        found = layouts(optax.flatten(optax.trace(0.9)), params, None, mesh)
        assert jax.tree.leaves(found) == [expected]


# ZeRO-1 and arguments.


def test_zero_1_keeps_one_layout_for_everything_of_a_parameters_shape():
    mesh = make_mesh(SIZES)
    zero = zero_specs(PARAMS, SPECS, mesh, ("data",))
    assert zero == {
        "w": P(("data", "fsdp"), "model"),
        "b": P(("data", "model")),
        "stack": P("data", "fsdp"),
        "scalar": P(),
    }
    found = layouts(
        optax.chain(_adamw, optax.ema(0.9)), PARAMS, SPECS, mesh, shard_state_over=("data",)
    )
    assert found[0][0].mu == found[0][0].nu == found[1].ema == zero


def test_zero_1_splits_what_is_left_of_a_parameter_as_the_parameter_or_as_it_can():
    mesh, params = make_mesh({"data": 8}), {"w": like(12, 16)}
    of = lambda *shape: layouts(
        keeps(w=shape), params, None, mesh, shard_state_over=("data",)
    ).leaves["w"]
    assert of(12, 16) == P(None, "data")
    assert of(16) == P("data")
    assert of(12, 1) == P()  # 12 rows do not divide
    assert of(8, 4) == P("data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shard_state_over": ("date",)},
            "no axis 'date' in the mesh worker=2,data=2,fsdp=1,model=2",
        ),
        ({"shard_state_over": ("data", "data")}, "'data' comes twice"),
        ({"shard_state_over": ("worker",), "worker_axis": "worker"}, "the worker axis 'worker'"),
        ({"worker_axis": "model"}, r"\['b'\].*'model' is the worker axis"),
    ],
)
def test_axes_that_make_no_sense_are_refused(options, message):
    mesh = make_mesh({"worker": 2, "data": 2, "fsdp": 1, "model": 2})
    with pytest.raises(ValueError, match=message):
        state_specs(_adamw, PARAMS, SPECS, mesh, **options)


@pytest.mark.parametrize("name", ["adam_snsm", "muon", "adafactor"])
def test_parameters_that_lie_on_an_explicit_mesh_get_the_same_specs(name):
    tx, found = RECIPES[name].make(1e-2), []
    for axis_types in (AxisType.Auto, AxisType.Explicit):
        mesh = make_mesh(SIZES, axis_types=axis_types)
        params, specs = split_model(mesh)
        params = jax.tree.map(
            lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s),
            params,
            shardings(specs, mesh),
        )
        found.append(state_specs(tx, params, specs, mesh, shard_state_over=("data",)))
    assert found[0] == found[1]


# Hostile trees.

_shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16]), max_size=4).map(tuple)
_axes = st.sampled_from(
    [None, "data", "fsdp", "model", ("data", "model"), ("data", "fsdp", "model")]
)


def _legal(shape, entries, mesh):
    """``entries`` without those that the mesh cannot carry out."""
    kept, used = [], set()
    for size, axes in zip(shape, entries, strict=False):
        names = {axes} if isinstance(axes, str) else set(axes or ())
        fits = not names & used and size % math.prod(mesh.shape[a] for a in names) == 0
        kept.append(axes if fits else None)
        used |= names if fits else set()
    return P(*kept)


@hypothesis.given(
    st.dictionaries(
        st.sampled_from("abc"), st.tuples(_shapes, st.lists(_axes, max_size=4)), min_size=1
    ),
    st.dictionaries(st.sampled_from("abcd"), _shapes),
    st.sampled_from([(), ("data",), ("data", "fsdp")]),
)
def test_no_state_whatever_its_shapes_gets_a_spec_that_is_not_legal(params, state, over):
    mesh = make_mesh(SIZES)
    shapes = {name: like(*shape) for name, (shape, _) in params.items()}
    specs = {name: _legal(shape, entries, mesh) for name, (shape, entries) in params.items()}
    layouts(keeps(**state), shapes, specs, mesh, shard_state_over=over)
