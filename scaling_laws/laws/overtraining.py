r"""Over-training and downstream error (Gadre et al., 2024).

The loss law has one exponent for size and data, so that $D/N$ of the optimum is constant. With
$M = D/N$ tokens per parameter and $C = 6ND$,

$$L = E + (a M^{\eta} + b M^{-\eta})\, C^{-\eta}
    = E + 6^{-\kappa/2} (a N^{-\kappa} + b D^{-\kappa}), \qquad \kappa = 2 \eta,$$

and the parameter fitted here is $\kappa$ (the released code's, with the other sign). Its
coefficients are $a' = 6^{-\kappa/2} a$ and $b' = b$.

The error law $\mathrm{err} = \varepsilon - k e^{-\gamma L}$ turns a loss into the mean top-1 error
of a suite of tasks; ``downstream_error`` feeds it from the loss law, with draws of both where
intervals are wanted.

Traps: the paper fits four parameters to five runs, which leaves one degree of freedom: use the
profile, not a bootstrap, or fit all small runs. The error law holds for one set of tasks and one
evaluation loss; tasks near chance do not follow it.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_suite.scaling_laws.double import in_double
from jaxopt_suite.scaling_laws.law import (
    Arrays,
    Law,
    Preset,
    coefficient,
    exponent,
    floor,
    power,
)

_PAPER = (
    "Language models scale reliably with over-training and on downstream tasks, arXiv:2403.08540, "
    "2024"
)


def _predict(p: Arrays, x: Arrays) -> Any:
    terms = p["a"] * power(x["N"], -p["kappa"]) + p["b"] * power(x["D"], -p["kappa"])
    return p["E"] + power(6.0, -p["kappa"] / 2) * terms


def _optimum(p: Arrays, flops: Any) -> tuple[Any, Any]:
    """``D / N`` that makes the two terms equal, which is the same for every budget."""
    tokens_per_parameter = (p["b"] / p["a"]) ** (1 / p["kappa"])
    n = (flops / 6 / tokens_per_parameter) ** 0.5
    return n, n * tokens_per_parameter


def _preset(data: str, a: float, b: float, kappa: float, floor: float) -> Preset:
    """From the coefficients of the released code's form."""
    return Preset(
        {"a": a * 6 ** (-kappa / 2), "b": b, "E": floor, "kappa": -kappa},
        f"{_PAPER}; five runs on {data}, loss on C4, refitted from the released runs",
    )


OverTraining = Law(
    name="overtraining",
    formula="L = E + 6^(-kappa/2) (a N^-kappa + b D^-kappa) = E + (a M^eta + b M^-eta) C^-eta, "
    "eta = kappa/2, M = D/N, C = 6ND",
    inputs=("N", "D"),
    parameters=(
        coefficient("a", of={"N": "-kappa"}),
        coefficient("b", of={"D": "-kappa"}),
        floor("E"),
        exponent("kappa"),
    ),
    predict=_predict,
    source=_PAPER,
    presets={
        "gadre_rpj": _preset("RedPajama", 166.21, 366.69, -0.27285, 1.83665),
        "gadre_refinedweb": _preset("RefinedWeb", 125.10, 246.21, -0.25439, 1.73446),
        "gadre_c4": _preset("C4", 113.69, 189.52, -0.24247, 1.50826),
    },
    optimum=_optimum,
)


def _predict_error(p: Arrays, x: Arrays) -> Any:
    return p["epsilon"] - p["k"] * jnp.exp(-p["gamma"] * x["loss"])


DownstreamError = Law(
    name="downstream_error",
    formula="error = epsilon - k exp(-gamma L)",
    inputs=("loss",),
    parameters=(
        coefficient("epsilon", unit="error", start=(0.3, 1.0)),
        coefficient("k", unit="error", start=(0.1, 100.0)),
        exponent("gamma", start=(0.2, 3.0)),
    ),
    predict=_predict_error,
    output="error",
    source=_PAPER,
    presets={
        "gadre_46_tasks": Preset(
            {"k": 1.3229, "gamma": 0.8907, "epsilon": 0.7608},
            f"{_PAPER}; RedPajama, mean of 46 tasks, refitted from the released evaluations",
        ),
        "gadre_17_tasks": Preset(
            {"k": 2.2065, "gamma": 0.7146, "epsilon": 0.8570},
            f"{_PAPER}; RedPajama, mean of 17 tasks, refitted from the released evaluations",
        ),
    },
)


@in_double
def downstream_error(loss: Arrays, error: Arrays, n: Any, d: Any) -> np.ndarray:
    """Mean error predicted for models of ``n`` parameters after ``d`` tokens.

    Args:
      loss: parameters of ``OverTraining``; numbers, or draws ``[draws]`` each.
      error: parameters of ``DownstreamError``; likewise, as many draws.
      n: numbers of parameters, ``[...]``.
      d: numbers of tokens, likewise.

    Returns:
      float64 ``[...]``, or ``[draws, ...]``: its quantiles over draws carry the uncertainty of the
      loss into that of the error.
    """
    n, d = np.broadcast_arrays(np.asarray(n, np.float64), np.asarray(d, np.float64))
    drawn = max(np.ndim(value) for p in (loss, error) for value in p.values())
    if drawn:
        n, d = n[None], d[None]
    ones = (1,) * (n.ndim - drawn)
    spread = lambda p: {k: np.reshape(v, np.shape(v) + ones * np.ndim(v)) for k, v in p.items()}
    losses = OverTraining.predict(spread(loss), {"N": n, "D": d})
    return np.asarray(DownstreamError.predict(spread(error), {"loss": losses}))
