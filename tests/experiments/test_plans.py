"""Plans of presets and recipes, and the reports made of them."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import model, plan_report
from jaxopt_suite.experiments.plan_config import PlanConfig
from jaxopt_suite.experiments.plan_report import Report
from jaxopt_suite.experiments.plans import make_plans, model_flops
from jaxopt_suite.parallel import cost, hlo
from jaxopt_suite.parallel.chips import CHIPS
from jaxopt_suite.parallel.topologies import Topology

CONFIG = PlanConfig(
    topology="cpu:1x1x8", mesh="data=8", preset="nano", compare="adamw,adam_sn", seq_len=32
)


def _pod() -> Topology:
    """The eight CPU devices of the tests, in the place of one host of eight GPUs."""
    return Topology("cpu:1x1x8", CHIPS["h100"], (1, 1, 8), tuple(jax.devices()))


@pytest.fixture(scope="module")
def made():
    return make_plans(CONFIG, topology=_pod())


@pytest.fixture(scope="module")
def report(made):
    return Report(made, dataclasses.asdict(CONFIG), "jaxopt-suite plan", {"jax": jax.__version__})


def test_the_model_s_flops_are_those_of_its_gradient_on_one_device():
    config = model.PRESETS["nano"]
    graphdef, _ = model.build(config, seed=0)
    tokens = jax.ShapeDtypeStruct((4, 65), jnp.int32)
    loss = functools.partial(model.loss_fn, graphdef)
    compiled = jax.jit(jax.grad(loss)).lower(model.abstract_params(config), tokens).compile()
    found = cost.flops(hlo.parse(compiled.as_text())).total
    # Nothing but small products of the norms and of the rotary angles is left out.
    assert model_flops(config, sequences=4, seq_len=64) == pytest.approx(found, rel=0.02)


def test_the_optimizers_are_planned_in_the_order_given_and_differ_in_their_state(made):
    assert list(made) == ["adamw", "adam_sn"]
    adamw, adam_sn = (plan.memory.parts for plan in made.values())
    assert adamw["parameters"] == adam_sn["parameters"] == 4 * model.n_params(model.PRESETS["nano"])
    assert adamw["optimizer state"] == pytest.approx(2 * adamw["parameters"], rel=1e-4)
    # One moment and a few numbers for each row or column.
    assert adam_sn["optimizer state"] == pytest.approx(adamw["parameters"], rel=0.05)


def test_one_sequence_for_each_part_of_the_batch_is_the_default(made):
    assert made["adamw"].memory.parts["batch"] == (CONFIG.seq_len + 1) * 4


def test_remat_and_spread_state_reach_the_compiled_step(made):
    config = dataclasses.replace(
        CONFIG, compare=None, remat=True, shard_state_over="data", batch_size=16
    )
    (plan,) = make_plans(config, topology=_pod()).values()
    assert plan.flops > 1.1 * 2 * made["adamw"].flops  # twice the batch, and the forward pass again
    state = made["adamw"].memory.parts["optimizer state"]
    assert plan.memory.parts["optimizer state"] == pytest.approx(state / 8, rel=0.02)


def test_settings_reach_the_optimizer_they_are_for():
    config = dataclasses.replace(CONFIG, compare=None, set=("mu_dtype=bfloat16",))
    (plan,) = make_plans(config, topology=_pod()).values()
    parts = plan.memory.parts
    assert parts["optimizer state"] == pytest.approx(1.5 * parts["parameters"], rel=1e-4)


def test_an_outer_loop_s_bytes_are_those_of_a_round_with_the_largest_step_beside(monkeypatch):
    small = model.ModelConfig(d_model=16, n_layers=1, n_heads=2, d_ff=32)
    monkeypatch.setattr(model, "PRESETS", {**model.PRESETS, "nano": small})
    config = dataclasses.replace(
        CONFIG, mesh="worker=8", compare=None, diloco_workers=8, sync_every=10
    )
    plans = make_plans(config, topology=_pod())
    (link,) = plans["adamw"].links
    outer = 2 * 7 / 8 * (4 * model.n_params(small) + 8)  # and two numbers
    assert (link.axes, link.largest) == (("worker",), outer)
    assert link.nbytes == pytest.approx(outer / 10, rel=1e-12)
    _, step = plan_report.grids(Report(plans, dataclasses.asdict(config), "", {})).values()
    assert [row[0] for row in step.rows][2:4] == ["bytes sent over worker", "in the largest step"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "2b"}, "--preset must be one of nano, .* got '2b'"),
        ({"compare": "adamw,adamax"}, "adamax"),
        ({"compare": "adamw,adamw"}, "--compare must be different names"),
        ({"compare": "adamw,"}, "--compare must be different names"),
        ({"batch_size": 0}, "--batch-size must be an integer of at least 1, got 0"),
        ({"batch_size": 12}, "12"),  # does not divide over eight devices
        ({"clip": -1.0}, "--clip"),
        ({"mesh": "data=4"}, "mesh data=4 has 4 devices"),
        ({"mesh": "dada=8"}, "dada"),
        ({"mesh": "data=2,model=4"}, "must divide n_heads = 3"),
        ({"shard_state_over": "modle"}, "modle"),
        ({"set": ("b9=1",)}, "b9"),
    ],
)
def test_what_the_user_can_put_right_is_said_with_the_value(changes, message):
    with pytest.raises(UserError, match=message):
        make_plans(dataclasses.replace(CONFIG, **changes), topology=_pod())


def test_a_topology_that_does_not_exist_is_the_user_s_to_put_right():
    with pytest.raises(UserError, match="topology 'v9:2x2' does not exist; it must be v4"):
        make_plans(dataclasses.replace(CONFIG, topology="v9:2x2"))


def test_the_tables_have_a_column_for_each_optimizer_and_the_plan_s_numbers(report):
    memory, step = plan_report.grids(report).values()
    assert memory.headings == step.headings == ("", "adamw", "adam_sn")
    rows = {row[0]: row[1:] for row in (*memory.rows, *step.rows)}
    for column, plan in enumerate(report.plans.values()):
        total = sum(plan.memory.parts.values()) / 2**30
        assert rows["at the peak, in all"][column] == f"{total:.3f}"
        assert rows["ms at least: a step"][column] == f"{1e3 * plan.bound:.3g}"
    assert all(len(row) == 3 for row in (*memory.rows, *step.rows))


def test_the_page_loads_nothing_and_says_everything(report):
    page = plan_report.to_html(report)
    assert not re.search(r"<(script|link|img|iframe)\b|\bsrc=|url\(|@import", page)
    for plan in report.plans.values():
        assert plan.constraint.split(":")[0] in page
    for source in CHIPS["h100"].sources:
        assert source in page
    assert "Compiled without a GPU" in page  # the limits of such a plan


def test_the_json_reads_back(report):
    content = json.loads(plan_report.to_json(report))
    assert list(content["plans"]) == ["adamw", "adam_sn"]
    assert content["settings"]["preset"] == "nano"
    assert content["plans"]["adamw"]["bound"] == report.plans["adamw"].bound
