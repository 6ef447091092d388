"""How much smaller AdamSNSM's state is than Adam's, counted exactly and without allocating it."""

from typing import Any

import jax

from benchmarks.claims.claim import Claim, Outcome, verdict
from jaxopt_suite import core
from jaxopt_suite.experiments.model import PRESETS, abstract_params
from jaxopt_suite.optimizers import registry

_RANKS = (128, 256, 512)


def bytes_of(name: str, params: Any, **hyperparameters: Any) -> int:
    """Bytes of a recipe's state for parameters of these shapes."""
    return core.tree_bytes(
        jax.eval_shape(registry()[name].make(1.0, **hyperparameters).init, params)
    )


def _measure(quick: bool) -> Outcome:
    del quick  # immediate
    params = abstract_params(PRESETS["1b"])
    adam = bytes_of("adamw", params)
    found = {
        f"{projection}, rank {rank}": bytes_of(
            "adam_snsm", params, rank=rank, projection=projection
        )
        for projection in ("svd", "top_rows")
        for rank in _RANKS
    }
    saved = {name: 1.0 - size / adam for name, size in found.items()}
    listed = "; ".join(f"{name}: {share:.1%} less" for name, share in saved.items())
    return Outcome(
        figure=f"of AdamW's {adam / 1e9:.2f} GB on the 1b preset: {listed}",
        verdict=verdict(*(share > 0.8 for share in saved.values())),
        numbers={"adamw": adam, **found},
    )


CLAIMS = (
    Claim(
        name="snsm-state",
        claim="AdamSNSM needs over 80 % less optimizer state than Adam at a billion parameters.",
        source="Nguyen, Nguyen 2025, arXiv:2411.07120, abstract",
        how=(
            "Exact bytes of the state arrays for the 1b preset (every matrix compressed, float32), "
            "for three ranks and two projections. Holds if all of them save more than 80 %."
        ),
        measure=_measure,
        immediate=True,
    ),
)
