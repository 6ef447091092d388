"""Shampoo against Meta's PyTorch Distributed Shampoo, on one device.

Statistics of few gradients are singular, and float32's eigenvalues near zero are rounding: with the
official damping of 1e-12 two computations agree in nothing there. Both sides get the same damping,
a hundredth of a typical squared gradient, with which the condition of what is inverted is at most
1e5 and its fourth root moderate.
"""

import functools
from typing import Any

import optax

from benchmarks.parity.compare import (
    LEARNING_RATE,
    LIMIT,
    Case,
    Departure,
    Method,
    difference_of_updates,
    full_rank_gradients,
)
from jaxopt_suite.optimizers import roots
from jaxopt_suite.optimizers.shampoo import shampoo

_B1, _B2 = 0.9, 0.99
_BLOCK = 16  # leaves remainders of 8
_EPSILON = 0.1
_NEVER = 1000
_AFTER_ROOTS = 1e-4  # the error of a float32 root of such a condition
_SHAPES = {"square": (40, 40), "wide": (16, 64), "tensor": (12, 5, 4), "vector": (24,)}


def _ours(
    weight_decay: float,
    *,
    every: int,
    graft: Any,
    block: int = _BLOCK,
    b2: float = _B2,
    epsilon: float = _EPSILON,
    damping: roots.Damping | None = None,
    negative: Any = "shift",
) -> optax.GradientTransformation:
    return shampoo(
        LEARNING_RATE,
        _B1,
        b2,
        weight_decay=weight_decay,
        block_size=block,
        refresh_every=every,
        graft=graft,
        graft_b2=_B2 if graft == "adam" else None,
        solver=roots.Eigh(negative=negative),
        damping=roots.Absolute(epsilon) if damping is None else damping,
    )


def _case(official: Any, name: str, *, every: int, graft: str, **settings: Any) -> Case:
    block, b2 = settings.get("block", _BLOCK), settings.get("b2", _B2)
    epsilon = settings.get("epsilon", _EPSILON)
    grafted = official.AdamPreconditionerConfig(beta2=_B2, epsilon=1e-8)

    def theirs(params: dict[str, Any], weight_decay: float) -> Any:
        return official.DistributedShampoo(
            params.values(),
            lr=LEARNING_RATE,
            betas=(_B1, b2),
            epsilon=epsilon,
            weight_decay=weight_decay,
            max_preconditioner_dim=block,
            precondition_frequency=every,
            grafting_config=grafted if graft == "adam" else None,
        )

    return Case(
        name=name,
        settings={
            "betas": (_B1, b2),
            "block_size": block,
            "refresh_every": every,
            "graft": graft,
            "damping": f"Absolute({epsilon:g})",
        },
        ours=lambda weight_decay: _ours(weight_decay, every=every, graft=graft, **settings),
        official=theirs,
        transposed=False,
        weight_decay=0.1,
        gradients=functools.partial(full_rank_gradients, _SHAPES, steps=30),
        limit=LIMIT if every == _NEVER else _AFTER_ROOTS,
    )


def _build(official: Any) -> tuple[list[Case], list[Departure]]:
    make = functools.partial(_case, official)
    cases = [
        make(f"graft {graft}, roots every {every}", every=every, graft=graft)
        for graft in ("adam", "none")
        for every in (1, 5)
    ]
    cases += [
        make(f"graft {graft}, before the first root", every=_NEVER, graft=graft)
        for graft in ("adam", "none")
    ]
    cases.append(make("blocks of whole matrices", every=5, graft="adam", block=64))
    cases.append(make("statistics summed up", every=5, graft="none", b2=1.0, epsilon=1.0))

    def changed(**settings: Any) -> float:
        ours = _ours(0.0, every=1, graft="adam", **settings)
        return difference_of_updates(cases[0], ours).value

    return cases, [
        Departure(
            "Damping is relative to the largest eigenvalue by default; the official default is an "
            f"absolute epsilon of 1e-12 (figure: roots.Relative() against {_EPSILON:g}).",
            lambda: changed(damping=roots.Relative()),
        ),
        Departure(
            "Eigenvalues below the damping are raised to it by default; the official code shifts "
            'all of them (roots.Eigh(negative="shift")). With this damping there are none.',
            lambda: changed(negative="clip"),
        ),
        Departure(
            "A root that fails leaves the one before in use and is counted; the official code "
            "raises after three in a row, and at once for a statistic that is not finite."
        ),
        Departure(
            "start_step may be less than refresh_every; the official code takes it from "
            "precondition_frequency upwards."
        ),
        Departure(
            "Statistics are means by default (b2=0.999), and Adam is grafted; officially they are "
            "sums (beta2=1.0), and nothing is grafted."
        ),
    ]


METHOD = Method(
    name="shampoo",
    repository="facebookresearch/optimizers",
    marks=("distributed_shampoo/__init__.py", "distributed_shampoo/distributed_shampoo.py"),
    packages=("torch",),
    module="distributed_shampoo/__init__.py",
    build=_build,
)
