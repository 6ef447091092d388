"""Runs that go on with more workers than they had, or fewer: who keeps what, who begins anew."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxopt_suite import parallel
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import joining
from jaxopt_suite.experiments.checkpoints import Checkpoints
from jaxopt_suite.experiments.steps import Program
from jaxopt_suite.optimizers import (
    compressed_mean,
    compressors,
    diloco,
    eager_diloco,
    feedback,
    outer_params,
)

MADE = 4  # steps before the checkpoint
PARAMS = {"w": jnp.ones((64, 32)), "b": jnp.zeros(32)}
AXIS = "worker"


def inner():
    return optax.adamw(lambda count: 0.1 / (1 + count))


def loss(params, batch):
    return jnp.mean((batch @ params["w"] + params["b"][None]) ** 2)


def program_of(
    tx, workers, *, simulated=False, params=PARAMS, eval_params=outer_params, offload_state=False
):
    """What of a run's program a restart needs, for a model of two leaves."""
    step = parallel.make_train_step(
        loss,
        optax.chain(optax.clip_by_global_norm(1.0), tx),
        None if simulated else parallel.make_mesh({AXIS: workers, "model": 8 // workers}),
        param_specs=None if simulated else {"w": PartitionSpec("model"), "b": PartitionSpec()},
        worker_axis=AXIS,
        workers=workers,
        offload_state=offload_state,
    )
    names = dict.fromkeys(("settings", "hyperparameters", "peak", "schedule", "sizes", "graphdef"))
    return Program(
        **names,
        train_step=step,
        eval_params=eval_params,
        steps_per_round=None,
        abstract_params=params,
        abstract_tokens=None,
    )


def restarted(path, tx, before, after, **options):
    """A state with that number of workers, and after the restart with another one."""
    state = on_its_way(program_of(tx, before, **options).train_step.init(PARAMS))
    program = program_of(tx, after, **options)
    with Checkpoints(path) as checkpoints:
        checkpoints.save(MADE, state, {})
        found = checkpoints.restore(program.abstract_state, of_workers=joining.of_workers(program))
    assert found.workers == before
    return program, state, joining.with_joiners(program, found.state, found.workers)


def on_its_way(state):
    """Every number another one, of every worker; every count that of the steps made."""
    rng = np.random.default_rng(0)

    def leaf(x):
        count = jnp.issubdtype(x.dtype, jnp.integer)
        values = np.full(x.shape, MADE) if count else rng.standard_normal(x.shape)
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree.map(leaf, state)


def check_kept(program, old, new, rows):
    """What is shared is the same to the last bit, and so are the first rows of the rest."""

    def same(own, a, b):
        np.testing.assert_array_equal(a[:rows] if own else a, b[:rows] if own else b)

    jax.tree.map(same, joining.of_workers(program), *jax.device_get((old, new)))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, program.abstract_state)


@pytest.mark.parametrize("simulated", [False, True])
def test_with_fewer_workers_those_that_remain_keep_their_own(tmp_path, simulated):
    tx = diloco(inner(), sync_every=3, axis_name=AXIS)
    program, old, new = restarted(tmp_path, tx, 4, 2, simulated=simulated)
    check_kept(program, old, new, rows=2)
    assert new.params["w"].shape == (2, 64, 32)
    assert new.opt_state[1].count == MADE


@pytest.mark.parametrize("options", [{}, {"simulated": True}, {"offload_state": True}], ids=str)
def test_a_new_worker_begins_at_the_outer_parameters_with_a_schedule_that_counts_on(
    tmp_path, options
):
    tx = diloco(inner(), sync_every=3, axis_name=AXIS)
    program, old, new = restarted(tmp_path, tx, 2, 8, **options)
    check_kept(program, old, new, rows=2)
    outer = jax.device_get(new.opt_state[1])
    for name, theta in outer.outer_params.items():
        np.testing.assert_array_equal(new.params[name][2:], np.stack([theta] * 6))
    adam, *_, rate = outer.inner
    assert not any(np.any(m[2:]) for m in jax.tree.leaves((adam.mu, adam.nu)))
    assert adam.count.tolist() == [MADE] * 2 + [0] * 6
    assert rate.count.tolist() == [MADE] * 8
    assert jax.tree.map(lambda x: x.sharding, new) == jax.tree.map(
        lambda x, abstract: abstract.sharding or x.sharding, new, program.abstract_state
    )
    after, metrics = program.train_step(new, np.ones((16, 64), np.float32))
    assert metrics.finite
    assert after.opt_state[1].count == MADE + 1


def test_where_outer_parameters_differ_a_new_worker_begins_at_the_mean_of_those_there_were(
    tmp_path,
):
    tx = eager_diloco(inner(), sync_every=3, axis_name=AXIS)
    program, old, new = restarted(tmp_path, tx, 2, 4)
    check_kept(program, old, new, rows=2)
    state = new.opt_state[1]
    for name, x in state.outer_params.items():
        mean = np.stack([np.mean(x[:2], 0)] * 2)  # of two float32 numbers, perhaps rounded once
        np.testing.assert_allclose(x[2:], mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(new.params[name][2:], x[2:])
    assert not any(np.any(x[2:]) for x in jax.tree.leaves(state.variant.sent))


def test_what_is_owed_is_kept_and_a_new_worker_owes_nothing(tmp_path):
    mean = compressed_mean(compressors.sign(), feedback=feedback.ef(), axis_name=AXIS)
    tx, params = optax.chain(mean, inner()), lambda opt_state, params: params
    program, old, new = restarted(tmp_path, tx, 2, 4, eval_params=params)
    check_kept(program, old, new, rows=2)
    assert new.params["w"].shape == (64, 32)
    marks = jax.tree.leaves(joining.of_workers(program))
    own = [x for mark, x in zip(marks, jax.tree.leaves(new), strict=True) if mark]
    assert any(x.shape == (4, 64, 32) for x in own)
    assert all(np.any(x[:2]) and not np.any(x[2:]) for x in own)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"tx": optax.sgd(0.1, 0.9)}, "another model or optimizer: .*trace.* is absent there and "),
        ({"params": {**PARAMS, "w": jnp.ones((64, 16))}},
         r"is float32\[workers, 64, 32\] there and float32\[workers, 64, 16\] here"),
    ],
)  # fmt: skip
def test_another_model_or_optimizer_is_refused_as_ever(tmp_path, other, message):
    loop = lambda tx: diloco(tx, sync_every=3, axis_name=AXIS)
    program = program_of(loop(optax.sgd(0.1)), 2)
    given = {"params": PARAMS, "tx": optax.sgd(0.1)} | other
    different = program_of(loop(given["tx"]), 4, params=given["params"])
    own = joining.of_workers(different)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, program.train_step.init(PARAMS), {})
        with pytest.raises(UserError, match=message):
            checkpoints.restore(different.abstract_state, of_workers=own)


def test_without_being_told_of_workers_their_number_must_be_the_same(tmp_path):
    tx = diloco(optax.sgd(0.1), sync_every=3, axis_name=AXIS)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, program_of(tx, 2).train_step.init(PARAMS), {})
        with pytest.raises(UserError, match=r"float32\[2, 32\] there and float32\[4, 32\] here"):
            checkpoints.restore(program_of(tx, 4).abstract_state)
