"""The lower envelope of training curves."""

import numpy as np
import pytest

from jaxopt_suite import scaling_laws

RECORDS = 120


def _curves(sizes=25, noise=0.0, seed=0):
    """Curves of a law with a frontier exponent of 0.28 / 0.62, from 0.3 to 300 tokens a size."""
    n = np.repeat(np.geomspace(1e7, 1e10, sizes), RECORDS)
    d = n * np.tile(np.geomspace(0.3, 300, RECORDS), sizes)
    loss = 1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28
    random = np.random.default_rng(seed).standard_normal(len(n))
    ids = np.repeat([f"run{i}" for i in range(sizes)], RECORDS)
    return {"run_id": ids, "N": n, "D": d, "loss": loss * np.exp(noise * random)}


def test_the_envelope_finds_the_frontier_of_the_law():
    found = scaling_laws.envelope(_curves(), budgets=100, draws=50)
    # Sizes are a quarter of a decade apart, over three decades of them.
    assert found.a.slope == pytest.approx(0.28 / 0.62, abs=0.02)
    assert found.a.slope + found.b.slope == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(6 * found.n * found.d, found.flops, rtol=1e-9)
    law = 1.69 + 406.4 * found.n**-0.34 + 410.7 * found.d**-0.28
    np.testing.assert_allclose(found.loss, law, rtol=1e-3)  # read between records
    assert found.a.interval[0] < found.a.slope < found.a.interval[1]


def test_smoothing_lifts_the_lowest_of_noisy_curves_back_up():
    curves = _curves(noise=0.01)
    raw = scaling_laws.envelope(curves, draws=0)
    smooth = scaling_laws.envelope(curves, smooth=0.2, draws=0)
    bias = [np.mean(np.log(e.loss / _law(e))) for e in (raw, smooth)]
    assert bias[0] < -0.005  # one noise standard deviation is 0.01
    assert abs(bias[1]) < 0.5 * abs(bias[0])


def test_smoothing_leaves_curves_without_noise_where_they_are():
    """A mean to both sides cancels the slope: to one side only it would be 0.003 off."""
    smooth = scaling_laws.envelope(_curves(), smooth=0.2, draws=0)
    middle = slice(5, -5)  # the first and last records have neighbours on one side only
    np.testing.assert_allclose(smooth.loss[middle], _law(smooth)[middle], rtol=1.5e-3)


def _law(found):
    return 1.69 + 406.4 * found.n**-0.34 + 410.7 * found.d**-0.28


def test_only_winners_late_in_their_schedule_count_if_asked():
    """Each size with twelve lengths, a factor of 1.8 apart: one is always in its second half."""
    whole = _curves()
    assert scaling_laws.envelope(whole, draws=0).progress.min() < 0.5
    parts = []
    for i, end in enumerate(0.4 * 1.8 ** np.arange(12)):
        keep = whole["D"] <= end * whole["N"]
        ids = np.char.add(whole["run_id"][keep], f"-{i}")
        parts.append({name: values[keep] for name, values in whole.items()} | {"run_id": ids})
    runs = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    late = scaling_laws.envelope(runs, late=0.5, draws=0)
    assert 0.5 * (1 - 1e-6) <= late.progress.min() < 0.6
    assert late.a.slope == pytest.approx(0.28 / 0.62, abs=0.02)


def test_what_is_no_envelope_is_refused():
    with pytest.raises(scaling_laws.TooFewSlices, match=r"got [012]"):
        scaling_laws.envelope(_curves(sizes=3))
    curves = _curves(sizes=5)
    with pytest.raises(ValueError, match="run_id"):
        scaling_laws.envelope({k: v for k, v in curves.items() if k != "run_id"})
    with pytest.raises(ValueError, match="must have one N"):
        scaling_laws.envelope(curves | {"run_id": np.repeat("one", 5 * RECORDS)})
    with pytest.raises(ValueError, match="late"):
        scaling_laws.envelope(curves, late=2)
