"""Streaming: the timetable, the fragments, the limit of one, and what is mixed when."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fleets import train_fleet

from jaxopt_suite.optimizers import (
    compressed_mean,
    compressors,
    diloco,
    mean_over_workers,
    streaming_diloco,
)
from jaxopt_suite.optimizers.diloco.fragments import Event, Fragments, Timetable

AXIS = "worker"


def outer_sgd(rate):
    return optax.chain(mean_over_workers(AXIS), optax.sgd(rate))


def given(params, x):
    del params
    return x


def test_the_timetable_of_seven_steps_and_three_fragments_written_out():
    """floor(7/3), floor(14/3), 7: sent after 2, 4 and 7 steps, and two steps later applied."""
    found = [tuple(event) for event in Timetable(7, 3, 2).events(12)]
    assert found == [
        (2, "send", 0),
        (4, "send", 1),
        (4, "apply", 0),
        (6, "apply", 1),
        (7, "send", 2),
        (9, "send", 0),
        (9, "apply", 2),
        (11, "send", 1),
        (11, "apply", 0),
    ]


@pytest.mark.parametrize(
    ("every", "fragments", "delay"),
    [(1, 1, 0), (5, 1, 4), (6, 6, 5), (7, 3, 0), (100, 37, 5), (100, 17, 99)],
)
def test_every_fragment_is_sent_and_applied_once_a_period_and_tables_say_what_lists_do(
    every, fragments, delay
):
    timetable = Timetable(every, fragments, delay)
    events = list(timetable.events(4 * every))
    for kind in ("send", "apply"):
        steps = [e.step for e in events if e.kind == kind]
        assert len(set(steps)) == len(steps), "one fragment a step"
        period = [e.fragment for e in events if e.kind == kind and 2 * every < e.step <= 3 * every]
        assert sorted(period) == list(range(fragments))
    steps = jnp.arange(1, 4 * every + 1)
    for kind, traced in (("send", timetable.sent), ("apply", timetable.applied)):
        found = np.asarray(jax.jit(traced)(steps))
        listed = [Event(t + 1, kind, int(p)) for t, p in enumerate(found) if p < fragments]
        assert listed == [e for e in events if e.kind == kind]


def test_equal_leaves_are_dealt_round_or_cut_in_runs():
    params = [jnp.ones(2)] * 7
    assert Fragments(params, 3, "strided").tree == [0, 1, 2, 0, 1, 2, 0]
    assert Fragments(params, 3, "sequential").tree == [0, 0, 1, 1, 1, 2, 2]


def test_fragments_hold_about_as_many_elements_each():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 100, size=200)
    params = [jax.ShapeDtypeStruct((int(n),), jnp.float32) for n in sizes]
    for order in ("strided", "sequential"):
        of_leaf = Fragments(params, 7, order).tree
        filled = np.bincount(of_leaf, weights=sizes)
        assert np.ptp(filled) <= 2 * sizes.max()
        if order == "sequential":
            assert of_leaf == sorted(of_leaf)


def test_a_huge_leaf_leaves_no_fragment_empty():
    for sizes in ([1000, 1, 1], [1, 1, 1000], [1, 1000, 1], [0, 0, 0], [0, 5, 0]):
        params = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in sizes]
        for order in ("strided", "sequential"):
            assert sorted(Fragments(params, 3, order).tree) == [0, 1, 2]


def test_fragments_can_be_given_by_leaf():
    given = {"a": 1, "b": {"c": 0, "d": 1}}
    params = {"a": jnp.ones(1), "b": {"c": jnp.ones(2), "d": jnp.ones(3)}}
    fragments = Fragments(params, given, "strided")
    part = fragments.pick(params, 1)
    assert isinstance(part["b"]["c"], optax.MaskedNode)
    doubled = fragments.put(params, jax.tree.map(lambda x: 2 * x, part), 1)
    assert [float(x[0]) for x in jax.tree.leaves(doubled)] == [2, 1, 2]


def test_one_fragment_without_delay_and_mixing_is_diloco_to_the_bit():
    """With absences, weights and a worker that is not finite."""
    rng = np.random.default_rng(0)
    gradients = {
        "a": rng.normal(size=(4, 7, 6)).astype(np.float32),
        "b": rng.normal(size=(4, 7, 2, 3)).astype(np.float32),
    }
    gradients["a"][1, 5] = np.nan
    params = {"a": np.ones(6, np.float32), "b": np.ones((2, 3), np.float32)}
    weights = rng.integers(0, 3, size=(4, 7))
    weights[1, 5] = 1
    inner, found = optax.adam(0.1), []
    for tx in (
        diloco(inner, sync_every=3, axis_name=AXIS),
        streaming_diloco(inner, sync_every=3, axis_name=AXIS, fragments=1),
    ):
        found.append(train_fleet(tx, given, gradients, params, active=weights))
    (plain, state), (stream, other) = found
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(stream), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(state.left_out) == int(other.left_out) > 0
    for a, b in zip(jax.tree.leaves(state.outer), jax.tree.leaves(other.outer[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_fragments_with_delay_and_mixing_worked_out_by_hand():
    """H = 4, sent after 2 and 4 steps and applied a step later; workers descend by 1 and 3.

    Outer SGD of rate 1/2 and heavy-ball momentum 1/2, so that a momentum which had decayed between
    a fragment's turns would be seen.
    """
    outer = optax.chain(mean_over_workers(AXIS), optax.sgd(0.5, momentum=0.5))
    tx = streaming_diloco(
        optax.sgd(1.0),
        outer,
        sync_every=4,
        axis_name=AXIS,
        fragments={"a": 0, "b": 1},
        delay=1,
        mixing=0.25,
    )
    rates = np.broadcast_to(np.array([1.0, 3.0])[:, None, None], (2, 8, 1)).astype(np.float32)
    params = {"a": np.zeros(1, np.float32), "b": np.zeros(1, np.float32)}
    found, state = train_fleet(tx, given, {"a": rates, "b": rates}, params)

    def by_hand(offset):
        x, theta, v, path = np.zeros(2), 0.0, 0.0, []
        for t in range(1, 9):
            x = x - [1.0, 3.0]
            if t % 4 == offset % 4:
                v = 0.5 * v + (theta - x.mean())
                theta = theta - 0.5 * v
            if t > 1 and (t - 1) % 4 == offset % 4:
                x = 0.25 * x + 0.75 * theta
            path.append(x)
        return np.array(path).T, theta

    for leaf, offset in (("a", 2), ("b", 4)):
        path, theta = by_hand(offset)
        np.testing.assert_allclose(found[leaf][:, :, 0], path, rtol=1e-6)
        np.testing.assert_allclose(state.outer_params[leaf], [theta], rtol=1e-6)


def test_mixing_of_one_ignores_the_others_but_for_the_outer_parameters():
    gradients = np.random.default_rng(0).normal(size=(3, 6, 4)).astype(np.float32)
    tx = streaming_diloco(
        optax.sgd(0.1), sync_every=2, axis_name=AXIS, fragments=1, delay=1, mixing=1.0
    )
    found, state = train_fleet(tx, given, gradients, np.zeros(4, np.float32))
    # Updates that go through differences with the outer parameters are rounded on the way.
    np.testing.assert_allclose(found, -0.1 * np.cumsum(gradients, axis=1), rtol=0, atol=1e-6)
    assert np.abs(state.outer_params).min() > 0


def test_a_fragment_in_four_bits_is_near_one_in_thirty_two():
    rng = np.random.default_rng(0)
    gradients = {name: rng.normal(size=(4, 8, 2048)).astype(np.float32) for name in "ab"}
    params = {name: np.zeros(2048, np.float32) for name in "ab"}
    four_bits = compressed_mean(compressors.int4(), axis_name=AXIS)
    ends = []
    for mean in (mean_over_workers(AXIS), four_bits):
        tx = streaming_diloco(
            optax.sgd(0.1),
            optax.chain(mean, optax.sgd(0.7, 0.9, nesterov=True)),
            sync_every=4,
            axis_name=AXIS,
            fragments=2,
        )
        _, state = train_fleet(tx, given, gradients, params)
        ends.append(state.outer_params)
    for name in "ab":
        error = np.linalg.norm(ends[1][name] - ends[0][name]) / np.linalg.norm(ends[0][name])
        assert 1e-4 < error < 0.15  # a code is off by up to a fourteenth of its block's largest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sync_every": 0}, "sync_every must be an int of at least 1, got 0"),
        ({"fragments": 0}, "fragments must be an int of at least 1, got 0"),
        ({"sync_every": 4, "fragments": 5}, "fragments must be at most sync_every=4.*got 5"),
        ({"fragments": {"a": 0, "b": 2}}, r"every number from 0 up, got \[0, 2\]"),
        ({"delay": -1}, "delay must be an int of at least 0, got -1"),
        ({"sync_every": 4, "delay": 4}, "delay must be below sync_every=4.*got 4"),
        ({"mixing": 1.5}, r"mixing must be in \[0, 1\], got 1.5"),
        ({"order": "random"}, "order must be one of 'strided', 'sequential', got 'random'"),
        ({"rejoin": "copy"}, "rejoin must be one of"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        streaming_diloco(optax.sgd(1.0), axis_name=AXIS, **({"sync_every": 10} | arguments))


def test_refuses_a_cadence_that_changes_over_time():
    with pytest.raises(TypeError, match="sync_every must be an int"):
        streaming_diloco(optax.sgd(1.0), axis_name=AXIS, sync_every=lambda count: 3)


def test_refuses_more_fragments_than_leaves_and_trees_of_another_form():
    tx = streaming_diloco(optax.sgd(1.0), axis_name=AXIS, sync_every=10, fragments=3)
    with pytest.raises(ValueError, match=r"at most the number of leaves, 2.*got 3"):
        tx.init({"a": jnp.ones(1), "b": jnp.ones(1)})
    tx = streaming_diloco(optax.sgd(1.0), axis_name=AXIS, sync_every=10, fragments={"a": 0})
    with pytest.raises(ValueError, match="tree of ints like params"):
        tx.init({"a": jnp.ones(1), "b": jnp.ones(1)})
