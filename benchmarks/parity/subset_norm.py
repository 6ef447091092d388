"""Subset-norm (AdamW-SN, RMSProp-SN, AdaGrad-SN) against timmytonga/sn-sm."""

from collections.abc import Callable
from typing import Any

import optax

from benchmarks.parity import _sn_sm
from benchmarks.parity._sn_sm import B1, B2
from benchmarks.parity.compare import EPS, LEARNING_RATE, Case, Departure, difference_of_updates
from jaxopt_suite.optimizers import adagrad_sn, adam_sn, rmsprop_sn

# Our name for a partition, theirs, and whether ours is laid out as in Flax for the comparison. Runs
# follow the order of the elements in memory, so for them both sides must have the same layout.
_SUBSETS: dict[str, tuple[str | int, str | int, bool]] = {
    "heuristic": ("heuristic", "heuristics", True),
    "runs of 8": (8, 8, False),
    "runs of sqrt(d)/2": ("sqrt", -2, False),
}


def _adam(weight_decay: float = 0.0, **changes: Any) -> optax.GradientTransformation:
    settings = {"eps": EPS, "eps_mode": "uncorrected", **changes}
    return adam_sn(LEARNING_RATE, B1, B2, weight_decay=weight_decay, **settings)


def _rmsprop(weight_decay: float = 0.0, **changes: Any) -> optax.GradientTransformation:
    return rmsprop_sn(LEARNING_RATE, B2, EPS, weight_decay, **changes)


def _adagrad(weight_decay: float = 0.0, **changes: Any) -> optax.GradientTransformation:
    return adagrad_sn(LEARNING_RATE, eps=EPS, weight_decay=weight_decay, **changes)


def _adagrad_with_mean(weight_decay: float = 0.0, **changes: Any) -> optax.GradientTransformation:
    return _adagrad(weight_decay, b1=B1, **changes)


# Form: ours, and their betas and bias correction.
_FORMS: dict[str, tuple[Callable[..., optax.GradientTransformation], tuple[float, float], bool]] = {
    "AdamW-SN": (_adam, (B1, B2), True),
    "RMSProp-SN": (_rmsprop, (0.0, B2), False),
    "AdaGrad-SN": (_adagrad, (0.0, 1.0), False),
    "AdaGrad-SN with b1=0.9": (_adagrad_with_mean, (B1, 1.0), False),
}


def _case(official: Any, form: str, partition: str) -> Case:
    make, betas, corrected = _FORMS[form]
    subset, theirs, transposed = _SUBSETS[partition]
    return Case(
        name=f"{form}, {partition}",
        settings={"betas": betas, "correct_bias": corrected, "subset": subset, "eps": EPS},
        ours=lambda weight_decay: make(weight_decay, subset=subset),
        official=_sn_sm.official_side(
            official,
            {"subset_size": theirs},
            betas=betas,
            correct_bias=corrected,
            second_moment_type="sn",
        ),
        transposed=transposed,
    )


def _with_subset_size(official: Any, size: int) -> Case:
    """AdamW-SN with runs of a length that need not divide a leaf; theirs picks one that does."""
    return Case(
        name=f"AdamW-SN, runs of {size}",
        settings={},
        ours=lambda weight_decay: _adam(weight_decay, subset=size),
        official=_sn_sm.official_side(
            official, {"subset_size": size}, betas=(B1, B2), second_moment_type="sn"
        ),
        transposed=False,
    )


def _build(official: Any) -> tuple[list[Case], list[Departure]]:
    cases = {
        (form, partition): _case(official, form, partition)
        for form in _FORMS
        for partition in _SUBSETS
    }
    heuristic = cases["AdamW-SN", "heuristic"]
    uneven = _with_subset_size(official, 24)

    def heuristic_with(**changes: Any) -> float:
        return difference_of_updates(heuristic, _adam(**changes)).value

    return list(cases.values()), [
        Departure(
            "Epsilon is added to the bias-corrected root by default, as in optax; the official "
            'code adds it before correction, which is eps_mode="uncorrected".',
            lambda: heuristic_with(eps_mode="corrected"),
        ),
        Departure(
            "The default epsilon is 1e-8, as in optax; the official one is 1e-6.",
            lambda: heuristic_with(eps=1e-8),
        ),
        Departure(
            "Where the run length k does not divide the leaf the last run is shorter; the official "
            "code takes the largest divisor up to k instead (figure: k = 24, which it makes 16).",
            lambda: difference_of_updates(uneven).value,
        ),
        Departure(
            "Runs follow the leaf as it lies in memory: on Flax's (in, out) kernels they are other "
            "subsets than on PyTorch's (out, in) weights. The heuristic has no such difference, as "
            "a square matrix keeps its output axis on both sides.",
        ),
        Departure(
            "AdaGrad-SN uses the gradient itself by default, as in the paper; the official preset "
            "averages it with b1=0.9 (here: b1=0.9).",
            lambda: (
                difference_of_updates(
                    cases["AdaGrad-SN with b1=0.9", "heuristic"], _adagrad()
                ).value
            ),
        ),
        _sn_sm.decay_departure(heuristic),
    ]


METHOD = _sn_sm.method("subset_norm", _build)
