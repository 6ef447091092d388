"""SOAP against the official code, in float64.

Two computations of an eigenbasis differ by their rounding, and Adam raises what lies beside the
diagonal to the size of what is on it: in float32 that is 1e-4 of an update. The official code casts
to float32 before it decomposes, whatever its parameters are; here that cast does nothing.
Eigenvectors of a null space are arbitrary: gradients have full rank along every mode that has a
basis.
"""

import contextlib
import functools
import unittest.mock
from collections.abc import Mapping
from typing import Any

import optax

from benchmarks.parity.compare import (
    LEARNING_RATE,
    Case,
    Departure,
    Method,
    difference_of_parameters,
    difference_of_updates,
    full_rank_gradients,
)
from jaxopt_suite.optimizers.shampoo import soap

_B1, _B2 = 0.95, 0.9
_SHAPES = {"square": (32, 32), "kernel": (10, 10, 3, 3), "vector": (24,)}
_OBLONG = {"tall": (48, 16), "wide": (16, 48)}  # with a basis for the shorter side
_STEPS = 30


def _ours(weight_decay: float, *, every: int, **settings: Any) -> optax.GradientTransformation:
    settings = {"eps_mode": "uncorrected"} | settings
    return soap(LEARNING_RATE, _B1, _B2, weight_decay=weight_decay, refresh_every=every, **settings)


def _without_cast(state: Any) -> contextlib.AbstractContextManager[Any]:
    """While this lasts, ``Tensor.float()`` gives back what it gets."""
    import torch  # the reference's own dependency, none of ours

    del state
    return unittest.mock.patch.object(torch.Tensor, "float", lambda tensor: tensor)


def _case(
    official: Any,
    name: str,
    *,
    every: int,
    shapes: Mapping[str, tuple[int, ...]] = _SHAPES,
    dtype: str = "float64",
    theirs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Case:
    def make(params: dict[str, Any], weight_decay: float) -> Any:
        return official.SOAP(
            list(params.values()),
            lr=LEARNING_RATE,
            betas=(_B1, _B2),
            weight_decay=weight_decay,
            precondition_frequency=every,
            **(theirs or {}),
        )

    return Case(
        name=name,
        settings={"betas": (_B1, _B2), "refresh_every": every, "eps_mode": "uncorrected"}
        | settings,
        ours=lambda weight_decay: _ours(weight_decay, every=every, **settings),
        official=make,
        transposed=False,
        gradients=functools.partial(full_rank_gradients, shapes, steps=_STEPS, dtype=dtype),
        limit=1e-9,  # float64's rounding, raised as above
        feed=_without_cast,
    )


def _build(official: Any) -> tuple[list[Case], list[Departure]]:
    make = functools.partial(_case, official)
    case = make("bases every 3 steps", every=3)
    cases = [
        case,
        make("bases every step", every=1),
        make("bases every 10 steps", every=10),
        make(
            "the shorter side only, 48 by 16",
            every=3,
            shapes=_OBLONG,
            theirs={"max_precond_dim": 16},
            one_sided=True,
        ),
    ]
    in_float32 = make("float32", every=3, dtype="float32")
    merged = make("merged", every=3, theirs={"merge_dims": True, "max_precond_dim": 48})

    def changed(case: Case = case, **settings: Any) -> float:
        return difference_of_updates(case, _ours(0.0, every=3, **settings)).value

    return cases, [
        Departure(
            "Epsilon is added to the bias-corrected root by default, as in optax; the official "
            'code adds it before correction (eps_mode="uncorrected").',
            lambda: changed(eps_mode="corrected"),
        ),
        Departure(
            "Weight decay sees the parameters before the step, as everywhere in optax; the "
            "official code applies it to the new ones (figure: parameters after the last step, "
            "decay 0.1).",
            lambda: difference_of_parameters(case, weight_decay=0.1).value,
        ),
        Departure(
            "Small dimensions are merged from the last one backwards, as in Meta's Shampoo; the "
            "official code goes forwards (merge_dims=True, at most 48).",
            lambda: changed(merged, merge_dims=True, block_size=48),
        ),
        Departure(
            "A dimension longer than block_size is cut into blocks; the official code leaves one "
            "longer than max_precond_dim without a basis."
        ),
        Departure(
            "In float32 the rounding of two decompositions separates both sides (figure: the "
            "first case, in float32); no choice of ours.",
            lambda: changed(in_float32),
        ),
    ]


METHOD = Method(
    name="soap",
    repository="nikhilvyas/SOAP",
    marks=("soap.py",),
    packages=("torch",),
    module="soap.py",
    build=_build,
)
