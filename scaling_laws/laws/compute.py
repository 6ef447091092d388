r"""Laws of compute alone, for the envelope of many runs or for models of different makers.

``Saturating`` is $L = E + A C^{-\gamma}$ along compute-optimal runs; its floor can be held at a
known asymptote. ``ComputeOnly`` is the hypothesis that the bits per character of public models are
a line in $\ln C$ whatever was bought with it.

Traps: the floor of a saturating fit drifts with the range, from 2.01 to 1.63 as larger budgets are
added to one study. Public models differ in data and tokenizer: the scatter between families, not
the interval of the line, is the error of a prediction for a new one.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_suite.scaling_laws.law import (
    Arrays,
    Law,
    Parameter,
    Preset,
    coefficient,
    exponent,
    floor,
    power,
)

_PORIAN = (
    "Resolving Discrepancies in Compute-Optimal Scaling of Language Models, arXiv:2406.19146, 2024"
)
_GUO = "More Compute Is What You Need, arXiv:2404.19484, 2024"


def _saturating(p: Arrays, x: Arrays) -> Any:
    return p["E"] + p["A"] * power(x["C"], -p["gamma"])


Saturating = Law(
    name="saturating",
    formula="L = E + A C^-gamma",
    inputs=("C",),
    parameters=(
        coefficient("A", of={"C": "-gamma"}),
        exponent("gamma", start=(0.02, 0.6)),
        floor("E"),
    ),
    predict=_saturating,
    source=_PORIAN,
    presets={
        "porian_refinedweb": Preset(
            {"A": 128.93, "gamma": 0.10597, "E": 2.0056},
            f"{_PORIAN}; tuned RefinedWeb, optima of 1e16 to 5e17 FLOPs, recomputed from the "
            "released slices",
        )
    },
)


def _line(p: Arrays, x: Arrays) -> Any:
    return p["intercept"] + p["slope"] * jnp.log(x["C"])


ComputeOnly = Law(
    name="compute_only",
    formula="bits_per_character = intercept + slope ln C",
    inputs=("C",),
    parameters=(
        Parameter("intercept", unit="bits per character", start=(0.0, 5.0)),
        Parameter("slope", unit="bits per character", start=(-0.1, 0.0)),
    ),
    predict=_line,
    output="bits_per_character",
    source=_GUO,
    presets={
        "guo": Preset(
            {"intercept": 2.572, "slope": -0.031},
            f"{_GUO}; unverified, as is that the logarithm is natural",
        )
    },
)


def speed_up(baseline: Any, other: Any, asymptote: float, gamma: float) -> Any:
    """How many times less compute reaches the same loss, for two losses at one budget.

    ``((baseline - asymptote) / (other - asymptote))^(1/gamma)``: exact if both follow
    ``Saturating`` with that floor and exponent.

    Raises:
      ValueError: if a loss is not above the asymptote, or gamma is not positive.
    """
    above = [np.asarray(loss, np.float64) - asymptote for loss in (baseline, other)]
    if gamma <= 0 or any((excess <= 0).any() for excess in above):
        raise ValueError(
            f"losses must be above the asymptote {asymptote} and gamma positive, got {baseline}, "
            f"{other} and {gamma}"
        )
    return (above[0] / above[1]) ** (1 / gamma)
