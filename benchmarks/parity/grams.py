"""Grams against Gunale0926/Grams."""

from typing import Any

import optax

from benchmarks.parity.compare import (
    EPS,
    LEARNING_RATE,
    Case,
    Departure,
    Method,
    difference_of_updates,
)
from jaxopt_suite.optimizers import grams

_BETAS = (0.9, 0.999)


def _ours(weight_decay: float = 0.0, **changes: Any) -> optax.GradientTransformation:
    settings = {"eps": EPS, "eps_mode": "uncorrected", **changes}
    return grams(LEARNING_RATE, *_BETAS, weight_decay=weight_decay, **settings)


def _build(official: Any) -> tuple[list[Case], list[Departure]]:
    def theirs(params: dict[str, Any], weight_decay: float) -> Any:
        return official.Grams(
            params.values(), lr=LEARNING_RATE, betas=_BETAS, eps=EPS, weight_decay=weight_decay
        )

    settings = {"betas": _BETAS, "eps": EPS, "eps_mode": "uncorrected"}
    case = Case("bias-corrected, decoupled decay 0.1", settings, _ours, theirs, weight_decay=0.1)

    def with_ours(**changes: Any) -> float:
        return difference_of_updates(case, _ours(**changes)).value

    return [case], [
        Departure(
            "Epsilon is added to the bias-corrected root by default, as in optax; the official "
            'code adds it before correction, which is eps_mode="uncorrected".',
            lambda: with_ours(eps_mode="corrected"),
        ),
        Departure(
            "The default epsilon is 1e-8, as in optax; the official one is 1e-6.",
            lambda: with_ours(eps=1e-8),
        ),
    ]


METHOD = Method(
    name="grams",
    repository="Gunale0926/Grams",
    marks=("grams/src/grams.py",),
    packages=("torch",),
    module="grams/src/grams.py",
    build=_build,
)
