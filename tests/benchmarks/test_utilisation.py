"""Published figures of compute utilisation: where ours are the same, and how far off the others."""

import pytest

from benchmarks.communication import utilisation
from jaxopt_suite.parallel.event_simulation import simulate
from jaxopt_suite.parallel.utilisation import Link, bandwidth_for


def test_every_printed_figure_is_a_point_of_the_grid():
    points = {float(f"{round(0.1 * 10 ** (4 * k / 49), 2):.1f}") for k in range(50)}
    printed = {x for t in utilisation.TABLES for row in t.gbits_per_second.values() for x in row}
    assert printed <= points


@pytest.mark.parametrize(("method", "printed"), [
    ("data parallel", 390.7), ("DiLoCo, H=100", 49.4), ("streaming", 11.0),
    ("streaming, overlapped", 5.2), ("streaming, overlapped, FP4", 1.1),
])  # fmt: skip
def test_the_headline_of_streaming_is_reproduced(method, printed):
    (table,) = (t for t in utilisation.TABLES if t.model == "100B")
    assert table.gbits_per_second[method][utilisation.SHARES.index(0.95)] == printed
    needed = bandwidth_for(0.95, table.job, utilisation.schedule(method, table.job.layers))
    assert utilisation.as_printed(needed) == printed


def test_figures_that_are_the_same_and_the_distance_of_the_others(capsys):
    rows = list(utilisation.measure())
    assert [(row["model"], row["same"], row["figures"]) for row in rows] == [
        ("1B", 21, 25), ("10B", 20, 25), ("100B", 23, 25),
        ("10B Chinchilla", 7, 25), ("405B Llama 3", 13, 25), ("671B DeepSeek-V3", 19, 25),
    ]  # fmt: skip
    assert utilisation.kept(rows)
    assert not utilisation.kept([rows[0] | {"same": 19}])
    assert not utilisation.kept([rows[3] | {"highest": 1.6}])
    assert "the same point of the grid: 23 of 25" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["data parallel", "DiLoCo, H=100", "streaming, overlapped"])
def test_the_events_agree_at_the_size_of_the_papers(method):
    job = next(t.job for t in utilisation.TABLES if t.model == "1B")
    plan = utilisation.schedule(method, job.layers)
    speed = bandwidth_for(0.8, job, plan)
    # Sums of some thousand times in double precision.
    assert simulate(job, Link(speed), plan, rounds=2, warm_up=1) == pytest.approx(0.8, rel=1e-9)
