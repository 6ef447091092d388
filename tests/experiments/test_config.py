"""What a config refuses, what of it makes a run the run it is, the learning rate it leads to."""

import subprocess
import sys

import numpy as np
import pytest

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.config import (
    LAYOUT,
    PROCESSES,
    CompareConfig,
    TrainConfig,
    parse_settings,
)
from jaxopt_suite.experiments.schedules import learning_rate_schedule


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", -1),
        ("seq_len", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("warmup_fraction", 1.5),
        ("warmup_fraction", float("nan")),
        ("clip", 0.0),
        ("seed", -1),
        ("eval_every", 0),
        ("eval_batches", 0),
        ("log_every", 0),
        ("checkpoint_every", 0),
        ("keep", 0),
        ("mirror", ("mlflow",)),
        ("mirror", ("wandb", "wandb")),
        ("accumulate", 0),
        ("initialization_timeout", 0),
        ("processes", 0),
        ("set", ("b2",)),
        ("set", ("b2=",)),
        ("set", ("2b=1",)),
        ("set", ("b2=0.9", "b2=0.8")),
    ],
)
def test_a_bad_value_is_refused_by_option_and_value(field, value):
    shown = value[-1] if isinstance(value, tuple) else value
    with pytest.raises(UserError, match=f"^--{field.replace('_', '-')} must be .*got {shown!r}"):
        TrainConfig(**{field: value}).validate()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"processes": 2}, "--processes must be given with --mesh, .*got 2"),
        ({"processes": 2, "mesh": "data=2", "distributed": True}, "--processes must be alone"),
        ({"coordinator": "h:1"}, "--coordinator must be given with --num-processes and --process"),
        ({"num_processes": 2, "process_id": 0}, "--coordinator must be given with .*got None"),
    ],
)
def test_contradicting_ways_to_find_the_processes_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**fields).validate()


@pytest.mark.parametrize("names", ["", "adamw,", "adamw,grams,adamw"])
def test_a_comparison_needs_different_names(names):
    with pytest.raises(UserError, match="--optimizers must be different names"):
        CompareConfig(optimizers=names).validate()


def test_the_defaults_are_legal():
    TrainConfig().validate()
    CompareConfig().validate()
    assert CompareConfig(optimizers="adamw, grams").names() == ["adamw", "grams"]


def test_settings_are_literals_where_they_can_be():
    items = ["b2=0.95", "nesterov=True", "mode=svd", "adam_snsm.rank=32", "ratio=1e-3", "x=a=b"]
    assert parse_settings(items) == {
        "b2": 0.95,
        "nesterov": True,
        "mode": "svd",
        "adam_snsm.rank": 32,
        "ratio": 1e-3,
        "x": "a=b",
    }


def test_only_what_changes_no_record_is_left_out_of_a_run_s_identity():
    config = TrainConfig()
    free = {"out": "elsewhere", "checkpoint_every": 7, "keep": 9, "mirror": ("wandb",)}
    free |= {"mesh": "data=2", "scan_layers": True, "remat": True, "accumulate": 2}
    free |= {"shard_state_over": "data", "offload_state": True}
    free |= {"coordinator": "host:1", "num_processes": 2, "process_id": 1}
    assert TrainConfig(**free).identity() == config.identity()
    left_out = set(vars(config)) - set(config.identity())
    assert left_out == {"out", "checkpoint_every", "keep", "mirror", *LAYOUT, *PROCESSES}
    assert "dtype" in config.identity()  # another precision is another run


def test_records_come_at_the_log_steps_the_evaluations_and_the_end():
    config = TrainConfig(steps=11, log_every=4, eval_every=5)
    assert [s for s in range(12) if config.logs(s)] == [0, 4, 5, 8, 10, 11]
    assert [s for s in range(12) if config.evaluates(s)] == [0, 5, 10, 11]


def test_configs_cost_no_import_of_jax():
    program = "import jaxopt_suite.experiments.config, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_cosine_warms_up_from_above_zero_and_ends_near_a_tenth():
    schedule = learning_rate_schedule("cosine", 2.0, steps=100, warmup_fraction=0.1)
    rates = np.array([schedule(t) for t in range(100)])
    np.testing.assert_allclose(rates[:11], 2.0 * np.arange(1, 12) / 11, rtol=1e-6)  # float32
    by_hand = 0.2 + 0.9 * (1 + np.cos(np.pi * np.arange(90) / 90))
    np.testing.assert_allclose(rates[10:], by_hand, rtol=1e-5)  # float32, a cosine near pi


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_warm_up_reaches_the_peak_before_the_end(fraction, steps):
    schedule = learning_rate_schedule("constant", 3.0, steps=steps, warmup_fraction=fraction)
    rates = [float(schedule(t)) for t in range(steps)]
    assert rates[-1] == pytest.approx(3.0)
    assert 0 < rates[0] <= rates[-1]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"'cosine' or 'constant', got 'linear'"):
        learning_rate_schedule("linear", 1.0, steps=10, warmup_fraction=0.1)
