"""Random laws of every form come back: exactly without noise, within intervals with it."""

import pytest

from benchmarks.scaling_laws import designs, planted

DESIGNS = designs.designs()
# One of each kind of formula: the others differ from one of these in names of columns only, and are
# in the exhaustive test. What takes longest to fit is there too.
QUICK = [
    "kaplan_size",
    "kaplan",
    "downstream_error",
    "diloco_loss",
    "compute_only",
]


@pytest.mark.parametrize("name", QUICK)
def test_20_random_laws_are_recovered_from_noise_free_runs(name):
    for parameter, errors in planted.recovery(DESIGNS[name], 20, seed=5).items():
        assert errors.max() <= planted.EXACT, parameter


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(DESIGNS))
def test_200_random_laws_are_recovered_and_covered(name):
    row = planted.measure(name)
    assert planted.kept(row), row


def test_a_share_of_intervals_outside_the_promise_fails():
    row = {"recovered": 1.0, "coverage": {"A": 0.9, "B": 0.95}}
    assert planted.kept(row)
    assert not planted.kept(row | {"coverage": {"A": 0.9, "B": 0.96}})
    assert not planted.kept(row | {"recovered": 0.995})
