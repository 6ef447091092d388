"""The registry: formulas against the arrays they speak of, and what a recipe refuses."""

import inspect
import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxopt_suite import core, optimizers
from jaxopt_suite.testing.workers import as_only_worker

RECIPES = optimizers.registry()
SHAPES = [(200, 130), (130, 200), (150, 150)]


def make(recipe, rate=0.1, **hyperparameters):
    axis = {"axis_name": "worker"} if recipe.communicates else {}
    return recipe.make(rate, **axis, **hyperparameters)


def bytes_of(recipe, m, n, **hyperparameters):
    if recipe.state_bytes is None:
        return 4 * recipe.state_elements(m, n, **hyperparameters)
    return recipe.state_bytes(m, n, **hyperparameters)


def stored(recipe, m, n, **hyperparameters):
    """Array elements and bytes of the state for one matrix, counters of one element left out."""
    like = {"w": jax.ShapeDtypeStruct((m, n), jnp.float32)}
    state = jax.eval_shape(make(recipe, **hyperparameters).init, like)
    leaves = [x for x in jax.tree.leaves(state) if x.shape]
    counters = [x for x in jax.tree.leaves(state) if not x.shape]
    return sum(math.prod(x.shape) for x in leaves), core.tree_bytes(leaves), counters


@pytest.mark.parametrize("name", RECIPES)
def test_state_is_exactly_what_the_formula_says(name):
    recipe = RECIPES[name]
    for m, n in SHAPES:
        elements, size, _ = stored(recipe, m, n)
        assert elements == recipe.state_elements(m, n, **recipe.hyperparameters())
        assert size == bytes_of(recipe, m, n, **recipe.hyperparameters())


@pytest.mark.parametrize(
    ("name", "hyperparameters"),
    [
        ("adam_sn", {"subset": "sqrt"}),
        ("adam_sn", {"subset": 7}),
        ("rmsprop_sn", {"subset": -3}),
        ("adagrad_sn", {"b1": 0.9}),
        ("adam_snsm", {"projection": "top_rows", "rank": 140}),
        ("adam_snsm", {"projection": "uniform_rows", "subset": 10}),
        ("adam_snsm", {"projection": "approx_svd", "rank": 1000}),
        ("adamw_8bit", {"block": 64}),
        ("adamw_8bit", {"min_size": 150 * 150 + 1}),  # one of the three is too small
        ("powersgd", {"rank": 1}),
        ("powersgd", {"rank": 30, "warmup_steps": 10}),
        ("shampoo", {"block_size": 64}),
        ("shampoo", {"b1": 0.0, "graft": "none", "stack_multiple": 8}),
        ("shampoo", {"block_size": 100, "momentum": 0.9, "graft": "sgd"}),
        ("soap", {"block_size": 64, "stack_multiple": 8}),
        ("soap", {"one_sided": True}),
        ("soap", {"merge_dims": True, "block_size": 30_000}),
        ("soap", {"merge_dims": True, "block_size": 130 * 200, "rotate_vectors": True}),
    ],
)
def test_formulas_follow_the_hyperparameters(name, hyperparameters):
    recipe = RECIPES[name]
    for m, n in SHAPES:
        elements, size, _ = stored(recipe, m, n, **hyperparameters)
        changed = recipe.hyperparameters() | hyperparameters
        assert elements == recipe.state_elements(m, n, **changed)
        assert size == bytes_of(recipe, m, n, **changed)


def test_the_published_example_of_512_by_1376_at_rank_128():
    expected = {"grams": 1_409_024, "adam_sn": 705_888, "rmsprop_sn": 1_376, "adam_snsm": 243_040}
    for name, elements in expected.items():
        rank = {"rank": 128} if name == "adam_snsm" else {}
        assert stored(RECIPES[name], 512, 1376, **rank)[0] == elements
    rows = stored(RECIPES["adam_snsm"], 512, 1376, rank=128, projection="top_rows")
    assert rows[0] == 67_040


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if not r.peer])
def test_the_formula_in_words_is_the_formula_in_code(name):
    recipe = RECIPES[name]
    m, n = 200, 130
    rank = recipe.hyperparameters().get("rank")
    names = {"m": m, "n": n, "a": min(m, n), "b": max(m, n), "r": rank}
    formula = recipe.state_formula.removesuffix(" (one block)").replace("²", "**2")
    in_bytes, formula = formula.endswith(" bytes"), formula.removesuffix(" bytes")
    formula = re.sub("⌈(.*)/(.*)⌉", r"*-(-\1//\2)", formula)  # the least integer above
    product = re.sub(r"(?<=[0-9a-z])(?=[a-z])", "*", formula)
    expected = bytes_of(recipe, m, n, **recipe.hyperparameters())
    assert eval(product, {}, names) * (1 if in_bytes else 4) == expected


def test_our_counters_are_int32_scalars_beside_flags():
    numbers = {"eager_diloco": 1, "co2": 1}  # the weight of a round; the length of a step
    for name, recipe in RECIPES.items():
        if not recipe.peer:
            counters = stored(recipe, 6, 4)[2]
            assert counters, name
            flags = [c for c in counters if c.dtype == bool]
            floats = [c for c in counters if c.dtype == jnp.float32]
            assert len(floats) == numbers.get(name, 0), name
            counts = [c for c in counters if c.dtype == jnp.int32]
            assert len(counts) == len(counters) - len(flags) - len(floats) > 0, name


def test_names_rates_and_papers_are_in_order():
    ours = [n for n, r in RECIPES.items() if not r.peer]
    peers = [n for n, r in RECIPES.items() if r.peer]
    alone = ["grams", "adam_sn", "rmsprop_sn", "adagrad_sn", "adam_snsm", "shampoo", "soap"]
    alone += ["adamw_8bit"]
    together = ["adamw_int8", "onebit_adam", "powersgd", "terngrad", "demo"]
    apart = ["diloco", "streaming_diloco", "local_adamw", "eager_diloco", "co2", "savic"]
    assert ours == alone + together + apart
    assert peers == ["adamw", "lion", "adafactor", "muon", "sgd", "schedule_free", "galore"]
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.learning_rate > 0
        assert recipe.schedule in ("cosine", "constant")
        assert recipe.communicates == (name in together + apart)
        assert recipe.apart == (name in apart)
        assert (recipe.wire == "nothing") == (not recipe.communicates)
        assert recipe.paper.title
        assert 2010 < recipe.paper.year < 2030
        assert re.fullmatch(r"(\d{4}\.\d{5}|)", recipe.paper.arxiv) or recipe.paper.arxiv < "1501"


def test_hyperparameters_are_those_of_the_factory_with_the_tuned_defaults():
    recipe = RECIPES["adam_snsm"]
    legal = recipe.hyperparameters()
    parameters = set(inspect.signature(recipe.factory).parameters)
    assert set(legal) == parameters - {"learning_rate"}
    assert legal["rank"] == recipe.defaults["rank"] != 128
    assert "learning_rate" not in legal


def test_an_unknown_hyperparameter_is_refused_with_the_legal_ones():
    with pytest.raises(
        ValueError, match=r"grams has no hyperparameter 'beta2'; it has: b1, b2, eps"
    ):
        RECIPES["grams"].make(0.1, beta2=0.95)


@pytest.mark.parametrize("name", [n for n, r in RECIPES.items() if r.communicates])
def test_a_recipe_that_communicates_asks_for_the_name_of_its_axis(name):
    recipe = RECIPES[name]
    assert "axis_name" not in recipe.hyperparameters()
    with pytest.raises(ValueError, match=rf"{name} communicates .* axis_name, .*make_train_step"):
        recipe.make(0.1)
    params = {"w": jnp.ones((40, 40))}
    tx = recipe.make(0.1, axis_name="island")
    with pytest.raises(ValueError, match="axis_name='island', which is not bound"):
        tx.update(params, tx.init(params), params)


def test_a_recipe_that_does_not_communicate_refuses_an_axis():
    with pytest.raises(ValueError, match="adamw does not communicate, got axis_name='worker'"):
        RECIPES["adamw"].make(0.1, axis_name="worker")


def test_a_recipe_follows_a_schedule():
    params = {"w": jnp.ones((3, 2))}
    for name, recipe in RECIPES.items():
        if name == "schedule_free":  # takes a schedule, but its first step has weight zero there
            continue
        rate = lambda count: jnp.where(count == 0, 0.0, 0.1)
        tx = make(recipe, rate)
        if recipe.communicates:
            tx = as_only_worker(lambda tx=tx: tx, "worker")()
        state = tx.init(params)
        first, state = tx.update(params, state, params)
        second, _ = tx.update(params, state, params)
        assert not jnp.any(first["w"]), name
        assert jnp.all(second["w"] != 0), name
