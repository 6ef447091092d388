"""AdamSNSM, subspace momentum over subset-norm step sizes, against timmytonga/sn-sm."""

from typing import Any

import optax

from benchmarks.parity import _sn_sm
from benchmarks.parity._sn_sm import B1, B2
from benchmarks.parity.compare import (
    EPS,
    LEARNING_RATE,
    RANK,
    Case,
    Departure,
    difference_of_updates,
)
from benchmarks.parity.subspace_momentum import (
    AS_OFFICIAL,
    FEEDS,
    PROJECTIONS,
    PROJECTORS,
    REFRESH_EVERY,
    projected_matrices,
    sign_departure,
)
from jaxopt_suite.optimizers import adam_snsm

_AS_OFFICIAL = {**AS_OFFICIAL, "bias_correction": "numerator", "eps_mode": "uncorrected"}


def _ours(weight_decay: float = 0.0, **changes: Any) -> optax.GradientTransformation:
    settings = {"rank": RANK, "refresh_every": REFRESH_EVERY, "eps": EPS, **_AS_OFFICIAL, **changes}
    return adam_snsm(LEARNING_RATE, B1, B2, weight_decay=weight_decay, **settings)


def _case(official: Any, projection: str) -> Case:
    return Case(
        name=f"heuristic subsets, {projection}",
        settings={
            "betas": (B1, B2),
            "rank": RANK,
            "refresh_every": REFRESH_EVERY,
            "projection": projection,
            "projectors": PROJECTORS[projection],
            "subset": "heuristic",
            "eps": EPS,
            **_AS_OFFICIAL,
        },
        ours=lambda weight_decay: _ours(weight_decay, projection=projection),
        official=_sn_sm.official_side(
            official,
            {**projected_matrices(projection), "subset_size": "heuristics"},
            betas=(B1, B2),
            momentum_type="sm",
            second_moment_type="sn",
        ),
        feed=FEEDS[projection],
    )


def _build(official: Any) -> tuple[list[Case], list[Departure]]:
    cases = {projection: _case(official, projection) for projection in PROJECTIONS}
    svd = cases["svd"]

    def svd_with(**changes: Any) -> float:
        return difference_of_updates(svd, _ours(**changes)).value

    defaults = {
        "on_refresh": "zero_and_restart_count",
        "refresh_phase": "before_count",
        "bias_correction": "subspace",
        "eps_mode": "corrected",
    }
    return list(cases.values()), [
        Departure(
            "At a refresh the official code steps with the momentum of the basis it has just "
            "replaced and stores zeros; by default momentum and basis here always belong together "
            '(on_refresh="zero_and_restart_count"; theirs is "official_code").',
            lambda: svd_with(on_refresh=defaults["on_refresh"]),
        ),
        Departure(
            "The official code refreshes at steps 1, T, 2T, ...; by default here at 1, T + 1, "
            '2T + 1, ... (refresh_phase="before_count"; theirs is "after_count").',
            lambda: svd_with(refresh_phase=defaults["refresh_phase"]),
        ),
        Departure(
            "The official bias correction divides the whole numerator, also the part outside the "
            "subspace that is no average; by default only the momentum is corrected "
            '(bias_correction="subspace"; theirs is "numerator").',
            lambda: svd_with(bias_correction=defaults["bias_correction"]),
        ),
        Departure(
            "Epsilon is added to the bias-corrected root by default, as in optax; the official "
            'code adds it before correction, which is eps_mode="uncorrected".',
            lambda: svd_with(eps_mode=defaults["eps_mode"]),
        ),
        Departure(
            "The four of the above together: our defaults against the official code.",
            lambda: svd_with(**defaults),
        ),
        sign_departure(svd),
        _sn_sm.decay_departure(svd),
    ]


METHOD = _sn_sm.method("adam_snsm", _build)
