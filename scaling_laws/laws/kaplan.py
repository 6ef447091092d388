r"""The laws of Kaplan et al. (2020): loss against size, data, compute and steps, and B_crit.

Units: $N$ counts the body alone, without embeddings and output head; data and batches are in
tokens; compute is in FLOPs here (the paper's PF-days times ``PF_DAY``).

Traps:

- The paper has three sets of values that disagree: the one of single trends, the joint one of
  $L(N, D)$, and that of learning curves. The data exponent 0.74 needs the joint one.
- No law has an irreducible part: below a loss of about 1.7 they cannot hold.
- $B_{crit}$ depends on the loss, so that $S_{min}$ and $C_{min}$ change along a curve.
- Learning curves are read in the middle of a schedule.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxopt_suite.scaling_laws.law import (
    Arrays,
    Law,
    Parameter,
    Preset,
    coefficient,
    exponent,
    power,
)

PF_DAY = 8.64e19  # FLOPs of a petaflop per second held for a day

_PAPER = "Scaling Laws for Neural Language Models, arXiv:2001.08361, 2020"
_READ = f"{_PAPER}; agreeing in several transcriptions, not checked against the paper"
_SCALES = (1e9, 1e16)  # where starts of N_c, D_c are spread


def _scale(name: str, unit: str, start: tuple[float, float] = _SCALES) -> Parameter:
    return coefficient(name, unit=unit, start=start)


def _slope(name: str, start: tuple[float, float] = (0.02, 0.5)) -> Parameter:
    return exponent(name, start=start)


def _trend(
    name: str,
    column: str,
    scale: Parameter,
    slope: str,
    presets: Mapping[str, Preset],
) -> Law:
    """``L = (X_c / X)^alpha`` in one column."""

    def predict(p: Arrays, x: Arrays) -> Any:
        return power(p[scale.name] / x[column], p[slope])

    return Law(
        name=name,
        formula=f"L = ({scale.name} / {column})^{slope}",
        inputs=(column,),
        parameters=(scale, _slope(slope)),
        predict=predict,
        source=_PAPER,
        presets=presets,
    )


KaplanSize = _trend(
    "kaplan_size",
    "N",
    _scale("N_c", "parameters"),
    "alpha_N",
    {"kaplan": Preset({"N_c": 8.8e13, "alpha_N": 0.076}, _READ)},
)
KaplanData = _trend(
    "kaplan_data",
    "D",
    _scale("D_c", "tokens"),
    "alpha_D",
    {"kaplan": Preset({"D_c": 5.4e13, "alpha_D": 0.095}, f"{_READ}; early stopped")},
)
KaplanCompute = _trend(
    "kaplan_compute",
    "C",
    _scale("C_c", "FLOP", (1e20, 1e32)),
    "alpha_C",
    {
        "kaplan": Preset({"C_c": 1.6e7 * PF_DAY, "alpha_C": 0.057}, f"{_READ}; batch of 2^19"),
        "kaplan_min": Preset(
            {"C_c": 3.1e8 * PF_DAY, "alpha_C": 0.050}, f"{_READ}; of C_min, see minimum_compute"
        ),
    },
)


def _predict_joint(p: Arrays, x: Arrays) -> Any:
    size = power(p["N_c"] / x["N"], p["alpha_N"] / p["alpha_D"])
    return power(size + p["D_c"] / x["D"], p["alpha_D"])


Kaplan = Law(
    name="kaplan",
    formula="L = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D",
    inputs=("N", "D"),
    parameters=(
        _scale("N_c", "parameters"),
        _scale("D_c", "tokens"),
        _slope("alpha_N"),
        _slope("alpha_D"),
    ),
    predict=_predict_joint,
    source=_PAPER,
    presets={
        "kaplan": Preset({"N_c": 6.4e13, "D_c": 1.8e13, "alpha_N": 0.076, "alpha_D": 0.103}, _READ)
    },
)


def _predict_steps(p: Arrays, x: Arrays) -> Any:
    return power(p["N_c"] / x["N"], p["alpha_N"]) + power(p["S_c"] / x["S_min"], p["alpha_S"])


KaplanSteps = Law(
    name="kaplan_steps",
    formula="L = (N_c / N)^alpha_N + (S_c / S_min)^alpha_S",
    inputs=("N", "S_min"),
    parameters=(
        _scale("N_c", "parameters"),
        _scale("S_c", "steps", (1e1, 1e6)),
        _slope("alpha_N"),
        _slope("alpha_S", (0.1, 1.5)),
    ),
    predict=_predict_steps,
    source=_PAPER,
    presets={
        "kaplan": Preset({"N_c": 6.5e13, "S_c": 2.1e3, "alpha_N": 0.077, "alpha_S": 0.76}, _READ)
    },
)


def _predict_batch(p: Arrays, x: Arrays) -> Any:
    return p["B_star"] * power(x["loss"], -1 / p["alpha_B"])


KaplanCriticalBatch = Law(
    name="kaplan_critical_batch",
    formula="B_crit = B_star L^(-1 / alpha_B)",
    inputs=("loss",),
    parameters=(coefficient("B_star", unit="tokens", start=(1e5, 1e11)), _slope("alpha_B")),
    predict=_predict_batch,
    output="critical_batch",
    source=_PAPER,
    presets={"kaplan": Preset({"B_star": 2.1e8, "alpha_B": 0.21}, _READ)},
)

JOINT = Kaplan.presets["kaplan"].values
STEPS = KaplanSteps.presets["kaplan"].values
BATCH = KaplanCriticalBatch.presets["kaplan"].values


def critical_batch(loss: Any, batch: Mapping[str, float] = BATCH) -> Any:
    """Tokens of the batch that costs twice the least steps and twice the least data."""
    return batch["B_star"] * np.asarray(loss, np.float64) ** (-1 / batch["alpha_B"])


def minimum_steps(steps: Any, batch_tokens: Any, loss: Any) -> Any:
    """``S_min``: steps that a batch far above ``critical_batch(loss)`` would have taken."""
    return steps / (1 + critical_batch(loss) / batch_tokens)


def minimum_compute(flops: Any, batch_tokens: Any, loss: Any) -> Any:
    """``C_min``: FLOPs that a batch far below ``critical_batch(loss)`` would have taken."""
    return flops / (1 + batch_tokens / critical_batch(loss))


def overfitting(n: Any, d: Any, joint: Mapping[str, float] = JOINT) -> Any:
    """The loss of ``L(N, D)`` over that of unlimited data, less one."""
    ratio = joint["alpha_N"] / joint["alpha_D"]
    share = (n / joint["N_c"]) ** ratio * joint["D_c"] / d
    return (1 + share) ** joint["alpha_D"] - 1


def least_stopping_step(
    n: Any, d: Any, joint: Mapping[str, float] = JOINT, steps: Mapping[str, float] = STEPS
) -> Any:
    """A lower bound of the step at which a run on ``d`` tokens should stop early."""
    unlimited = (joint["N_c"] / n) ** joint["alpha_N"]
    excess = unlimited * overfitting(n, d, joint)
    return steps["S_c"] * excess ** (-1 / steps["alpha_S"])


@dataclasses.dataclass(frozen=True)
class Allocation:
    """How a budget is spent; arrays have the shape of the budget.

    Attributes:
      n: parameters of the body.
      batch_tokens: batch.
      steps: ``S_min``, steps at a batch far above the critical one.
      d: tokens.
    """

    n: Any
    batch_tokens: Any
    steps: Any
    d: Any


def allocation(flops: Any) -> Allocation:
    """The paper's fitted allocation of ``C_min`` FLOPs.

    Steps and data are those of ideal batches; at the critical batch both are twice that.
    """
    days = np.asarray(flops, np.float64) / PF_DAY
    return Allocation(1.3e9 * days**0.73, 2.0e6 * days**0.24, 5.4e3 * days**0.03, 2e10 * days**0.27)


def optimal_allocation(
    flops: Any, steps: Mapping[str, float] = STEPS, batch: Mapping[str, float] = BATCH
) -> Allocation:
    """The best spending of ``C_min = 6 N B_crit(L) S_min`` that ``L(N, S_min)`` implies.

    Training stops where the loss is ``1 + alpha_N / alpha_S`` times its value after infinitely many
    steps; with that, FLOPs are a power of ``N`` and the root has a closed form.
    """
    share = steps["alpha_N"] / steps["alpha_S"]

    def spend(n: Any) -> Allocation:
        floor = (steps["N_c"] / n) ** steps["alpha_N"]
        count = steps["S_c"] * (share * floor) ** (-1 / steps["alpha_S"])
        size = critical_batch((1 + share) * floor, batch)
        return Allocation(n, size, count, size * count)

    rise = 1 + steps["alpha_N"] / batch["alpha_B"] + share
    unit = spend(1.0)
    return spend((np.asarray(flops, np.float64) / (6 * unit.d)) ** (1 / rise))


def compute_exponent(
    steps: Mapping[str, float] = STEPS, batch: Mapping[str, float] = BATCH
) -> float:
    """Exponent of the loss in ``C_min``: ``1 / (1/alpha_S + 1/alpha_B + 1/alpha_N)``."""
    return 1 / (1 / steps["alpha_S"] + 1 / batch["alpha_B"] + 1 / steps["alpha_N"])
