r"""Mixtures of experts: one law of active size, data and number of experts (2025).

$$L = a \hat E^{\delta} N^{\alpha + \gamma \ln \hat E} +
b \hat E^{\omega} D^{\beta + \zeta \ln \hat E} + c, \qquad
\frac1{\hat E} = \frac1{E - 1 + (1/E_{start} - 1/E_{max})^{-1}} + \frac1{E_{max}}$$

with $E$ experts of which each token uses one, so that $\hat E(1) = E_{start}$. Exponents have their
own sign here: $\alpha$ and $\beta$ are negative. $N$ counts the active parameters with both tables
of embeddings.

Traps:

- The paper's closed form of the optimum with signed exponents is the reciprocal of the right scale:
  taken literally it gives 5e10 parameters at 1e20 FLOPs and one expert, not 1.7e9. Here magnitudes
  are used.
- ``E_start`` and ``E_max`` are weakly determined by runs of up to 32 experts, and trade against
  ``delta`` and ``omega``. Noise of 1 % leaves them undetermined: hold them, or read their profile.
- The printed values are no plain minimum: they were fitted with weight decay.
- Above about 400 tokens per active parameter the law is outside the authors' runs.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_suite.scaling_laws.law import Arrays, Law, Preset, coefficient, exponent, floor, power

_PAPER = (
    "Joint MoE Scaling Laws: Mixture of Experts Can Be Memory Efficient, arXiv:2502.05172, 2025"
)


def effective_experts(p: Arrays, experts: Any) -> Any:
    """The saturating number of experts, from ``E_start`` at one to ``E_max`` at infinity."""
    offset = 1 / (1 / p["E_start"] - 1 / p["E_max"])
    return 1 / (1 / (experts - 1 + offset) + 1 / p["E_max"])


def reduced(p: Arrays, experts: Any) -> tuple[Any, Any, Any, Any]:
    """``(m, mu, n, nu)`` of ``L = m N^-mu + n D^-nu + c`` at a number of experts."""
    log_experts = jnp.log(effective_experts(p, experts))
    m = p["a"] * jnp.exp(p["delta"] * log_experts)
    n = p["b"] * jnp.exp(p["omega"] * log_experts)
    return m, -(p["alpha"] + p["gamma"] * log_experts), n, -(p["beta"] + p["zeta"] * log_experts)


def _predict(p: Arrays, x: Arrays) -> Any:
    m, mu, n, nu = reduced(p, x["experts"])
    return m * power(x["N"], -mu) + n * power(x["D"], -nu) + p["c"]


def _signed(name: str, start: tuple[float, float]) -> Any:
    return exponent(name, start=start, bounds=(-10.0, 10.0))


JointMoE = Law(
    name="joint_moe",
    formula="L = a X^delta N^(alpha + gamma ln X) + b X^omega D^(beta + zeta ln X) + c, "
    "1/X = 1/(experts - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max",
    inputs=("N", "D", "experts"),
    parameters=(
        coefficient("a", of={"N": "alpha"}),
        _signed("alpha", (-0.5, -0.05)),
        _signed("delta", (-0.5, 0.5)),
        _signed("gamma", (-0.05, 0.05)),
        coefficient("b", of={"D": "beta"}),
        _signed("beta", (-0.5, -0.05)),
        _signed("omega", (-0.5, 0.5)),
        _signed("zeta", (-0.05, 0.05)),
        coefficient("E_start", unit="experts", start=(1.2, 4.0)),
        coefficient("E_max", unit="experts", start=(50.0, 1000.0)),
        floor("c"),
    ),
    predict=_predict,
    source=_PAPER,
    presets={
        "ludziejewski": Preset(
            {
                "a": 35.91,
                "alpha": -0.1889,
                "delta": -0.2285,
                "gamma": 0.0098,
                "b": 35.98,
                "beta": -0.1775,
                "omega": 0.5529,
                "zeta": -0.0259,
                "E_start": 2.0732,
                "E_max": 290.4521,
                "c": 1.3637,
            },
            f"{_PAPER}; table 3, Huber 0.01 on log losses with weight decay 1e-5",
        )
    },
)

VALUES = JointMoE.presets["ludziejewski"].values


def learning_rate(body: Any, experts: Any) -> Any:
    """The paper's peak rate for ``body`` active parameters without embeddings."""
    return np.exp(8.39 - 0.81 * np.log(body) - 0.25 * np.log(experts))
