"""Shares of computing: by hand, against the events, and against the figures of the papers."""

import matplotlib.figure
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxopt_suite.parallel.event_simulation import simulate
from jaxopt_suite.parallel.utilisation import (
    Job,
    Link,
    Schedule,
    bandwidth_for,
    bits_sent,
    compute_utilisation,
    draw,
)

# Steps of 3 s (forward 1 s, backward 0.5 s a layer) and 8e9 bits in 4 layers: on a link of
# 1 Gbit/s all of them take 8 s, a layer 2 s.
JOB = Job(step_seconds=3.0, parameters=1e9, layers=4)
SLOW = Link(1.0)
IN_BACKWARD = Schedule(bits=8, in_backward=True)


def test_workers_that_wait_for_every_mean_by_hand():
    # The first layer leaves 1.5 s before the end of the step, so 6.5 s are left after it.
    assert compute_utilisation(JOB, SLOW, IN_BACKWARD) == pytest.approx(3 / 9.5)
    # On a fast link (a layer in 0.25 s) only the last layer, which leaves last, is waited for.
    assert compute_utilisation(JOB, Link(8.0), IN_BACKWARD) == pytest.approx(3 / 3.25)
    assert compute_utilisation(JOB, SLOW, Schedule.diloco(10, bits=8)) == pytest.approx(30 / 38)


def test_fragments_with_and_without_time_to_arrive_by_hand():
    # Two fragments of 4 s each, every 5 steps.
    assert compute_utilisation(JOB, SLOW, Schedule.streaming(10, 2, bits=8)) == pytest.approx(
        30 / 38
    )
    late = Schedule.streaming(10, 2, delay=1, bits=8)
    assert compute_utilisation(JOB, SLOW, late) == pytest.approx(30 / 32)
    late = Schedule.streaming(10, 2, delay=2, bits=8)
    assert compute_utilisation(JOB, SLOW, late) == 1.0
    # Layers 1 and 3 leave 0.5 s and 1.5 s before the end of the step, layers 0 and 2 at it and 1 s
    # before it: 2.5 s and 3 s are left.
    strided = Schedule(10, 2, bits=8, in_backward=True)
    assert compute_utilisation(JOB, SLOW, strided) == pytest.approx(30 / 35.5)


def test_a_mean_that_has_a_whole_round_costs_nothing_until_the_link_is_never_free():
    assert compute_utilisation(JOB, SLOW, Schedule.overlapped(3, bits=8)) == 1.0
    assert compute_utilisation(JOB, SLOW, Schedule.overlapped(2, bits=8)) == pytest.approx(6 / 8)


def test_latency_is_waited_for_once_for_each_mean():
    link = Link(1.0, latency_seconds=1.0)
    assert compute_utilisation(JOB, link, Schedule.diloco(10, bits=8)) == pytest.approx(30 / 39)
    assert compute_utilisation(JOB, link, Schedule.streaming(10, 2, bits=8)) == pytest.approx(
        30 / 40
    )
    # Two means are under way at a time, and of the two limits the link's 8 s is the higher one.
    assert compute_utilisation(JOB, link, Schedule.overlapped(2, bits=8)) == pytest.approx(6 / 8)


def test_latency_alone_limits_short_rounds_in_which_a_mean_is_always_on_its_way():
    # One fragment a step, awaited a step later: 14 s of latency for two steps and two sends.
    schedule = Schedule(1, delay=1, bits=8)
    assert compute_utilisation(JOB, Link(1e9, 14.0), schedule) == pytest.approx(3 / 8.5)
    assert simulate(JOB, Link(1e9, 14.0), schedule) == pytest.approx(3 / 8.5)


def test_the_ring_sends_twice_the_values_less_one_workers_share():
    assert bits_sent(JOB, Schedule(bits=8)) == 8e9
    many = Job(3.0, 1e9, layers=4, workers=8)
    assert bits_sent(many, Schedule(bits=8)) == pytest.approx(14e9)


@st.composite
def jobs(draw_):
    # Times are whole seconds: two limits that almost tie would take a simulation for ever to tell.
    layers = draw_(st.integers(1, 4))
    backward = draw_(st.integers(0, 3)) * layers
    step = backward + draw_(st.integers(1, 6))
    return Job(step, 60.0 * layers, layers, backward_share=backward / step)


@st.composite
def settings_of(draw_, fragments_are_alike):
    job = draw_(jobs())
    link = Link(60e-9 / draw_(st.integers(1, 20)), draw_(st.integers(0, 40)))
    in_backward = draw_(st.booleans())
    if not fragments_are_alike:
        fragments = draw_(st.integers(1, job.layers))
        every = draw_(st.integers(fragments, 12))
        delay = draw_(st.integers(0, every // fragments - 1))
    else:
        divisors = [p for p in range(1, job.layers + 1) if job.layers % p == 0]
        fragments = 1 if in_backward else draw_(st.sampled_from(divisors))
        every = fragments * draw_(st.integers(1, 4))
        delay = draw_(st.integers(every // fragments, every))
    return job, link, Schedule(every, fragments, delay, bits=1.0, in_backward=in_backward)


@settings(max_examples=150, deadline=None)
@given(settings_of(fragments_are_alike=False))
def test_the_formula_is_what_happens_when_means_are_awaited_one_by_one(case):
    job, link, schedule = case
    # Every round is like the first; sums of some hundred times round at 1e-14.
    assert compute_utilisation(*case) == pytest.approx(
        simulate(job, link, schedule, rounds=3, warm_up=1), rel=1e-9
    )


@settings(max_examples=100, deadline=None)
@given(settings_of(fragments_are_alike=True))
def test_the_formula_is_what_happens_when_several_means_are_under_way(case):
    job, link, schedule = case
    # Nobody waits before the slack of the first round, its delay, is used up; limits that differ do
    # so by 1/ahead of a second or more for each send. After that, so many sends repeat themselves.
    ahead = schedule.delay // schedule.spacing + 1
    sends = int(schedule.delay * job.step_seconds * ahead) + ahead
    warm_up = -(-sends // schedule.fragments)
    seen = simulate(job, link, schedule, rounds=ahead, warm_up=warm_up)
    assert compute_utilisation(*case) == pytest.approx(seen, rel=1e-9)


@pytest.mark.parametrize("schedule", [
    Schedule.data_parallel(), Schedule.diloco(50), Schedule.streaming(50, 4, delay=3, bits=4),
    Schedule.overlapped(50),
])  # fmt: skip
@pytest.mark.parametrize("utilisation", [0.1, 0.8, 0.999])
def test_the_bandwidth_for_a_utilisation_is_the_least_that_gives_it(schedule, utilisation):
    speed = bandwidth_for(utilisation, JOB, schedule, latency_seconds=1e-3)
    assert compute_utilisation(JOB, Link(speed, 1e-3), schedule) == pytest.approx(utilisation)
    assert compute_utilisation(JOB, Link(0.999 * speed, 1e-3), schedule) < utilisation


def test_a_utilisation_that_latency_forbids_is_refused_with_the_one_that_is_left():
    with pytest.raises(ValueError, match=r"below 0\.75, which a latency of 1 s leaves.*got 0\.8"):
        bandwidth_for(0.8, JOB, Schedule.data_parallel(), latency_seconds=1.0)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Job(0.0, 1e9, 4), r"step_seconds must be in \(0, inf\), got 0\.0"),
    (lambda: Job(1.0, -1, 4), r"parameters must be in \(0, inf\), got -1"),
    (lambda: Job(1.0, 1e9, 0), "layers must be an int of at least 1, got 0"),
    (lambda: Job(1.0, 1e9, 4, backward_share=1.5), r"backward_share must be in \[0, 1\], got 1\.5"),
    (lambda: Job(1.0, 1e9, 4, workers=1), "workers must be an int of at least 2, got 1"),
    (lambda: Link(0.0), r"gbits_per_second must be in \(0, inf\), got 0\.0"),
    (lambda: Link(1.0, -1.0), r"latency_seconds must be in \[0, inf\), got -1\.0"),
    (lambda: Schedule(0), "sync_every must be an int of at least 1, got 0"),
    (lambda: Schedule(4, 5), "fragments must be at most sync_every=4, got 5"),
    (lambda: Schedule(4, delay=5), "delay must be at most sync_every=4, got 5"),
    (lambda: Schedule(bits=0), r"bits must be in \(0, inf\), got 0"),
    (lambda: bandwidth_for(1.0, JOB, Schedule()), r"utilisation must be in \(0, 1\), got 1\.0"),
    (lambda: simulate(JOB, SLOW, Schedule(), rounds=0), "rounds must be an int of at least 1"),
    (lambda: simulate(JOB, SLOW, Schedule(), warm_up=-1), "warm_up must be an int of at least 0"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("share", [compute_utilisation, simulate])
def test_more_fragments_than_layers_are_refused(share):
    with pytest.raises(ValueError, match="fragments must be at most layers=4, got 5"):
        share(JOB, SLOW, Schedule(8, 5))


def test_the_formula_refuses_fragments_that_differ_while_several_are_under_way():
    with pytest.raises(ValueError, match="divide sync_every=8 and layers=4, got 3; simulate"):
        compute_utilisation(JOB, SLOW, Schedule(8, 3, delay=2))
    with pytest.raises(ValueError, match="got fragments=2; simulate"):
        compute_utilisation(JOB, SLOW, Schedule(8, 2, delay=4, in_backward=True))


def test_the_events_take_schedules_that_the_formula_does_not():
    # Fragments of 2, 1 and 1 layers every 2 of 8 steps, awaited 4 steps later, on a link that
    # carries the 8 s of a round in less than its 24 s: nobody waits for 12 s of computing.
    assert simulate(JOB, SLOW, Schedule(8, 3, delay=4, bits=8)) == 1.0


def test_the_picture_holds_one_curve_for_each_schedule():
    axes = matplotlib.figure.Figure().subplots()
    draw(axes, JOB, {"DP": Schedule.data_parallel(), "DiLoCo": Schedule.diloco(9)}, [0.1, 1, 10])
    first, second = axes.get_lines()
    assert [first.get_label(), second.get_label()] == ["DP", "DiLoCo"]
    assert list(second.get_ydata()) == [
        compute_utilisation(JOB, Link(speed), Schedule.diloco(9)) for speed in (0.1, 1, 10)
    ]
    assert axes.get_xscale() == "log"
