"""Minima of isoFLOP slices, their noise, and the frontier through them."""

import math
import statistics

import numpy as np
import pytest
from scipy import interpolate, stats

from jaxopt_suite import scaling_laws
from jaxopt_suite.scaling_laws import allocation, slices
from jaxopt_suite.scaling_laws.allocation import Optima

ALPHA, BETA = 0.34, 0.28
LEVELS = {"A": 406.4, "B": 410.7, "E": 1.69}
BUDGETS = np.geomspace(1e18, 1e21, 5)


def _best(flops, alpha=ALPHA, beta=BETA):
    scale = (alpha * LEVELS["A"] / (beta * LEVELS["B"])) ** (1 / (alpha + beta))
    return scale * (flops / 6) ** (beta / (alpha + beta))


def _runs(alpha=ALPHA, beta=BETA, noise=0.0, seed=0, offsets=None):
    """Slices of sizes within a factor of 16 around the optimum, 15 each."""
    offsets = np.geomspace(1 / 16, 16, 15) if offsets is None else offsets
    n = np.concatenate([_best(c, alpha, beta) * offsets for c in BUDGETS])
    d = np.repeat(BUDGETS, len(offsets)) / 6 / n
    loss = LEVELS["E"] + LEVELS["A"] * n**-alpha + LEVELS["B"] * d**-beta
    random = np.random.default_rng(seed).standard_normal(len(n))
    return {"N": n, "D": d, "loss": loss * np.exp(noise * random)}


@pytest.mark.parametrize(
    ("alpha", "beta", "bias"), [(0.34, 0.28, -5.1), (0.465, 0.155, -23.1), (0.31, 0.31, 0.0)]
)
def test_a_parabola_is_off_by_what_is_published_and_its_exponent_is_not(alpha, beta, bias):
    """arXiv:2603.22339: 15 points within a factor of 16, no noise; per cent to one digit."""
    found = scaling_laws.isoflop(_runs(alpha, beta), draws=0)
    for one in found.slices:
        truth = one.flops / 6 / _best(one.flops, alpha, beta)
        assert 100 * (one.d / truth - 1) == pytest.approx(bias, abs=0.1)
        assert 6 * one.n * one.d == pytest.approx(one.flops, rel=1e-12)
        # To first order in the lopsidedness the cubic finds what is missing.
        assert one.cubic.shift == pytest.approx(np.log1p(bias / 100), rel=0.1, abs=1e-9)
    assert found.a.slope == pytest.approx(beta / (alpha + beta), abs=1e-6)
    assert found.a.slope + found.b.slope == pytest.approx(1, abs=1e-12)
    assert any("lopsided" in text for text in found.warnings) == (bias != 0)


def test_the_slice_of_the_law_itself_has_no_bias():
    found = scaling_laws.isoflop(_runs(), method="law", exponents=(ALPHA, BETA), draws=0)
    for one in found.slices:
        assert one.n == pytest.approx(_best(one.flops), rel=1e-9)
    assert found.unconstrained == pytest.approx((0.4516129, 0.5483871), abs=1e-6)
    # On exact budgets both searches are one, whatever the noise.
    noisy = scaling_laws.isoflop(_runs(noise=0.004), method="law", exponents=(ALPHA, BETA), draws=0)
    assert sum(noisy.unconstrained) == pytest.approx(1, abs=1e-9)


def test_the_minimum_over_tokens_is_the_one_over_sizes_seen_from_the_other_side():
    runs, curve = _runs(), slices.Curve("law", (ALPHA, BETA))
    n, d, loss = (runs[name][:15] for name in ("N", "D", "loss"))
    found = curve.mirrored.minima(np.log(d), loss[None])
    assert found.at[0] == pytest.approx(np.log(BUDGETS[0] / 6 / _best(BUDGETS[0])), rel=1e-9)
    tilted = curve.minima(np.log(n), (loss * np.linspace(0.97, 1.03, 15))[None])
    again = curve.mirrored.minima(np.log(d), (loss * np.linspace(0.97, 1.03, 15))[None])
    assert tilted.at[0] + again.at[0] == pytest.approx(np.log(BUDGETS[0] / 6), rel=1e-9)


def test_akima_curves_and_their_minima_are_those_of_scipy():
    rng = np.random.default_rng(0)
    x = np.sort(rng.uniform(0, 5, 9))
    losses = (x - 2.3) ** 2 + 3 * rng.standard_normal((40, 9))
    curve = slices.Curve("akima")
    found = curve.minima(x, losses)
    at = np.linspace(x[0], x[-1], 4001)
    for i, y in enumerate(losses):
        values = interpolate.Akima1DInterpolator(x, y)(np.minimum(at, x[-1]))
        np.testing.assert_allclose(curve.draw(x, y, at), values, atol=1e-12)
        k = int(values.argmin())
        assert found.side[i] == (-1 if k == 0 else 1 if k == 4000 else 0)
        if found.side[i] == 0:
            assert found.at[i] == pytest.approx(at[k], abs=5 / 4000)  # the grid's step
            assert found.value[i] <= values[k]
    assert 0 < np.count_nonzero(found.side) < 40


def test_repeats_say_how_noisy_losses_are_and_cubics_do_where_there_are_none():
    runs = [_runs(noise=0.004, seed=seed) for seed in range(3)]
    together = {name: np.concatenate([one[name] for one in runs]) for name in runs[0]}
    repeated = scaling_laws.isoflop(together, window=8, draws=10)
    # 150 degrees of freedom: a standard deviation of 6 %, and the power of loss takes a little.
    assert "repeats" in repeated.noise.source
    assert repeated.noise.sd == pytest.approx(0.004, rel=0.2)
    alone = scaling_laws.isoflop(runs[0], window=8, draws=10)
    assert "cubics" in alone.noise.source
    assert alone.noise.sd == pytest.approx(0.004, rel=0.3)  # about 40 degrees of freedom


def test_intervals_from_redrawn_noise_hold_what_the_method_estimates():
    """90 % intervals of the exponent over 60 data sets: at least 85 % less twice the error."""
    held, widths = [], []
    for seed in range(60):
        runs = _runs(noise=0.004, seed=seed, offsets=np.geomspace(1 / 8, 8, 9))
        found = scaling_laws.isoflop(runs, noise=0.004, draws=200, floor=0.0, seed=seed)
        low, high = found.a.interval
        held.append(low < BETA / (ALPHA + BETA) < high)
        widths.append(high - low)
    assert 0.77 <= np.mean(held) <= 1.0
    assert max(widths) < 0.06


def test_draws_beyond_the_sizes_are_kept_and_said():
    """The minimum near the edge, and noise that throws it over."""
    offsets = np.geomspace(1 / 1.35, 16, 9)
    found = scaling_laws.isoflop(_runs(offsets=offsets), noise=0.004, draws=400, level=0.98)
    assert max(one.censored[0] for one in found.slices) > 0.02
    assert any(one.interval[0] == 0 for one in found.slices)
    assert all(one.interval[1] < math.inf for one in found.slices)
    assert np.isfinite(found.a.slopes).all()


def test_a_censored_line_is_the_likeliest_one():
    """Against a direct search of Tobin's likelihood."""
    rng = np.random.default_rng(0)
    x = np.linspace(-2, 2, 7)
    y = 0.5 * x + 0.3 * rng.standard_normal(7)
    sd = np.linspace(0.2, 0.4, 7)
    edge = np.where(x > 0.5, 0.4, y)  # the last three are only known to lie above 0.4
    side = (x > 0.5).astype(int)

    def loglik(a, b):
        z = (edge - a - b * x) / sd
        return np.where(side > 0, stats.norm.logsf(z), stats.norm.logpdf(z)).sum()

    (found,) = allocation.censored_lines(x, Optima(edge[None], side[None], sd))
    best = loglik(*found)
    for step in (1e-3, 1e-2):  # no better neighbour in any direction
        for angle in np.linspace(0, 2 * np.pi, 12):
            near = loglik(found[0] + step * np.cos(angle), found[1] + step * np.sin(angle))
            assert near < best, (step, angle)
    assert found[1] > np.polyfit(x, edge, 1)[0]  # what is cut off at the edge is flatter


def test_a_line_without_draws_has_students_interval():
    flops, rng = np.geomspace(1e18, 1e21, 6), np.random.default_rng(1)
    y = 2 + 0.5 * np.log(flops) + 0.05 * rng.standard_normal(6)
    line = allocation.regress(flops, y, None, floor=0.0, level=0.9)
    expected = stats.linregress(np.log(flops), y)
    reach = stats.t.ppf(0.95, 4) * expected.stderr
    assert line.slope == pytest.approx(expected.slope, rel=1e-10)
    assert line.intercept == pytest.approx(expected.intercept, rel=1e-8)
    assert line.interval == pytest.approx((expected.slope - reach, expected.slope + reach))
    bent = allocation.regress(flops, y - 0.05 * np.log(flops / 3e19) ** 2, None, floor=0, level=0.9)
    assert bent.curvature == pytest.approx(line.curvature - 0.05, abs=1e-12)
    assert abs(bent.curvature_t) > 3


def test_another_count_of_flops_gives_the_tokens_that_spend_the_budget():
    rule = lambda n, d: 6 * (n + 3e6) * d
    runs = _runs()
    runs["D"] = np.repeat(BUDGETS, 15) / 6 / (runs["N"] + 3e6)
    found = scaling_laws.isoflop(runs, rule=rule, draws=0)
    for one in found.slices:
        assert rule(one.n, one.d) == pytest.approx(one.flops, rel=1e-9)  # 60 bisections of 32 nats
    with pytest.raises(ValueError, match="must agree with the FLOP rule"):
        scaling_laws.isoflop(runs | {"C": 2 * np.repeat(BUDGETS, 15)}, rule=rule)


def test_what_cannot_be_answered_is_refused_by_type():
    falling = _runs(offsets=np.geomspace(1 / 64, 1 / 4, 9))
    with pytest.raises(scaling_laws.NoInteriorOptimum, match="train sizes above"):
        scaling_laws.isoflop(falling)
    with pytest.raises(scaling_laws.TooFewSlices, match="got 0 of 5"):
        scaling_laws.isoflop(falling, on_edge="drop")
    with pytest.raises(scaling_laws.TooFewSlices):
        scaling_laws.isoflop(_runs(), budgets=BUDGETS[:2].tolist())
    with pytest.raises(scaling_laws.TooFewRuns, match="3 sizes"):
        scaling_laws.isoflop(_runs(offsets=np.array([0.5, 2.0])))
    for options, match in (
        ({"method": "spline"}, "method"),
        ({"method": "law"}, "exponents"),
        ({"window": 0.5}, "window"),
        ({"budgets": [1e30]}, "no runs within"),
        ({"on_edge": "ignore"}, "on_edge"),
    ):
        with pytest.raises(ValueError, match=match):
            scaling_laws.isoflop(_runs(), **options)


def test_one_bad_slice_can_be_left_out():
    runs = _runs()
    first = 6 * runs["N"] * runs["D"] < 2e18
    keep = ~first | (runs["N"] < _best(1e18) / 2)
    found = scaling_laws.isoflop({k: v[keep] for k, v in runs.items()}, on_edge="drop", draws=0)
    assert (len(found.slices), len(found.refused)) == (4, 1)
    assert "1e+18" in str(found)
    assert statistics.mean(found.unconstrained) == pytest.approx(0.5, abs=1e-6)
