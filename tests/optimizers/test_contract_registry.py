"""Every recipe of the registry keeps the contract; what a peer does otherwise is listed, with why.

The tables are strict: a point that starts to fail, or one that is listed and holds, fails the test.
"""

import functools
from collections.abc import Iterable
from typing import Any

import pytest

from jaxopt_suite import optimizers, testing
from jaxopt_suite.optimizers import roots

# Small enough that a 3-by-4 matrix is projected, factored and refreshed within three steps.
SMALL = {"rank": 2, "refresh_every": 2, "update_proj_gap": 2, "min_dim_size_to_factor": 2}

# Of those that communicate: every leaf is compressed, and the second of three steps already so.
COMPRESSED = {"dense": lambda path, leaf: False, "warmup_steps": 1}

# Of those with an outer loop: the second of three steps ends in a synchronisation.
SYNCHRONISED = {"sync_every": 2, "delay": 0}

# The same loop as another recipe, which runs always.
VARIANTS = ("streaming_diloco", "local_adamw", "eager_diloco", "co2", "savic")
AXIS = "worker"

OPTIONS: dict[str, dict[str, Any]] = {
    # Statistics of three gradients are singular, and float32 roots of them are made of rounding:
    # damped by 1e-6, two programs differ by a percent; by 1e-2, by no more than other methods.
    "shampoo": {"damping": roots.Relative(1e-2)},
    "adamw_8bit": {"min_size": 0},  # small leaves would be kept in float32
}

# A program with roots or bases takes seconds to compile, and so does one that compresses leaf by
# leaf. Of these the suite checks the points that share one, or need none; all of them are for
# `make exhaustive`. PowerSGD, DeMo and DiLoCo stand for those that communicate.
COSTLY = ("shampoo", "soap", "adamw_8bit", "onebit_adam", "terngrad", "adamw_int8")
CHEAP = (
    "accepts_abstract_params",
    "compiles_once",
    "counters_saturate",
    "factorisations_are_batched",
    "finite_on_zero_gradients",
    "follows_mu_dtype",
    "inject_hyperparams",
    "keeps_dtypes",
    "keeps_shapes",
    "keeps_tree",
    "moments_in_float32",
    "refuses_bad_arguments",
    "refuses_bad_learning_rate",
    "refuses_integer_leaves",
    "runs_on_every_tree",
    "state_is_arrays",
    "state_keeps_its_form",
    "survives_float16_extremes",
    "survives_huge_gradients",
    "survives_tiny_gradients",
)

BAD: dict[str, list[dict[str, Any]]] = {
    "grams": [{"b1": 1.5}, {"b2": -0.1}, {"eps": -1.0}, {"weight_decay": -0.5}],
    "adam_sn": [{"b1": 1.5}, {"b2": 1.5}, {"eps": -1.0}, {"subset": "columns"}],
    "rmsprop_sn": [{"eps": -1.0}, {"subset": "columns"}],
    "adagrad_sn": [{"eps": -1.0}, {"subset": "columns"}],
    "adam_snsm": [{"rank": 0}, {"refresh_every": 0}, {"projection": "qr"}, {"b1": 1.5}],
    "adamw_8bit": [
        {"b1": 1.5},
        {"eps": -1.0},
        {"block": 0},
        {"min_size": -1},
        {"impl": "cuda"},
        {"weight_decay": -0.5},
    ],
    "adamw_int8": [{"b1": 1.5}, {"eps": -1.0}, {"quantiser": "int4"}, {"weight_decay": -0.5}],
    "onebit_adam": [
        {"b1": 1.5},
        {"eps": -1.0},
        {"warmup_steps": 0},
        {"variance_ratio": 0.0},
        {"variance_interval": 10},
        {"variance_floor": -1.0},
    ],
    "powersgd": [{"rank": 0}, {"momentum": 1.0}, {"form": "nag"}, {"warmup_steps": -1}],
    "terngrad": [{"b1": 1.5}, {"eps": -1.0}, {"clip": 0.0}],
    "diloco": [
        {"b1": 1.5},
        {"eps": -1.0},
        {"weight_decay": -0.5},
        {"sync_every": 0},
        {"outer_learning_rate": -1.0},
        {"outer_momentum": 1.0},
        {"mean": "int2"},
        {"rejoin": "copy"},
    ],
    "streaming_diloco": [{"fragments": 0}, {"delay": 50}, {"mixing": 1.5}, {"order": "random"}],
    "local_adamw": [{"sync_every": 0}],
    "eager_diloco": [{"outer_learning_rate": -1.0}, {"outer_momentum": 1.0}, {"mean": "int2"}],
    "co2": [{"outer_momentum": 1.0}, {"clip": 0.0}, {"mean": "int2"}],
    "savic": [{"b2": 1.0}, {"floor": 0.0}, {"rule": "adagrad"}, {"scaling": "none"}],
    "shampoo": [
        {"b1": 1.5},
        {"block_size": 0},
        {"refresh_every": 0},
        {"graft": "lion"},
        {"solver": "svd"},
        {"exponent": 1.5},
    ],
    "soap": [{"b2": 1.5}, {"eps": -1.0}, {"method": "svd"}, {"first_step": "none"}],
    "demo": [{"decay": 1.0}, {"k": 0}, {"alpha": 0.0}, {"mean": "all"}, {"weight_decay": -0.5}],
}

_UNCHECKED = {
    "refuses_bad_learning_rate": "optax checks no learning rate at construction",
    "refuses_integer_leaves": "optax checks no dtypes at init",
}
_OPTAX = _UNCHECKED | {"moments_in_float32": "moments take the parameters' dtype"}
_EPS = {
    "finite_on_zero_gradients": "eps=1e-8 is zero in float16: 0 / 0",
    "survives_float16_extremes": "eps=1e-8 is zero in float16, and squares leave its range",
}
_PRODUCTS = {"products_are_batched": "a product or more per leaf, nothing is stacked"}

_STACKS = {"map_params": "optax maps parameter-shaped leaves; the state is stacks of blocks"}
_SKIPS = "takes no step with its first gradient, by which this point judges"

KNOWN: dict[str, dict[str, str]] = {
    "shampoo": _STACKS,
    "soap": _STACKS
    | {
        "points_downhill": _SKIPS,
        "injected_rate_is_used": _SKIPS,
        "follows_schedules": _SKIPS,
    },
    "adam_snsm": {
        "products_are_batched": "one product each way per leaf: stacking is slower (docs/design.md)"
    },
    "onebit_adam": {
        "survives_float16_extremes": "frozen at 1e-7, the second moment makes a gradient of 1 huge"
    },
    "streaming_diloco": {
        "map_params": "fragments follow from the parameters, in whose place optax puts one object",
        "weight_decay_is_decoupled": "with a fragment a step, the first is synchronised already",
    },
    "co2": {
        "follows_schedules": "the first synchronisation leads back to the start, whatever the rate"
    },
    "adamw": _OPTAX | _EPS,
    "lion": _OPTAX,
    "sgd": _OPTAX,
    "adafactor": _OPTAX
    | {
        "counters_saturate": "count + 1 inside the decay rate overflows int32",
        "finite_on_zero_gradients": "eps=1e-30 is zero in float16: 0 / 0",
        "survives_float16_extremes": "squares of 1e-7 are zero in float16",
        "survives_huge_gradients": "the factored mean of an infinite square is inf / inf",
    },
    "muon": _OPTAX | _EPS | _PRODUCTS,
    "schedule_free": _OPTAX | _EPS,
    "galore": _OPTAX
    | _EPS
    | _PRODUCTS
    | {
        "runs_on_every_tree": "a tree without leaves cannot be unflattened",
        "factorisations_are_batched": "one SVD per leaf",
    },
}

# Relative to a leaf's largest entry, where rounding is amplified beyond the checker's 1e-5.
RTOL = {
    "schedule_free": 1e-4,  # an update of 1e-2 is the difference of two iterates of size 1
}


def report_of(name: str, points: Iterable[str]) -> testing.ContractReport:
    recipe = optimizers.registry()[name]
    options = SMALL | COMPRESSED | SYNCHRONISED if recipe.communicates else SMALL
    small = {key: options[key] for key in recipe.hyperparameters() if key in options}
    axis = {"axis_name": AXIS} if recipe.communicates else {}
    # recipe.make hides the signature behind **hyperparameters; this is what it calls.
    make_tx = functools.partial(
        recipe.factory, **{**axis, **recipe.defaults, **small, **OPTIONS.get(name, {})}
    )
    return testing.check_transformation(
        make_tx,
        bad_arguments=BAD.get(name, []),
        axis_name=axis.get("axis_name"),
        checks=points,
        rtol=RTOL.get(name, 1e-5),
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=getattr(pytest.mark, "exhaustive" if rare else "slow"))
        for name, recipe in optimizers.registry().items()
        for rare in [recipe.peer or name in COSTLY + VARIANTS]
    ],
)
def test_every_recipe_keeps_the_contract_but_for_what_is_listed(name: str) -> None:
    report = report_of(name, testing.contract_points())
    known = KNOWN.get(name, {})
    assert not set(known) - set(report.failed), f"stale entries in KNOWN: {name} keeps these now"
    new = set(report.failed) - set(known)
    assert not new, "\n".join(str(report[point]) for point in sorted(new))


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTLY)
def test_a_recipe_that_compiles_slowly_keeps_the_cheap_points(name: str) -> None:
    report_of(name, [p for p in CHEAP if p not in KNOWN.get(name, {})]).raise_if_failed()


def test_the_tables_name_recipes_and_points_that_exist() -> None:
    names = set(optimizers.registry())
    assert set(KNOWN) | set(BAD) | set(RTOL) | set(OPTIONS) | set(COSTLY) <= names
    points = set().union(*(set(known) for known in KNOWN.values()))
    assert points | set(CHEAP) <= set(testing.contract_points())
    ours = {name for name, recipe in optimizers.registry().items() if not recipe.peer}
    assert set(BAD) == ours, "every recipe of ours says which arguments it must refuse"
