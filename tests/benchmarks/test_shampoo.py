"""Benchmarks of Shampoo: what a trace is summed up to, and what counts as a promise kept."""

import pytest

from benchmarks.shampoo import timing, updates


def test_the_slowest_step_of_a_cycle_is_one_that_is_slow_every_time():
    # Cycles of three steps; the third is the slow one, and once something else held up the first.
    found = timing.summary([1.0, 2.0, 6.0, 50.0, 2.0, 7.0, 1.0, 2.0, 8.0], cycle=3)
    assert found["slowest"] == 50.0
    assert found["slowest_of_cycle"] == 7.0
    assert found["median"] == 2.0
    assert found["mean"] == pytest.approx(79 / 9, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"mean": 1.99}, False),
        ({"slowest_of_cycle": 4.9}, False),
        ({"slowest": 1.0}, True),
        ({"even": 1.51}, False),
    ],
)
def test_one_schedule_must_be_faster_on_average_and_at_its_slowest_step(changes, kept):
    staggered = {"mean": 2.0, "slowest": 5.0, "slowest_of_cycle": 5.0} | changes
    row = {
        "times_faster": {
            "shampoo": {"mean": 2.2, "slowest": 2.0, "slowest_of_cycle": 2.0},
            "shampoo, staggered": staggered,
        },
        "staggered_over_median": {"slowest_of_cycle": changes.get("even", 1.5)},
    }
    assert updates.kept(row) == kept
