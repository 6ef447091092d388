r"""How far a fit can be trusted: resampled runs, a covariance, profiles of the objective.

*Bootstrap.* Runs, or whole groups of runs, are drawn with replacement; every resample is one vector
of row weights, fitted from the optimum with the others in one batch. A resample that is not solved
from there is fitted again from many starts, and one that is then not solved either is left out and
counted.

*Covariance* of an M-estimator, $M^{-1} G M^{-1}$ with $M = J^\top \mathrm{diag}(w c) J$ and $G =
\sum_i (w_i \psi_i / (1 - h_i))^2 J_i J_i^\top$, where the leverage $h_i = w_i c_i J_i^\top M^{-1}
J_i$ makes up for runs that pull the fit to themselves (MacKinnon and White 1985, HC3). The
curvature $c$ of Huber's function is 0 or 1, and with a small $\delta$ few runs are inside; so $c$
is the slope of $\psi$ averaged over a bandwidth $b$ around the residual, $(\psi(r+b) - \psi(r-b)) /
2b$, which for squares is exactly 1.

*Profile.* The objective minimised over all parameters but one. The interval has $2 (F - \hat F)\,
\bar c / \overline{\psi^2} \le t^2$ with $\overline{\psi^2} = \sum w \psi^2 / (n-p)$: for squares
the usual $F$ test.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from jaxopt_suite.scaling_laws import coordinates, objectives
from jaxopt_suite.scaling_laws.batch import Batch, Solutions
from jaxopt_suite.scaling_laws.distributions import student_quantile
from jaxopt_suite.scaling_laws.double import in_double
from jaxopt_suite.scaling_laws.law import Law
from jaxopt_suite.scaling_laws.refusals import FitRefused
from jaxopt_suite.scaling_laws.solver import Rows

WARM_STAGES = 3  # stages that a fit from the optimum may skip: 1e-3 on log residuals
RESCUES = 8  # starts from which a resample is tried again
MOST_LEVERAGE = 0.99  # a run that is fitted exactly has 1 and says nothing of its error
PROFILE_POINTS = 41
PROFILE_WIDTH = 6.0  # standard errors to each side


@dataclasses.dataclass(frozen=True)
class Draws:
    """Fits of resampled runs.

    Attributes:
      theta: solver vectors ``[replicates, p]`` of those that were solved.
      unit: what was resampled: ``"rows"`` or the name of the column that groups them.
      units: how many of these there are.
      resolved: how many had to be fitted again from many starts.
      unsolved: how many were left out.
    """

    theta: np.ndarray
    unit: str
    units: int
    resolved: int
    unsolved: int


def resample(groups: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """How often each row is in each resample of its groups, float64 ``[replicates, n]``.

    Args:
      groups: label of the group of each row, ``[n]``; all different to resample rows.
      replicates: number of resamples.
      seed: of the draws.

    Raises:
      FitRefused: for fewer than two groups.
    """
    labels, index = np.unique(groups, return_inverse=True)
    if len(labels) < 2:
        raise FitRefused(f"a bootstrap needs at least 2 groups of runs, got {len(labels)}")
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), replicates)
    return counts[:, index].astype(np.float64)


def bootstrap(
    batch: Batch,
    theta: np.ndarray,
    starts: np.ndarray,
    *,
    groups: np.ndarray,
    unit: str,
    replicates: int,
    seed: int,
) -> Draws:
    """Fits resamples, warm from the optimum ``theta [p]``; ``starts`` serve those that fail."""
    counts = resample(groups, replicates, seed) * batch.weights
    warm = np.broadcast_to(theta, (replicates, len(theta)))
    narrowings = max(0, batch.stages - WARM_STAGES)
    found = batch.solve(warm, batch.problems(replicates, weights=counts), stages=narrowings)
    failed = np.flatnonzero(~found.solved)
    if failed.size:
        found = found.replace(failed, _again(batch, starts[:RESCUES], counts[failed]))
    solved = found.solved
    return Draws(
        theta=found.theta[solved],
        unit=unit,
        units=len(np.unique(groups)),
        resolved=len(failed),
        unsolved=int((~solved).sum()),
    )


def _again(batch: Batch, starts: np.ndarray, counts: np.ndarray) -> Solutions:
    """The best fit of each resample ``[failed, n]`` from every one of the starts."""
    tries, failed = len(starts), len(counts)
    problem = batch.problems(tries * failed, weights=np.repeat(counts, tries, axis=0))
    found = batch.solve(np.tile(starts, (failed, 1)), problem, stages=batch.stages)
    best = found.value.reshape(failed, tries).argmin(axis=1)
    return found.take(best + tries * np.arange(failed))


@in_double
def linearise(batch: Batch, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residuals ``[n]`` and their Jacobian ``[n, p]`` at one solver vector."""
    r, jacobian = _linear(batch.law, batch.objective.space)(theta, batch.rows)
    return np.asarray(r), np.asarray(jacobian)


@functools.lru_cache(maxsize=128)
def _linear(law: Law, space: str) -> Callable[[np.ndarray, Rows], tuple[jax.Array, jax.Array]]:
    def residuals(theta: jax.Array, rows: Rows) -> jax.Array:
        predicted = law.predict(coordinates.from_theta(law, theta), rows.inputs)
        return objectives.residual(space, predicted, rows.observed)

    return jax.jit(lambda theta, rows: (residuals(theta, rows), jax.jacfwd(residuals)(theta, rows)))


def _slopes(batch: Batch, residuals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``psi`` of each residual, and its slope averaged over a bandwidth; ``[n]`` each."""
    delta, q = batch.objective.delta, batch.objective.q
    used = residuals[batch.weights > 0]
    spread = 1.4826 * np.median(np.abs(used - np.median(used)))
    width = max(1.06 * spread * len(used) ** -0.2, np.finfo(float).tiny)
    psi = lambda r: np.asarray(objectives.psi(r, delta, q))
    return psi(residuals), (psi(residuals + width) - psi(residuals - width)) / (2 * width)


@in_double
def covariance(batch: Batch, theta: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Covariance ``[p, p]`` of the solver vector; zero for parameters that are not free.

    Args:
      batch: runs and objective.
      theta: the optimum.
      free: ``bool [p]``.
    """
    residuals, jacobian = linearise(batch, theta)
    # Centred, where products are well conditioned; what is held moves in neither coordinates.
    back = np.zeros_like(batch.back)[:, free]
    back[free] = batch.back[np.ix_(free, free)]
    jacobian, weights = jacobian @ back, batch.weights
    psi, slope = _slopes(batch, residuals)
    bread = np.linalg.pinv((jacobian.T * (weights * slope)) @ jacobian, hermitian=True)
    leverage = weights * slope * np.einsum("ij,jk,ik->i", jacobian, bread, jacobian)
    scores = weights * psi / (1 - np.minimum(leverage, MOST_LEVERAGE))
    return back @ bread @ (jacobian.T * scores**2) @ jacobian @ bread @ back.T


@dataclasses.dataclass(frozen=True)
class Profile:
    """The objective along one parameter, the others fitted at each value.

    Attributes:
      name: of the parameter.
      values: ``[points]``, rising.
      objective: ``[points]``.
      parameters: of the fit at each value, ``[points]`` each.
      statistic: ``[points]``: signed root of the module's ratio; compare with Student's ``t``.
      degrees: of freedom.
    """

    name: str
    values: np.ndarray
    objective: np.ndarray
    parameters: dict[str, np.ndarray]
    statistic: np.ndarray
    degrees: int

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """Where the statistic is within Student's ``t``; infinite on a side it does not leave."""
        t = student_quantile(level, self.degrees)
        ends = (np.interp(x, self.statistic, self.values) for x in (-t, t))
        low, high = map(float, ends)
        return (
            low if self.statistic[0] <= -t else -np.inf,
            high if self.statistic[-1] >= t else np.inf,
        )


@in_double
def profile(batch: Batch, best: Solutions, cov: np.ndarray, index: int) -> Profile:
    """Fits with one parameter held at each of ``PROFILE_POINTS`` values around its optimum.

    Args:
      batch: runs and objective.
      best: the fit, without a leading axis.
      cov: covariance of the solver vector; sets the range and the starts.
      index: of the parameter.
    """
    error = np.sqrt(cov[index, index])
    if not error > 0:
        raise FitRefused(f"{batch.law.names[index]} is held or at a bound: it has no profile")
    grid = best.theta[index] + error * np.linspace(-PROFILE_WIDTH, PROFILE_WIDTH, PROFILE_POINTS)
    grid = np.unique(np.clip(grid, batch.low[index], batch.high[index]))
    starts = best.theta + np.outer((grid - best.theta[index]) / error**2, cov[index])
    starts[:, index] = grid
    low, high = (np.tile(end, (len(grid), 1)) for end in (batch.low, batch.high))
    low[:, index] = high[:, index] = grid
    found = batch.solve(starts, batch.problems(len(grid), low=low, high=high), stages=1)
    residuals, _ = linearise(batch, best.theta)
    psi, slope = _slopes(batch, residuals)
    weights = batch.weights
    degrees = max(int(np.count_nonzero(weights) - (np.diag(cov) > 0).sum()), 1)
    scale = (weights @ slope / weights.sum()) / ((weights * psi) @ psi / degrees)
    rise = np.maximum(found.value - best.value, 0.0)
    statistic = np.sign(grid - best.theta[index]) * np.sqrt(2 * rise * scale)
    values = coordinates.from_theta(batch.law, found.theta)
    return Profile(
        name=batch.law.names[index],
        values=values[batch.law.names[index]],
        objective=found.value / batch.objective.unit,
        parameters=values,
        statistic=np.maximum.accumulate(statistic),
        degrees=degrees,
    )
