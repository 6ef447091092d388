"""Subspace momentum, by itself (SGD-SM), against timmytonga/sn-sm."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax

from benchmarks.parity import _sn_sm
from benchmarks.parity._sn_sm import B1
from benchmarks.parity.compare import (
    LEARNING_RATE,
    RANK,
    SHAPES,
    Case,
    Departure,
    difference_of_updates,
)
from jaxopt_suite.optimizers import ScaleBySubspaceMomentumState, scale_by_subspace_momentum

REFRESH_EVERY = 6  # 25 steps see refreshes at 1, 6, 12, 18, 24
PROJECTIONS = {"svd": "svd", "top_rows": "topk", "uniform_rows": "uniform"}  # ours: theirs
# Of what the official code does differently from our defaults, that which concerns refreshes.
AS_OFFICIAL = {"on_refresh": "official_code", "refresh_phase": "after_count"}


def _ours(weight_decay: float = 0.0, **changes: Any) -> optax.GradientTransformation:
    settings = {"bias_correction": "none", "refresh_every": REFRESH_EVERY, **AS_OFFICIAL, **changes}
    return optax.chain(
        scale_by_subspace_momentum(B1, RANK, **settings),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(LEARNING_RATE),
    )


@contextlib.contextmanager
def same_rows(state: Any) -> Iterator[None]:
    """``torch.randperm`` gives the rows that our state has just drawn, matrix by matrix."""
    import torch

    rows = _projectors(state)  # the official code takes the first r entries of its permutation
    draw = lambda n: torch.tensor(next(rows).tolist())
    with mock.patch.object(torch, "randperm", draw):
        yield


@contextlib.contextmanager
def same_basis(state: Any) -> Iterator[None]:
    """``torch.linalg.svd`` gives our singular vectors where they span the subspace that its own do.

    Singular vectors are defined up to sign, and in float32 up to rounding that small singular
    values enlarge. Where the subspaces differ (a wrong one of ours, or one of another step) theirs
    stay theirs, and the results show it.
    """
    import torch

    bases, decompose = _projectors(state), torch.linalg.svd

    def svd(matrix: Any, **options: Any) -> tuple[Any, Any, Any]:
        left, values, right = decompose(matrix, **options)
        basis = torch.tensor(next(bases))  # of the smaller side, which is the right one if square
        theirs = right.T if matrix.shape[0] >= matrix.shape[1] else left
        overlap = torch.linalg.svdvals(theirs[:, :RANK].T @ basis).min()
        if overlap > 1 - 1e-3:
            theirs[:, :RANK] = basis  # a view: this writes into left or right
        return left, values, right

    with mock.patch.object(torch.linalg, "svd", svd):
        yield


def _projectors(state: Any) -> Iterator[np.ndarray]:
    """Our projectors, in the order in which the official side comes to the matrices."""
    is_momentum = lambda x: isinstance(x, ScaleBySubspaceMomentumState)
    found = [s for s in jax.tree.leaves(state, is_leaf=is_momentum) if is_momentum(s)]
    (momentum,) = found
    return (np.array(momentum.projector[name]) for name, s in SHAPES.items() if len(s) == 2)


Feed = Callable[[Any], contextlib.AbstractContextManager[Any]]
FEEDS: Mapping[str, Feed] = {
    "svd": same_basis,
    "top_rows": contextlib.nullcontext,
    "uniform_rows": same_rows,
}
PROJECTORS = {
    "svd": "the official side is given our singular vectors",
    "top_rows": "each side chooses",
    "uniform_rows": "the official side is given our random rows",
}


def sign_departure(case: Case) -> Departure:
    """Their refresh rule depends on the signs of singular vectors."""
    own_svds = dataclasses.replace(case, feed=contextlib.nullcontext)
    return Departure(
        "Lifting old momentum with a new basis makes the official result depend on the signs of "
        "singular vectors, which no SVD defines, so the comparison gives both sides the same ones "
        "(figure: each its own). Our default does not depend on them.",
        lambda: difference_of_updates(own_svds).value,
    )


def projected_matrices(projection: str) -> dict[str, Any]:
    """Their settings for the matrices."""
    return {
        "rank": RANK,
        "proj_type": PROJECTIONS[projection],
        "update_proj_gap": REFRESH_EVERY,
    }


def _case(official: Any, projection: str) -> Case:
    return Case(
        name=f"SGD-SM, {projection}",
        settings={
            "b1": B1,
            "rank": RANK,
            "refresh_every": REFRESH_EVERY,
            "projection": projection,
            "projectors": PROJECTORS[projection],
            "bias_correction": "none",
            **AS_OFFICIAL,
        },
        ours=lambda weight_decay: _ours(weight_decay, projection=projection),
        official=_sn_sm.official_side(
            official,
            projected_matrices(projection),
            betas=(B1, 0.0),
            correct_bias=False,
            momentum_type="sm",
            second_moment_type="none",
        ),
        feed=FEEDS[projection],
    )


def _build(official: Any) -> tuple[list[Case], list[Departure]]:
    cases = {projection: _case(official, projection) for projection in PROJECTIONS}
    svd = cases["svd"]

    def svd_with(**changes: Any) -> float:
        return difference_of_updates(svd, _ours(**changes)).value

    return list(cases.values()), [
        Departure(
            "At a refresh the official code steps with the momentum of the basis it has just "
            "replaced and stores zeros, so that this step's gradient never enters the momentum. By "
            "default momentum and basis here always belong together "
            '(on_refresh="zero_and_restart_count"; theirs is "official_code").',
            lambda: svd_with(on_refresh="zero_and_restart_count"),
        ),
        Departure(
            "The official code refreshes at steps 1, T, 2T, ...; by default here at 1, T + 1, "
            '2T + 1, ... (refresh_phase="before_count"; theirs is "after_count").',
            lambda: svd_with(refresh_phase="before_count"),
        ),
        Departure(
            "By default the projected momentum is bias-corrected; the official SGD form corrects "
            'nothing (bias_correction="none").',
            lambda: svd_with(bias_correction="subspace"),
        ),
        Departure(
            "The three of the above together: our defaults against the official code.",
            lambda: svd_with(
                on_refresh="zero_and_restart_count",
                refresh_phase="before_count",
                bias_correction="subspace",
            ),
        ),
        sign_departure(svd),
        Departure(
            "The approximate SVD is derived anew and not compared: the official one applies the "
            "Hadamard transform along one axis and the random signs along the other."
        ),
        _sn_sm.decay_departure(svd),
    ]


METHOD = _sn_sm.method("subspace_momentum", _build)
