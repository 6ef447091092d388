"""The numbers of a comparison, recomputed by hand from planted runs."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest

from jaxopt_suite.experiments import table
from jaxopt_suite.experiments.table import Rate, Run

LOSSES = {
    # Final losses 2.0 and 2.2: mean 2.1, sample standard deviation 0.1 * sqrt(2).
    ("adamw", 0): (5.0, 3.0, 2.4, 2.0),
    ("adamw", 1): (5.0, 3.2, 2.6, 2.2),
    # Mean curve 5.0, 2.5, 2.0, 1.5: at 2.1 four fifths of the way from step 10 to step 20.
    ("fast", 0): (5.0, 2.4, 1.9, 1.4),
    ("fast", 1): (5.0, 2.6, 2.1, 1.6),
    ("slow", 0): (5.0, 4.0, 3.5, 3.0),
    ("slow", 1): (5.0, 4.0, 3.5, 3.2),
}


def make_run(
    optimizer: str, seed: int, losses: Sequence[float], *, diverged_at: int | None = None
) -> Run:
    """A run that was evaluated every 10 steps, a step taking 0.1 s with seed 0 and 0.3 s with 1."""
    steps = tuple(10 * i for i in range(len(losses)))
    pace = 0.1 + 0.2 * seed
    return Run(
        optimizer=optimizer,
        seed=seed,
        learning_rate=1e-3,
        steps=steps,
        seconds=tuple(pace * step for step in steps),
        val_loss=tuple(losses),
        ms_per_step=1000 * pace,
        state_bytes=804,
        n_params=100,
        diverged_at=diverged_at,
    )


def make_table(*absent: str, **replaced: Run) -> table.Table:
    names = [name for name in ("adamw", "fast", "slow") if name not in absent]
    runs = [make_run(name, seed, losses) for (name, seed), losses in LOSSES.items()]
    runs = [replaced.get(f"{run.optimizer}_{run.seed}", run) for run in runs]
    chosen = [run for run in runs if run.optimizer in names]
    return table.summarize(chosen, {name: Rate(1e-3, "tuned default") for name in names})


def row_of(summary: table.Table, name: str) -> table.Row:
    return next(row for row in summary.rows if row.optimizer == name)


def test_mean_spread_and_difference_are_those_worked_out_by_hand():
    summary = make_table()
    assert [row.optimizer for row in summary.rows] == ["fast", "adamw", "slow"]
    fast = row_of(summary, "fast")
    # Binary rounding of decimal losses only.
    assert fast.mean == pytest.approx(1.5, rel=1e-12)
    assert fast.spread == pytest.approx(0.1 * math.sqrt(2), rel=1e-12)
    assert fast.difference == pytest.approx(-0.6, rel=1e-12)
    assert fast.state_bytes_per_param == 8.04
    assert fast.ms_per_step == pytest.approx(200.0)


def test_crossing_is_interpolated_between_evaluations_on_the_mean_curve():
    fast = row_of(make_table(), "fast")
    assert fast.steps_to_baseline == pytest.approx(18.0, rel=1e-12)
    assert fast.seconds_to_baseline == pytest.approx(18.0 * 0.2, rel=1e-12)


def test_the_baseline_reaches_its_own_loss_at_its_last_step():
    adamw = row_of(make_table(), "adamw")
    assert adamw.steps_to_baseline == 30.0
    assert adamw.difference == 0.0
    assert table.cells(adamw, make_table())[2:4] == ("baseline", "30")


def test_a_loss_never_reached_is_said_to_be_so_and_is_no_number():
    summary = make_table()
    slow = row_of(summary, "slow")
    assert slow.steps_to_baseline is None
    assert slow.seconds_to_baseline is None
    assert table.cells(slow, summary)[3:5] == ("not reached", "not reached")


def test_without_adamw_its_columns_say_so_instead_of_zero():
    summary = make_table("adamw")
    for row in summary.rows:
        assert row.difference is None
        assert table.cells(row, summary)[2:5] == ("no adamw in the list",) * 3


def test_one_seed_has_no_spread():
    run = make_run("fast", 0, LOSSES["fast", 0])
    summary = table.summarize([run], {"fast": Rate(1e-3, "given")})
    assert summary.rows[0].spread is None
    assert "±" not in table.cells(summary.rows[0], summary)[1]


def test_a_diverged_run_is_infinite_comes_last_and_says_at_which_step():
    diverged = make_run("fast", 1, (5.0, 2.6), diverged_at=14)
    summary = make_table(fast_1=diverged)
    assert summary.rows[-1].optimizer == "fast"
    fast = summary.rows[-1]
    assert (fast.mean, fast.spread, fast.difference) == (None, None, None)
    assert fast.losses == (1.4, None)
    assert table.cells(fast, summary)[1] == "diverged at step 14 (1 of 2 seeds)"


def test_a_diverged_baseline_is_named_as_the_reason_for_the_missing_columns():
    summary = make_table(adamw_0=make_run("adamw", 0, (), diverged_at=3))
    assert summary.baseline_loss is None
    assert table.cells(row_of(summary, "fast"), summary)[2] == "adamw diverged"
    assert table.cells(row_of(summary, "adamw"), summary)[1].startswith("diverged at step 3")


@pytest.mark.parametrize(
    ("losses", "target", "expected"),
    [
        ((3.0, 2.0, 1.0), 1.5, 1.5),
        ((3.0, 2.0, 1.0), 2.0, 1.0),
        ((3.0, 2.0, 1.0), 4.0, 0.0),
        ((3.0, 2.0, 1.0), 0.5, None),
        ((3.0, 1.0, 2.0, 0.5), 1.5, 0.75),  # the first time, though it is lost again
        ((), 1.0, None),
    ],
)
def test_first_reach(losses: tuple[float, ...], target: float, expected: float | None):
    assert table.first_reach(losses, target) == expected


def test_curve_holds_the_mean_and_the_range_over_seeds():
    curve = make_table().curves["fast"]
    # Means of decimal fractions: binary rounding only.
    np.testing.assert_allclose(curve.mean, [5.0, 2.5, 2.0, 1.5], rtol=1e-12)
    np.testing.assert_array_equal(curve.low, [5.0, 2.4, 1.9, 1.4])
    np.testing.assert_array_equal(curve.high, [5.0, 2.6, 2.1, 1.6])


def test_what_crosses_between_devices_has_a_column_on_a_mesh_only():
    alone = make_table()
    assert all(row.wire_bytes is None for row in alone.rows)
    runs = {
        f"{name}_{seed}": dataclasses.replace(
            make_run(name, seed, losses),
            mesh="data=8",
            wire_bytes=12345.0,
            largest_wire_bytes=5e6,
        )
        for (name, seed), losses in LOSSES.items()
    }
    on_mesh = make_table(**runs)
    assert table.headings(on_mesh)[:-3] == table.headings(alone)
    # A step takes 0.2 s, the median of 0.1 and 0.3: 4e7 bits are 0.2 Gbit/s, 98760 half a Mbit/s.
    cells = ("12,345", "5,000,000", "0.2 (0.000494)")
    assert [table.cells(row, on_mesh)[-3:] for row in on_mesh.rows] == [cells] * 3
    assert on_mesh.curves["fast"].sent.tolist() == [0.0, 123450.0, 246900.0, 370350.0]
    assert len(table.cells(alone.rows[0], alone)) == len(table.headings(alone))


def test_entropy_statement_names_who_is_below_and_who_is_not():
    text = table.entropy_statement(make_table(), 2.5)
    assert "2.5000 nats per byte" in text
    assert "Below it: fast, adamw." in text
    assert "Not below it: slow." in text
