"""Grams on an ill-conditioned quadratic: does the loss ever rise?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.claims.claim import Claim, Outcome, verdict
from jaxopt_suite.optimizers import scale_by_grams

_SIZE = 20
_RATES = (0.01, 0.03, 0.1)
_KAPPAS = {"Grams": -1.0, "Adam": 1.0}
_FLOOR = 1e-6  # of the first loss: below it float32 rounds, and a step overshoots what is left


def hessian(*, rotated: bool) -> np.ndarray:
    """Curvatures from 1 to 1000, along the axes or along random directions; [20, 20]."""
    curvatures = np.diag(np.logspace(0.0, 3.0, _SIZE))
    if not rotated:
        return curvatures
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((_SIZE, _SIZE)))[0]
    return basis @ curvatures @ basis.T


def losses(matrix: np.ndarray, *, kappa: float, rate: float, steps: int) -> np.ndarray:
    """Loss over the first at each of ``steps`` points of a descent from all ones, [steps]."""
    curvature = jnp.asarray(matrix, jnp.float32)
    loss_of = lambda x: 0.5 * x @ curvature @ x
    tx = optax.chain(scale_by_grams(kappa=kappa), optax.scale_by_learning_rate(rate))

    def step(carry: tuple[jax.Array, optax.OptState], _: None) -> tuple[tuple, jax.Array]:
        x, state = carry
        loss, grads = jax.value_and_grad(loss_of)(x)
        updates, state = tx.update(grads, state)
        return (optax.apply_updates(x, updates), state), loss

    start = jnp.ones(_SIZE)
    _, seen = jax.lax.scan(step, (start, tx.init(start)), None, length=steps)
    return np.asarray(seen, np.float64) / float(seen[0])


def rises(seen: np.ndarray) -> int:
    """How often a loss relative to the first rises before it first comes below the floor."""
    below = np.flatnonzero(seen < _FLOOR)
    until = below[0] if below.size else len(seen)
    return int(np.sum(np.diff(seen[:until]) > 0.0))


def _measure(quick: bool) -> Outcome:
    del quick  # immediate
    counts: dict[str, list[int]] = {}
    lowest: dict[str, list[float]] = {}
    for where in ("aligned", "rotated"):
        matrix = hessian(rotated=where == "rotated")
        for name, kappa in _KAPPAS.items():
            # Steps are of about the rate's size and the way is 1: enough to get there 40 times.
            seen = [losses(matrix, kappa=kappa, rate=r, steps=int(40 / r)) for r in _RATES]
            counts[f"{name}, {where}"] = [rises(curve) for curve in seen]
            lowest[f"{name}, {where}"] = [float(curve.min()) for curve in seen]
    rates = ", ".join(f"{rate:g}" for rate in _RATES)
    listed = "; ".join(f"{setting}: {', '.join(map(str, n))}" for setting, n in counts.items())
    return Outcome(
        figure=f"steps on which the loss rises, at rates {rates}: {listed}",
        verdict=verdict(
            not any(counts["Grams, aligned"]),
            not any(counts["Grams, rotated"]),
            any(counts["Adam, aligned"]) and any(counts["Adam, rotated"]),
        ),
        numbers={"rates": _RATES, "rises": counts, "lowest_relative_loss": lowest},
    )


CLAIMS = (
    Claim(
        name="grams-monotone",
        claim="With small steps Grams lowers the loss on every step, where Adam overshoots.",
        source="Cao, Li, Song 2024, arXiv:2412.17107 (descent property)",
        how=(
            "Quadratic in 20 dimensions, curvatures 1 to 1000 along the axes (aligned) or along "
            "random directions (rotated), from all ones with exact gradients, until the loss is "
            "1e-6 of its first value. Counts steps on which it rises. Holds if Grams has none in "
            "either setting and Adam some in both."
        ),
        measure=_measure,
        immediate=True,
    ),
)
