r"""The batch beyond which more data per step stops paying: trade-off curves and their trend.

Steps to a fixed target loss with a batch of $B$ examples (McCandlish et al., 2018):

$$S(B) = S_{min} + E_{min} / B, \qquad (S/S_{min} - 1)(E/E_{min} - 1) = 1, \quad E = B S,$$

so that the critical batch $E_{min}/S_{min}$ costs twice the least steps and twice the least
examples. Zhang et al. (2024) take the largest batch whose steps exceed linear scaling from a small
one by a share $\theta$, which has the closed form of ``overhead_batch``.

Batches may be in examples, sequences or tokens; ``E_min`` has the same unit. Zhang's presets are in
sequences of 512 tokens, Kaplan's ``B_crit`` (``laws.kaplan``) in tokens.

Traps: with $\theta$ the exponent of the trend in $N$ moves: 0.39 at 0.1, 0.47 at 0.2, 0.53 at 0.5,
0.62 for $E_{min}/S_{min}$, as the part $(1 + \theta) B_0$ flattens small models. Steps are known to
the interval between evaluations only. Every batch size needs its own learning rate. Fit with
``squares()``: counts are few, and the trends are lines in logarithms.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxopt_suite import core
from jaxopt_suite.scaling_laws.law import Arrays, Law, Preset, coefficient, exponent, power

_LARGE_BATCH = "An Empirical Model of Large-Batch Training, arXiv:1812.06162, 2018"
_CRITICAL = "How Does Critical Batch Size Scale in Pre-training?, arXiv:2410.21676, 2024"
THETA = 0.2
BASE = 256.0  # sequences: Zhang's batch from which steps fall in proportion


def _steps(p: Arrays, x: Arrays) -> Any:
    return p["S_min"] + p["E_min"] / x["batch"]


StepsToTarget = Law(
    name="steps_to_target",
    formula="steps = S_min + E_min / batch",
    inputs=("batch",),
    parameters=(
        coefficient("S_min", unit="steps", start=(10.0, 1e6)),
        coefficient("E_min", unit="examples", start=(1e4, 1e12)),
    ),
    predict=_steps,
    output="steps",
    source=_LARGE_BATCH,
)


def critical_batch(values: Mapping[str, Any]) -> Any:
    """``E_min / S_min``, in the unit of the batches."""
    return values["E_min"] / values["S_min"]


def overhead_batch(values: Mapping[str, Any], *, base: float = BASE, theta: float = THETA) -> Any:
    """The batch whose steps exceed ``S(base) base / batch`` by a share ``theta``.

    ``(1 + theta) base + theta E_min / S_min``; ``values`` may hold draws.
    """
    core.check_number("base", base, low=0.0, low_open=True)
    core.check_number("theta", theta, low=0.0, low_open=True)
    return (1 + theta) * base + theta * critical_batch(values)


def both_sides(values: Mapping[str, float], batches: Any) -> bool:
    """Whether batches lie on both sides of the critical one, without which it is a guess."""
    at = critical_batch(values)
    return bool(np.min(batches) < at < np.max(batches))


def _trend(name: str, column: str, presets: Mapping[str, Preset]) -> Law:
    return Law(
        name=name,
        formula=f"critical batch = c {column}^p",
        inputs=(column,),
        parameters=(
            coefficient("c", unit="batch", of={column: "p"}),
            exponent("p", start=(0.05, 1.0), bounds=(-10.0, 10.0)),
        ),
        predict=lambda p, x: p["c"] * power(x[column], p["p"]),
        output="critical_batch",
        source=_CRITICAL,
        presets=presets,
    )


_SIZE_PRESETS = {
    "zhang": Preset(
        {"c": 93.20 * 1e6**-0.47, "p": 0.47},
        f"{_CRITICAL}; size and data grown together, theta 0.2; printed for millions",
    ),
    "zhang_fixed_data": Preset(
        {"c": 621.341 * 1e6**-0.087, "p": 0.087},
        f"{_CRITICAL}; data held; printed for millions; from a transcription",
    ),
}
_DATA_PRESETS = {
    "zhang": Preset(
        {"c": 22.91 * 1e9**-0.47, "p": 0.47},
        f"{_CRITICAL}; printed for billions of tokens; unverified",
    )
}
CriticalBatchBySize = _trend("critical_batch_by_size", "N", _SIZE_PRESETS)
CriticalBatchByData = _trend("critical_batch_by_data", "D", _DATA_PRESETS)
