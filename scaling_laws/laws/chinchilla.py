"""The parametric loss law of Hoffmann et al.: L(N, D) = E + A N^-alpha + B D^-beta."""

import math
from typing import Any

from jaxopt_suite.scaling_laws.law import (
    Arrays,
    Law,
    Preset,
    coefficient,
    exponent,
    floor,
    power,
)


def _predict(p: Arrays, x: Arrays) -> Any:
    return p["E"] + p["A"] * power(x["N"], -p["alpha"]) + p["B"] * power(x["D"], -p["beta"])


def _optimum(p: Arrays, flops: Any) -> tuple[Any, Any]:
    """``N = G (C/6)^a`` and ``D = C / (6 N)``, where the two terms fall equally fast."""
    alpha, beta = p["alpha"], p["beta"]
    scale = (alpha * p["A"] / (beta * p["B"])) ** (1 / (alpha + beta))
    n = scale * (flops / 6) ** (beta / (alpha + beta))
    return n, flops / (6 * n)


Chinchilla = Law(
    name="chinchilla",
    formula="L = E + A N^-alpha + B D^-beta",
    inputs=("N", "D"),
    parameters=(
        coefficient("A", of={"N": "-alpha"}),
        coefficient("B", of={"D": "-beta"}),
        floor("E"),
        exponent("alpha"),
        exponent("beta"),
    ),
    predict=_predict,
    source="Training Compute-Optimal Large Language Models, arXiv:2203.15556, 2022",
    presets={
        "hoffmann": Preset(
            {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28},
            "arXiv:2203.15556 (2022), as printed; exponents of two digits move the optimum at "
            "5.76e23 FLOP from 40 to 32 billion parameters",
        ),
        "hoffmann_unrounded": Preset(
            {
                "A": math.exp(6.0073404),
                "B": math.exp(6.0179186),
                "E": math.exp(0.5267228),
                "alpha": 0.33917084,
                "beta": 0.2849083,
            },
            "arXiv:2203.15556 (2022), from the TeX source, as arXiv:2404.10102 found them there",
        ),
        "epoch": Preset(
            {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
            "Chinchilla Scaling: A replication attempt, arXiv:2404.10102, 2024",
        ),
    },
    optimum=_optimum,
)
