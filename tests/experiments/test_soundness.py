"""The first step that is not finite: found late by one process, at the same step by several."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_suite.experiments.peers import Peers
from jaxopt_suite.experiments.soundness import Lookout, NonFinite
from jaxopt_suite.parallel.metrics import Metrics

SOUND = Metrics(jnp.asarray([1.0, 4.0, 9.0, 1.0]))
FIELDS = range(3)  # loss, squared norms of gradient and update


def unsound(field: int = 0, value: float = np.nan) -> Metrics:
    return Metrics(SOUND.numbers.at[field].set(value))


@dataclasses.dataclass(frozen=True)
class Another(Peers):
    """This process beside one that says what ``other`` is."""

    count: int = 2
    other: int | None = None

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_process_finds_a_step_when_it_takes_the_next(field, value):
    lookout = Lookout(Peers())
    lookout.add(1, SOUND)
    lookout.add(2, bad := unsound(field, value))
    with pytest.raises(NonFinite) as stop:
        lookout.add(3, SOUND)
    assert (stop.value.step, stop.value.metrics) == (2, bad)


def test_or_when_all_are_to_be_settled():
    lookout = Lookout(Peers())
    lookout.add(1, SOUND)
    lookout.settle()
    lookout.add(2, unsound())
    with pytest.raises(NonFinite) as stop:
        lookout.settle()
    assert stop.value.step == 2


@pytest.mark.parametrize(
    ("own", "other", "first"), [(3, None, 3), (None, 2, 2), (3, 2, 2), (2, 4, 2)]
)
def test_several_processes_go_on_until_they_settle_and_find_the_first(own, other, first):
    lookout = Lookout(Another(other=other))
    steps = {step: unsound() if step == own else dataclasses.replace(SOUND) for step in range(1, 5)}
    for step, metrics in steps.items():
        lookout.add(step, metrics)
    with pytest.raises(NonFinite) as stop:
        lookout.settle()
    assert stop.value.step == first
    assert stop.value.metrics is steps[first]


def test_where_all_is_finite_nothing_happens():
    lookout = Lookout(Another())
    for step in range(1, 9):
        lookout.add(step, SOUND)
        if step % 3 == 0:
            lookout.settle()


def test_the_means_are_those_of_the_workers_that_count():
    rows = [[1.0, 4.0, 9.0, 1.0], [2.0, 12.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    metrics = Metrics(jnp.asarray(rows, jnp.bfloat16))
    assert float(metrics.loss) == 1.5
    assert float(metrics.grad_norm) == pytest.approx(8**0.5)
    assert float(metrics.update_norm) == pytest.approx(5**0.5)
    assert metrics.finite
    assert metrics.finite_here
    nobody = Metrics(jnp.zeros((2, 4)))
    assert np.isnan(nobody.loss)
    assert not nobody.finite
