"""``--diloco-workers``: any optimizer inside of DiLoCo, and what a round of it sends."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxopt_suite.core import tree_bytes
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import assembly, model
from jaxopt_suite.experiments.config import CompareConfig, TrainConfig
from jaxopt_suite.experiments.entries import entries
from jaxopt_suite.experiments.outer_loop import with_outer_loop
from jaxopt_suite.experiments.steps import build_program
from jaxopt_suite.optimizers.registry import registry
from jaxopt_suite.parallel.meshes import format_mesh

COMMON = {"optimizer": "adamw", "batch_size": 8, "seq_len": 12, "clip": None}


@pytest.fixture(scope="module", autouse=True)
def a_preset_of_a_few_thousand_parameters():
    with pytest.MonkeyPatch.context() as patch:
        small = {"nano": model.ModelConfig(d_model=16, n_layers=1, n_heads=2, d_ff=32)}
        patch.setattr(model, "PRESETS", model.PRESETS | small)
        yield


def build(**options):
    return build_program(TrainConfig(**{**COMMON, **options}))


def losses(program, steps=4):
    state, seen = program.initial(0), []
    rng = np.random.default_rng(0)
    for _ in range(steps):
        state, metrics = program.step(state, rng.integers(0, 256, (8, 13), dtype=np.int32))
        seen.append(float(metrics.loss))
    return seen


@pytest.fixture(scope="module")
def inside():
    """AdamW inside, with the decay and the memory of the recipe's."""
    inner = {"set": ("b2=0.95", "weight_decay=0.1"), "learning_rate": 0.01}
    return build(diloco_workers=4, sync_every=2, outer_lr=0.5, outer_momentum=0.8, **inner)


def test_with_adamw_inside_it_is_the_recipe_of_diloco(inside):
    own = ("sync_every=2", "outer_learning_rate=0.5", "outer_momentum=0.8")
    recipe = build(optimizer="diloco", mesh="worker=4", learning_rate=0.01, set=own)
    # Its AdamW is ours and not optax's: other roundings, in the updates before three losses.
    np.testing.assert_allclose(losses(inside), losses(recipe), rtol=2e-6)
    assert inside.traffic == recipe.traffic
    assert inside.mesh == recipe.mesh == "worker=4"


def test_bytes_of_a_round_are_spread_over_its_steps_and_one_step_sends_them_all(inside):
    numbers = 8  # weights and contributions that are not finite, in one all-reduce
    whole = 2 * 3 / 4 * (4 * inside.n_params + numbers)
    assert inside.traffic.largest == whole
    assert inside.traffic.mean == pytest.approx(whole / 2, rel=1e-12)


def test_fragments_are_sent_one_at_a_time():
    settings = ("sync_every=4", "fragments=2", "mean=float32")
    program = build(optimizer="streaming_diloco", mesh="worker=4", set=settings)
    whole = 2 * 3 / 4 * 4 * program.n_params
    branches = 4 * program.traffic.mean
    assert branches == pytest.approx(whole + 2 * 2 * 3 / 4 * 8, rel=1e-12)  # two numbers each
    # Strided, they differ: embedding and head are in one each.
    assert 0.5 * branches <= program.traffic.largest < 0.6 * branches


def test_compress_is_about_the_outer_gradients(inside):
    program = build(diloco_workers=4, sync_every=5, compress="int8()", feedback="none()")
    # Two matrices are below 1024 entries and go whole, the others in a byte each and scales.
    assert 0.25 < program.traffic.largest / inside.traffic.largest < 0.6
    once = program.traffic.largest
    assert program.traffic.mean == pytest.approx(once / 5, rel=1e-9)


def test_its_state_is_counted_and_its_recipe_says_how_much():
    config = TrainConfig(**COMMON, diloco_workers=4)
    for momentum in (None, 0.0):
        recipe = with_outer_loop(
            registry()["adamw"], dataclasses.replace(config, outer_momentum=momentum)
        )
        tx = recipe.make(1e-3, axis_name="worker")
        state = jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct((8, 16), "float32")})
        elements = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
        assert recipe.state_elements(8, 16) == elements == (3 if momentum == 0.0 else 4) * 8 * 16


def test_bytes_are_counted_where_the_inner_recipe_counts_them():
    recipe = with_outer_loop(registry()["adamw_8bit"], TrainConfig(**COMMON, diloco_workers=4))
    tx = recipe.make(1e-3, axis_name="worker")
    state = jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct((64, 128), "float32")})
    size = tree_bytes([leaf for leaf in jax.tree.leaves(state) if leaf.ndim])
    assert recipe.state_bytes(64, 128) == size == (2 + 8) * 64 * 128 + 8 * 64
    assert recipe.state_formula == "2mn + 8m⌈n/256⌉ + 8mn bytes"


@pytest.mark.parametrize(
    ("mesh", "expected"),
    [
        (None, "worker=4"),
        ("model=2", "worker=4,model=2"),
        ("model=2,worker=4", "model=2,worker=4"),
    ],
)
def test_workers_are_an_axis_of_the_mesh(mesh, expected):
    sizes = assembly.mesh_sizes(TrainConfig(diloco_workers=4, mesh=mesh))
    assert format_mesh(sizes) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diloco_workers": 0}, "--diloco-workers must be an integer of at least 1, got 0"),
        ({"sync_every": 0}, "--sync-every must be an integer of at least 1, got 0"),
        ({"outer_lr": 0.0}, "--outer-lr must be a positive, finite number or None, got 0.0"),
        ({"outer_momentum": 1.0}, r"--outer-momentum must be in \[0, 1\) or None, got 1.0"),
        ({"mesh": "worker=2"}, "--diloco-workers must be the worker=2 of --mesh, got 4"),
        ({"optimizer": "diloco"}, "given without diloco, an outer loop itself"),
        ({"optimizer": "powersgd"}, "given without powersgd, whose workers agree in every step"),
        ({"optimizer": "schedule_free"}, "given without schedule_free, which is not evaluated"),
        ({"noise_scale": True}, "--noise-scale must be given with --mesh worker=4 or the like"),
        ({"compress": "sign(1"}, "--compress must be a call"),
        ({"diloco_workers": None, "sync_every": 5}, "--diloco-workers must be given with --sync-e"),
        ({"diloco_workers": None, "outer_lr": 0.7}, "--diloco-workers must be given with --sync-e"),
        ({"batch_size": 6}, "--batch-size: .*multiple of 4"),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_would(options, message):
    with pytest.raises(UserError, match=message):
        build(**{"diloco_workers": 4, **options})


def test_a_comparison_puts_it_around_every_optimizer_and_is_refused_before_its_first_run():
    config = CompareConfig(optimizers="adamw,muon", diloco_workers=4)
    assert [entry.steps_per_round() for entry in entries(config)] == [50, 50]
    with pytest.raises(UserError, match="given without co2, an outer loop itself"):
        entries(dataclasses.replace(config, optimizers="adamw,co2"))


def test_a_finished_transformation_has_no_place_for_it():
    with pytest.raises(ValueError, match="without recipe, learning_rate, set or diloco_workers"):
        build_program(
            TrainConfig(**COMMON, diloco_workers=2), tx=registry()["sgd"].make(learning_rate=0.1)
        )


def test_whether_there_is_an_outer_loop_is_part_of_a_run_and_its_number_of_workers_is_not():
    config = TrainConfig(diloco_workers=4, sync_every=5)
    same = lambda **changes: dataclasses.replace(config, **changes).identity() == config.identity()
    assert same(diloco_workers=2)
    assert not same(diloco_workers=None)
    assert not same(sync_every=6)
