r"""Repeated data: the Chinchilla law in effective data and size (Muennighoff et al., 2023).

With $U$ unique tokens, each further pass is worth less, and so is each parameter beyond the best
size for $U$ tokens:

$$D' = U + U R_D (1 - e^{-(D/U - 1)/R_D}), \qquad
N' = U_N + U_N R_N (1 - e^{-(N/U_N - 1)/R_N}),$$

with $U_N = \min(N, N_{opt}(U))$, $N_{opt}(U) = G (U G)^{\beta/\alpha}$ the compute-optimal size for
$U$ tokens and $G = (\alpha A / \beta B)^{1/(\alpha+\beta)}$.

The best size under a fixed $U$ has no closed form: ``Fit.compute_optimal(flops, U=...)`` searches.

Traps:

- The law cannot rise, and losses of runs with hundreds of passes do: leave them out.
- The paper holds the base law and fits ``R_D`` and ``R_N`` alone: ``fit(..., fixed=base(values))``.
  The result moves with the runs chosen: with ``U`` of 1e8 alone, 15.2 and 5.7; with all of the
  released ones ``R_N`` goes to 0 and ``R_D`` without bound.
- Runs with fewer tokens than ``U`` saw only ``D`` unique ones, and are taken so.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxopt_suite.scaling_laws.law import (
    Arrays,
    Law,
    Preset,
    coefficient,
    exponent,
    floor,
    power,
)

_PAPER = "Scaling Data-Constrained Language Models, arXiv:2305.16264, 2023"


def _saturating(unique: Any, total: Any, half: Any) -> Any:
    """``unique`` and what repeating it up to ``total`` is worth."""
    return unique + unique * half * -jnp.expm1(-(total / unique - 1) / half)


def matching_size(p: Arrays, unique: Any) -> Any:
    """The compute-optimal number of parameters for ``unique`` tokens, seen once."""
    alpha, beta = p["alpha"], p["beta"]
    scale = power(alpha * p["A"] / (beta * p["B"]), 1 / (alpha + beta))
    return scale * power(unique * scale, beta / alpha)


def effective(p: Arrays, x: Arrays) -> tuple[Any, Any]:
    """Effective size and data ``(N', D')`` of runs."""
    unique = jnp.minimum(x["U"], x["D"])
    size = jnp.minimum(x["N"], matching_size(p, unique))
    return _saturating(size, x["N"], p["R_N"]), _saturating(unique, x["D"], p["R_D"])


def _predict(p: Arrays, x: Arrays) -> Any:
    n, d = effective(p, x)
    return p["E"] + p["A"] * power(n, -p["alpha"]) + p["B"] * power(d, -p["beta"])


def base(values: Mapping[str, float]) -> dict[str, float]:
    """The parameters of the law without repetition, to hold in a fit of ``R_D`` and ``R_N``."""
    return {name: values[name] for name in ("A", "B", "E", "alpha", "beta")}


DataConstrained = Law(
    name="data_constrained",
    formula="L = E + A N'^-alpha + B D'^-beta, D' = U + U R_D (1 - exp(-(D/U - 1) / R_D)), "
    "N' likewise from N, R_N and the best size for U",
    inputs=("N", "D", "U"),
    parameters=(
        coefficient("A", of={"N": "-alpha"}),
        coefficient("B", of={"D": "-beta"}),
        floor("E"),
        exponent("alpha"),
        exponent("beta"),
        coefficient("R_D", unit="", start=(1.0, 50.0)),
        coefficient("R_N", unit="", start=(1.0, 50.0)),
    ),
    predict=_predict,
    source=_PAPER,
    presets={
        "muennighoff": Preset(
            {
                "A": math.exp(6.255414),
                "B": math.exp(7.3049974),
                "E": math.exp(0.6254804),
                "alpha": 0.3526596,
                "beta": 0.3526596,
                "R_D": 15.387756,
                "R_N": 5.309743,
            },
            f"{_PAPER}; exponents tied, the base law fitted first",
        ),
        "muennighoff_figure": Preset(
            {
                "A": math.exp(6.6229553),
                "B": math.exp(7.5856404),
                "E": math.exp(0.604038),
                "alpha": 0.3724021,
                "beta": 0.36468068,
                "R_D": 16.257626,
                "R_N": 4.9642363,
            },
            f"{_PAPER}; used for one figure, exponents not tied",
        ),
    },
)
