"""Which blocks are refreshed at which step, and that a turn is never lost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_suite.optimizers.shampoo import scale_by_shampoo
from jaxopt_suite.optimizers.shampoo.refresh import make_refresh

ROWS = (4, 8, 12, 20, 28, 44)  # of the stacks; multiples of 4


def refreshed(schedule, rows, steps):
    """For each stack, which rows were refreshed at which step: bool ``[steps, rows]``."""

    @jax.jit
    def step(count, stacks):
        def now(part, reads):
            assert jax.tree.map(jnp.shape, part) == jax.tree.map(jnp.shape, reads)
            return jax.tree.map(lambda x: x + count, reads)  # of the rows that are to be written

        return schedule.run(now, stacks, jax.tree.map(jnp.zeros_like, stacks), count)

    stacks = {str(n): {"a": jnp.zeros(n), "b": jnp.zeros((n, 2, 3))} for n in rows}
    found = {name: [] for name in stacks}
    for count in range(1, steps + 1):
        stacks = step(count, stacks)
        for name, stack in stacks.items():
            of_all = np.concatenate([stack["a"][None], stack["b"].reshape(len(stack["a"]), -1).T])
            np.testing.assert_array_equal(of_all, of_all[:1].repeat(7, 0))  # whole rows
            found[name].append(of_all[0] == count)
    return {name: np.array(steps) for name, steps in found.items()}


@pytest.mark.parametrize(
    ("every", "start", "expected"),
    [
        (4, None, [4, 8, 12]),
        (4, 1, [1, 4, 8, 12]),
        (4, 6, [6, 8, 12]),
        (1, 3, [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
    ],
)
def test_together_means_all_at_the_start_and_at_every_multiple_after_it(every, start, expected):
    found = refreshed(make_refresh("together", every, start, 1), (3, 5), 12)
    for at in found.values():
        np.testing.assert_array_equal(at.all(1), at.any(1))
        assert (np.flatnonzero(at.all(1)) + 1).tolist() == expected


@pytest.mark.parametrize(
    ("rows", "every", "multiple", "expected"),
    [
        # By step, from 1. Five rows in three slots of two: the last reaches back by one row.
        (5, 3, 1, [[2, 3], [3, 4], [0, 1]] * 2),
        (2, 4, 1, [[1], [], [], [0]] * 2),
        (1, 1, 1, [[0], [0]]),
        (8, 4, 4, [[1, 3, 5, 7], [], [], [0, 2, 4, 6]] * 2),
        (20, 3, 4, [[2, 3, 7, 8, 12, 13, 17, 18], [3, 4, 8, 9, 13, 14, 18, 19]]),
    ],
)
def test_staggered_rows_by_hand(rows, every, multiple, expected):
    schedule = make_refresh("staggered", every, None, multiple)
    found = refreshed(schedule, (rows,), len(expected))[str(rows)]
    assert [np.flatnonzero(step).tolist() for step in found] == expected


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("every", [1, 3, 10])
def test_staggered_every_block_has_its_turn_in_any_k_steps_and_none_has_two_but_at_the_end(
    every, multiple
):
    schedule = make_refresh("staggered", every, None, multiple)
    found = refreshed(schedule, ROWS, 3 * every)
    for name, at in found.items():
        rows = int(name) // multiple
        width = -(-rows // every)
        slots = -(-rows // width)
        for first in range(2 * every):
            turns = at[first : first + every].sum(0)
            assert turns.min() == 1, name
            # One length for all slots: the last one takes rows of the one before it again.
            assert turns.max() <= 2, name
            assert turns.sum() == slots * width * multiple, name
        assert at.sum(1).max() == width * multiple
        np.testing.assert_array_equal(at[:every], at[every : 2 * every])  # the same every time


def test_staggered_roots_are_as_old_on_average_as_those_taken_together():
    def age(at):
        steps = np.where(at, np.arange(len(at))[:, None], -1)
        last = np.maximum.accumulate(steps, 0)
        return float(np.mean(np.arange(len(at))[10:30, None] - last[10:30]))

    for schedule in ("together", "staggered"):
        at = refreshed(make_refresh(schedule, 10, None, 1), (10, 40), 30)
        assert [age(x) for x in at.values()] == [4.5, 4.5], schedule


def test_small_stacks_take_their_turns_one_after_another():
    found = refreshed(make_refresh("staggered", 14, None, 1), (2, 3, 4, 5), 14)
    together = sum(at.sum(1) for at in found.values())
    assert together.tolist() == [1] * 14


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh": "sometimes"}, "refresh must be one of .*'sometimes'"),
        ({"refresh_every": 0}, "refresh_every must be an int of at least 1, got 0"),
        ({"start_step": 0}, "start_step must be an int of at least 1, got 0"),
        ({"refresh": "staggered", "start_step": 9}, "start_step must be at least refresh_every=10"),
    ],
)
def test_schedules_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        scale_by_shampoo(**settings)


def test_numbers_of_steps_are_whole():
    for make in (
        functools.partial(scale_by_shampoo, refresh_every=2.0),
        functools.partial(scale_by_shampoo, start_step=True),
    ):
        with pytest.raises(TypeError, match="must be an int"):
            make()


def test_all_roots_are_new_by_the_first_step_that_uses_them():
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((10, 4))}
    tx = scale_by_shampoo(block_size=2, refresh_every=3, refresh="staggered", graft="none")
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        g = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
        updates, state = update(g, state)
    for part in state.preconditioners.values():
        for root in part.roots:
            eye = np.eye(root.shape[-1])
            assert (np.abs(np.asarray(root) - eye).max((1, 2)) > 1e-3).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))
