r"""Local updates: how loss, learning rate and batch scale with size and replicas.

DiLoCo (Charles et al., 2025) fits $A N^{\alpha}$ for each number $M$ of replicas and $A N^{\alpha}
M^{\beta}$ for all, to the best loss, inner learning rate and batch (tokens, of all replicas) of
models trained on $D = 20N$ tokens with 30 steps between exchanges. Its outer learning rate has no
law: it does not move with $N$. Exponents have their own sign.

Local SGD (2024) is compared with data parallelism by ``LocalSteps``: one regression with a term for
the algorithm in level and slope, so that an interval of ``slope`` around 0 means equal exponents.

The communication model is in ``communication``.

Traps: no irreducible part, so slopes are local; $M$ has four values; exponents of the learning rate
run from -0.78 to -1.10 over $M$ with seven sizes each. All are lines in logarithms: fit with
``squares()``, whose profile intervals are exactly Student's, on 5 degrees of freedom for seven
sizes.
"""

from typing import Any

import jax.numpy as jnp

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

_PAPER = (
    "Communication-Efficient Language Model Training Scales Reliably and Robustly: Scaling Laws "
    "for DiLoCo, arXiv:2503.09799, 2025"
)
_LOCAL = "Exploring Scaling Laws for Local SGD in Large Language Model Training, arXiv:2409.13198"


def _signed(name: str, start: tuple[float, float]) -> Parameter:
    return exponent(name, start=start, bounds=(-10.0, 10.0))


def _alone(name: str, output: str, unit: str, values: dict[str, tuple[float, float]]) -> Law:
    """``A N^alpha`` for one number of replicas."""
    source = lambda key: f"{_PAPER}; {key.replace('_', ' ')}"
    return Law(
        name=name,
        formula=f"{output} = A N^alpha",
        inputs=("N",),
        parameters=(
            coefficient("A", unit=unit, of={"N": "alpha"}),
            _signed("alpha", (-1.0, 1.0)),
        ),
        predict=lambda p, x: p["A"] * power(x["N"], p["alpha"]),
        output=output,
        source=_PAPER,
        presets={
            key: Preset({"A": a, "alpha": alpha}, source(key)) for key, (a, alpha) in values.items()
        },
    )


def _joint(name: str, output: str, unit: str, values: tuple[float, float, float]) -> Law:
    """``A N^alpha M^beta``."""
    names = ("A", "alpha", "beta")
    return Law(
        name=name,
        formula=f"{output} = A N^alpha M^beta",
        inputs=("N", "M"),
        parameters=(
            coefficient("A", unit=unit, of={"N": "alpha", "M": "beta"}),
            _signed("alpha", (-1.0, 1.0)),
            _signed("beta", (-0.5, 1.0)),
        ),
        predict=lambda p, x: p["A"] * power(x["N"], p["alpha"]) * power(x["M"], p["beta"]),
        output=output,
        source=_PAPER,
        presets={"charles": Preset(dict(zip(names, values, strict=True)), _PAPER)},
    )


DiLoCoLossAlone = _alone(
    "diloco_loss_alone",
    "loss",
    "loss",
    {
        "data_parallel": (18.129, -0.0953),
        "one_replica": (18.363, -0.0961),
        "two_replicas": (18.768, -0.0969),
        "four_replicas": (19.762, -0.0992),
        "eight_replicas": (21.051, -0.1018),
    },
)
DiLoCoRateAlone = _alone(
    "diloco_rate_alone",
    "lr",
    "learning rate",
    {
        "data_parallel": (16319.2, -0.819),
        "one_replica": (74620.6, -0.945),
        "two_replicas": (3978.82, -0.780),
        "four_replicas": (4512.99, -0.789),
        "eight_replicas": (618986, -1.102),
    },
)
DiLoCoBatchAlone = _alone(
    "diloco_batch_alone",
    "batch_tokens",
    "tokens",
    {
        "data_parallel": (462.68, 0.281),
        "one_replica": (27.873, 0.435),
        "two_replicas": (15.749, 0.479),
        "four_replicas": (10.957, 0.510),
        "eight_replicas": (38.072, 0.455),
    },
)
DiLoCoLoss = _joint("diloco_loss", "loss", "loss", (19.226, -0.0985, 0.0116))
DiLoCoRate = _joint("diloco_rate", "lr", "learning rate", (22256, -0.8827, 0.2929))
DiLoCoBatch = _joint("diloco_batch", "batch_tokens", "tokens", (14.521, 0.4695, 0.3399))


def _predict_floor(p: Arrays, x: Arrays) -> Any:
    return p["E"] + p["A"] * power(x["N"], p["alpha"]) * power(x["M"], p["beta"])


DiLoCoLossFloor = Law(
    name="diloco_loss_floor",
    formula="L = E + A N^alpha M^beta",
    inputs=("N", "M"),
    parameters=(
        coefficient("A", of={"N": "alpha", "M": "beta"}),
        _signed("alpha", (-1.0, -0.05)),
        _signed("beta", (-0.5, 0.5)),
        floor("E"),
    ),
    predict=_predict_floor,
    source=_PAPER,
)


def _predict_local(p: Arrays, x: Arrays) -> Any:
    level = jnp.exp(p["shift"] * x["local"])
    return level * p["A"] * power(x["N"], p["alpha"] + p["slope"] * x["local"])


LocalSteps = Law(
    name="local_steps",
    formula="L = A e^(shift g) N^(alpha + slope g), g = 1 for local SGD and 0 for data parallelism",
    inputs=("N", "local"),
    parameters=(
        coefficient("A", of={"N": "alpha"}),
        _signed("alpha", (-0.5, 0.0)),
        Parameter("shift"),
        _signed("slope", (-0.1, 0.1)),
    ),
    predict=_predict_local,
    source=f"{_LOCAL}, 2024; its L = (X_c / X)^alpha for each algorithm, in one regression",
)
