"""What the methods of timmytonga/sn-sm have in common: one optimizer class with many switches."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.parity.compare import (
    EPS,
    LEARNING_RATE,
    Case,
    Departure,
    Method,
    difference_of_parameters,
)
from benchmarks.parity.reference import quiet

B1, B2 = 0.9, 0.999


def official_side(
    official: Any,
    matrices: Mapping[str, Any],
    *,
    betas: tuple[float, float],
    **settings: Any,
) -> Callable[[dict[str, Any], float], Any]:
    """Their ``GenericOptim``: settings ``matrices`` for matrices, plain rules for vectors."""

    def make(params: dict[str, Any], weight_decay: float) -> Any:
        groups = [
            {"params": [p for p in params.values() if p.ndim == 2], **matrices},
            {"params": [p for p in params.values() if p.ndim != 2]},
        ]
        with quiet():
            return official.GenericOptim(
                groups,
                lr=LEARNING_RATE,
                betas=betas,
                eps=EPS,
                weight_decay=weight_decay,
                **settings,
            )

    return make


def decay_departure(case: Case) -> Departure:
    """All of them decay after the step."""
    return Departure(
        "Weight decay sees the parameters before the step, as everywhere in optax; the official "
        "code applies it to the new ones (figure: parameters after the last step, decay 0.1).",
        lambda: difference_of_parameters(case, weight_decay=0.1).value,
    )


def method(name: str, build: Callable[[Any], tuple[list[Case], list[Departure]]]) -> Method:
    """A method whose official code is ``GenericOptim``."""
    return Method(
        name=name,
        repository="timmytonga/sn-sm",
        marks=("GenericOptim.py", "subset_norm.py", "subspace_momentum.py"),
        packages=("torch", "transformers"),
        module="GenericOptim.py",
        build=build,
    )
