"""Laws of compute alone, and schedules of shapes."""

import numpy as np
import pytest

from jaxopt_suite.scaling_laws import laws
from jaxopt_suite.scaling_laws.double import in_double
from jaxopt_suite.scaling_laws.laws import compute
from jaxopt_suite.scaling_laws.refusals import FitRefused

SHAPES = laws.shape_adaptive
SMALL = {"a": 40.0, "b": 0.2, "c": 0.30, "d": 1e10}
LARGE = {"a": 4000.0, "b": 0.3, "c": 0.10, "d": 1e12}
RANGES = {"small": (0.31, 0.9), "large": (0.12, 0.9)}


def test_the_published_envelope_at_a_budget_by_hand():
    values = laws.Saturating.presets["porian_refinedweb"].values
    found = in_double(laws.Saturating.predict)(values, {"C": np.array([1e18])})
    assert float(found[0]) == pytest.approx(128.93 * 1e18**-0.10597 + 2.0056)


def test_a_speed_up_of_four_is_found_from_two_losses():
    loss = lambda c: 1.7 + 50 * c**-0.1
    assert compute.speed_up(loss(1e20), loss(4e20), 1.7, 0.1) == pytest.approx(4)
    with pytest.raises(ValueError, match="above the asymptote"):
        compute.speed_up(1.6, 2.0, 1.7, 0.1)


def test_compute_to_reach_inverts_the_law_and_price_is_its_slope():
    errors = np.array([0.35, 0.5, 0.8])
    flops = SHAPES.compute_to_reach(LARGE, errors)
    back = in_double(laws.ShapeAdaptive.predict)(LARGE, {"C": flops})
    np.testing.assert_allclose(back, errors, rtol=1e-12)
    step = 1e-6
    rise = SHAPES.compute_to_reach(LARGE, errors - step) - SHAPES.compute_to_reach(
        LARGE, errors + step
    )
    np.testing.assert_allclose(SHAPES.price(LARGE, errors), rise / (2 * step), rtol=1e-6)
    assert SHAPES.price(LARGE, 0.05) == np.inf == SHAPES.compute_to_reach(LARGE, 0.05)


def test_a_schedule_changes_shape_where_prices_cross_and_costs_least():
    stages = SHAPES.schedule({"small": SMALL, "large": LARGE}, RANGES, start=0.8, end=0.2)
    assert [stage.shape for stage in stages] == ["small", "large"]
    crossing = stages[0].end
    prices = [SHAPES.price(p, crossing) for p in (SMALL, LARGE)]
    assert prices[0] == pytest.approx(prices[1], rel=0.01)  # one of 4000 steps in the error
    alone = SHAPES.compute_to_reach(LARGE, 0.2) - SHAPES.compute_to_reach(LARGE, 0.8)
    total = sum(stage.flops for stage in stages)
    assert total < alone
    for other in (0.95 * crossing, 1.05 * crossing):
        moved = SHAPES.compute_to_reach(SMALL, other) - SHAPES.compute_to_reach(SMALL, 0.8)
        moved += SHAPES.compute_to_reach(LARGE, 0.2) - SHAPES.compute_to_reach(LARGE, other)
        assert moved > total


def test_a_schedule_stays_inside_the_fitted_errors():
    shapes = {"small": SMALL, "large": LARGE}
    with pytest.raises(FitRefused, match="no shape has runs"):
        SHAPES.schedule(shapes, RANGES, start=0.8, end=0.11)
    only = SHAPES.schedule(shapes, RANGES | {"small": (0.6, 0.9)}, start=0.8, end=0.2)
    assert only[0].shape == "small"
    assert only[0].end == pytest.approx(0.6, rel=1e-3)
    with pytest.raises(ValueError, match="must fall"):
        SHAPES.schedule(shapes, RANGES, start=0.2, end=0.8)
    with pytest.raises(ValueError, match="range for each"):
        SHAPES.schedule(shapes, {"small": (0.1, 1)}, start=0.8, end=0.2)
