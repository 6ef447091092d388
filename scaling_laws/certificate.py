"""Whether a parameter vector is the minimum of an objective: judged, not reported by a solver.

A solver's success flag says that it stopped. L-BFGS with the tolerances of its libraries stops on
the *mean* of the Huber losses of 240 runs after four steps, anywhere in a flat valley, and reports
success. So any vector, wherever it came from, is looked at: is the gradient zero, is it a minimum,
do fits that start a little way off come back to it, are parameters at a bound, are some not
determined.
"""

import dataclasses

import numpy as np

from jaxopt_suite.scaling_laws.batch import ACCEPTED, NOTHING_LEFT, Batch, Solutions

RESTARTS = 8
PERTURBATION = 0.05  # of the size of each term, and of each other parameter
SAME = 1e-6  # relative difference of objectives that are the same
FLAT = 1e-9  # eigenvalue of the scaled Gauss-Newton matrix, relative to the largest


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was found at a parameter vector.

    Attributes:
      objective: its value, the sum of the objective's table.
      gradient: largest cosine between the weighted residuals and a centred column of the Jacobian,
        over the parameters that are free to move; 0 at a minimum.
      step: largest component of the Newton step from there, in centred coordinates.
      residual: root mean square of the residuals, down-weighted as in the objective.
      agreement: share of the refined starts that reached the best objective within 1e-6; ``None``
        where a given vector was judged.
      restart_gain: how much lower, relatively, restarts from 5 % around it came to lie.
      curved: whether the Hessian has no negative eigenvalue.
      condition: condition number of the Gauss-Newton matrix in centred, scaled coordinates.
      flat: directions that the runs do not determine, each as the parameters in it.
      bounds: parameters held by a bound.
    """

    objective: float
    gradient: float
    step: float
    residual: float
    agreement: float | None
    restart_gain: float
    curved: bool
    condition: float
    flat: tuple[tuple[str, ...], ...]
    bounds: tuple[str, ...]

    @property
    def stationary(self) -> bool:
        """Whether the gradient, or everything, is zero within the tolerance."""
        return self.gradient <= ACCEPTED or self.residual <= NOTHING_LEFT

    @property
    def status(self) -> str:
        """``"converged"``, ``"bound"``, ``"flat"`` or ``"not a minimum"``."""
        exact = self.residual <= NOTHING_LEFT
        if not (self.stationary and (exact or (self.curved and self.restart_gain <= SAME))):
            return "not a minimum"
        if self.bounds:
            return "bound"
        return "flat" if self.flat else "converged"

    @property
    def converged(self) -> bool:
        """Whether it is a minimum inside the bounds that the runs determine."""
        return self.status == "converged"

    def __str__(self) -> str:
        parts = [f"{self.status}: gradient {self.gradient:.1e}, step {self.step:.1e}"]
        if self.agreement is not None:
            parts.append(f"{self.agreement:.0%} of the starts agree")
        parts.append(f"restarts gain {self.restart_gain:.1e}, condition {self.condition:.1e}")
        parts += [f"at a bound: {', '.join(self.bounds)}"] if self.bounds else []
        parts += [f"not determined: {' with '.join(names)}" for names in self.flat]
        return ", ".join(parts)


def judge(
    batch: Batch,
    theta: np.ndarray,
    *,
    fixed: tuple[str, ...] = (),
    agreement: float | None = None,
    seed: int = 0,
) -> Certificate:
    """Examines one solver vector ``[p]``.

    Args:
      batch: runs and objective.
      theta: the vector.
      fixed: parameters held on purpose, which are not reported as being at a bound.
      agreement: share of starts, if a fit led here.
      seed: of the perturbations.
    """
    here = batch.view(theta[None], batch.problems(1)).take(0)
    near = _perturbed(batch, theta, seed)
    restarts = batch.solve(near, batch.problems(RESTARTS), stages=1)
    value = float(here.value)
    gain = (value - float(restarts.value.min())) / value if 0 < value < np.inf else 0.0
    held = np.asarray(here.local.held)
    names = np.array(batch.law.names)
    free = held == 0
    condition, flat = _spectrum(batch, here, free)
    step, curved = _newton(batch, here, free)
    return Certificate(
        objective=value / batch.objective.unit,
        gradient=float(here.local.cosine),
        step=step,
        residual=float(here.local.level),
        agreement=agreement,
        restart_gain=max(gain, 0.0),
        curved=curved,
        condition=condition,
        flat=flat,
        bounds=tuple(str(name) for name in names[held] if name not in fixed),
    )


def agreement(found: Solutions) -> float:
    """Share of solutions that reached the best value within ``SAME``, or left nothing over."""
    best = found.value.min()
    same = (found.value <= best * (1 + SAME)) | (found.local.level <= NOTHING_LEFT)
    return float(np.mean(same & np.isfinite(found.value)))


def _perturbed(batch: Batch, theta: np.ndarray, seed: int) -> np.ndarray:
    z = batch.centring @ theta
    positive = np.array([p.positive for p in batch.law.parameters])
    size = PERTURBATION * np.where(positive, 1.0, np.maximum(np.abs(z), 0.1))
    noise = np.random.default_rng(seed).standard_normal((RESTARTS, len(z)))
    return (z + size * noise) @ batch.back.T


def _centred(batch: Batch, matrix: np.ndarray, free: np.ndarray) -> np.ndarray:
    """A matrix of second derivatives in centred coordinates, over the free parameters."""
    back = batch.back[np.ix_(free, free)]
    return back.T @ np.asarray(matrix)[np.ix_(free, free)] @ back


def _spectrum(
    batch: Batch, here: Solutions, free: np.ndarray
) -> tuple[float, tuple[tuple[str, ...], ...]]:
    """Condition number, and the parameters of every direction without curvature."""
    matrix = _centred(batch, here.local.majoriser, free)
    names = np.array(batch.law.names)[free]
    if not (len(names) and np.isfinite(matrix).all()):
        return np.inf if len(names) else 1.0, ()
    lengths = np.sqrt(np.diag(matrix))
    dead = lengths <= FLAT * lengths.max()
    scale = np.where(dead, 1.0, lengths)
    values, vectors = np.linalg.eigh(matrix / np.outer(scale, scale))
    condition = float(values[-1] / max(values[0], np.finfo(float).tiny))
    flat = [names[np.abs(v) > 0.3] for v in vectors.T[values <= FLAT * values[-1]]]
    return condition, tuple(tuple(str(name) for name in one) for one in flat)


def _newton(batch: Batch, here: Solutions, free: np.ndarray) -> tuple[float, bool]:
    """The largest component of the Newton step, and whether the Hessian has no negative curve."""
    matrix = _centred(batch, here.local.hessian, free)
    if not (free.any() and np.isfinite(matrix).all()):
        return (0.0, True) if not free.any() else (np.inf, False)
    back = batch.back[np.ix_(free, free)]
    gradient = back.T @ np.asarray(here.local.gradient)[free]
    lengths = np.sqrt(np.maximum(np.diag(_centred(batch, here.local.majoriser, free)), 1e-300))
    least = np.linalg.eigvalsh(matrix / np.outer(lengths, lengths))[0]
    move = np.linalg.lstsq(matrix, -gradient, rcond=1e-12)[0]
    return float(np.abs(move).max()), bool(least > -1e-6)
