r"""Minima of one isoFLOP slice: of curves through losses against the logarithm of a size.

A curve is fitted to many sets of losses of the same runs at once, so that redrawn noise costs one
matrix product.

- ``"parabola"``: $L = c_0 + c_1 u + c_2 u^2$, as in Hoffmann et al. (2022), arXiv:2203.15556. The
  true slice $E + p e^{-\alpha u} + q e^{\beta u}$ is steeper on one side unless $\alpha = \beta$,
  and the vertex is off even without noise (arXiv:2603.22339, 2026).
- ``"law"``: that slice itself, with $\alpha$ and $\beta$ given and $E, p, q$ fitted.
- ``"akima"``: Akima's (1970) cubic through every loss; it assumes no form and follows the noise.
  There is no monotone interpolation (PCHIP): its minimum is the lowest run by construction.
"""

import dataclasses

import numpy as np

from jaxopt_suite import core

METHODS = ("parabola", "law", "akima")


@dataclasses.dataclass(frozen=True)
class Minima:
    """Minima of curves through sets of losses, ``[sets]`` each.

    Attributes:
      at: logarithm of the size; NaN where the minimum is not inside the runs.
      value: of the curve there.
      side: -1 where the curve still falls at the smallest size, 1 at the largest, 0 inside.
    """

    at: np.ndarray
    value: np.ndarray
    side: np.ndarray


@dataclasses.dataclass(frozen=True)
class Curve:
    """A way to draw a curve through a slice.

    Attributes:
      method: one of ``METHODS``.
      exponents: those of falling and rising part, for ``"law"``.
    """

    method: str
    exponents: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        core.check_choice("method", self.method, METHODS)
        if (self.exponents is None) == (self.method == "law"):
            raise ValueError(
                "exponents (of N and of D) go with method='law', "
                f"got {self.exponents!r} and method={self.method!r}"
            )
        for value in self.exponents or ():
            core.check_number("exponents", value, low=0.0, low_open=True)

    @property
    def mirrored(self) -> "Curve":
        """The same against ``ln D``, which falls where ``ln N`` rises."""
        return self if self.exponents is None else Curve(self.method, self.exponents[::-1])

    def basis(self, u: np.ndarray) -> np.ndarray:
        """The three functions of ``u`` that the curve is a sum of, ``[points, 3]``."""
        if self.exponents is None:
            return np.stack([np.ones_like(u), u, u**2], axis=1)
        alpha, beta = self.exponents
        return np.stack([np.ones_like(u), np.exp(-alpha * u), np.exp(beta * u)], axis=1)

    def minima(self, x: np.ndarray, losses: np.ndarray) -> Minima:
        """Minima of the curves through each row of losses.

        Args:
          x: logarithms of sizes ``[runs]``, at least three different ones.
          losses: ``[sets, runs]``.
        """
        if self.method == "akima":
            return _akima_minima(*_averaged(x, losses))
        middle = x.mean()
        u = x - middle
        c = losses @ np.linalg.pinv(self.basis(u)).T
        with np.errstate(all="ignore"):
            at, bowl = self._vertex(c)
        inside = bowl & (at > u.min()) & (at < u.max())
        ends = self.basis(np.array([u.min(), u.max()])) @ c.T
        # A bowl falls towards its vertex; anything else has its lowest point at an end.
        side = np.where(bowl, np.sign(at - u.mean()), np.where(ends[0] < ends[1], -1, 1))
        at = np.where(inside, at, np.nan)
        return Minima(at + middle, self._height(at, c), np.where(inside, 0, side).astype(int))

    def draw(self, x: np.ndarray, losses: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The curve through one set of losses ``[runs]``, evaluated at ``[points]``."""
        if self.method == "akima":
            knots, values = _averaged(x, losses[None])
            return _hermite(knots, values[0], _akima_slopes(knots, values)[0], at)
        middle = x.mean()
        return self.basis(at - middle) @ np.linalg.pinv(self.basis(x - middle)) @ losses

    def _vertex(self, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the derivative is zero, and whether that is a minimum; ``[sets]`` each."""
        if self.exponents is None:
            return -c[:, 1] / (2 * c[:, 2]), c[:, 2] > 0
        alpha, beta = self.exponents
        bowl = (c[:, 1] > 0) & (c[:, 2] > 0)
        return np.log(alpha * c[:, 1] / (beta * c[:, 2])) / (alpha + beta), bowl

    def _height(self, at: np.ndarray, c: np.ndarray) -> np.ndarray:
        return np.einsum("sk,sk->s", self.basis(at), c)


@dataclasses.dataclass(frozen=True)
class CubicTest:
    """Whether a slice is more lopsided than a parabola can be.

    Attributes:
      t: the cubic coefficient over its standard error; NaN with fewer than five runs.
      shift: how far the minimum of the cubic lies above that of the parabola, in ``ln N``; NaN if
        it has none inside the runs.
    """

    t: float
    shift: float


def cubic_test(x: np.ndarray, losses: np.ndarray) -> CubicTest:
    """Fits a cubic to ``losses [runs]`` against ``x [runs]``."""
    u = x - x.mean()
    if len(np.unique(x)) < 5:
        return CubicTest(np.nan, np.nan)
    powers = np.stack([u**k for k in range(4)], axis=1)
    c = np.linalg.pinv(powers) @ losses
    residual = losses - powers @ c
    # A slice without noise leaves round-off, over which any cubic would be certain: call it that.
    variance = max(residual @ residual / (len(u) - 4), (1e-12 * abs(losses).max()) ** 2)
    error = np.sqrt(variance * np.linalg.inv(powers.T @ powers)[3, 3])
    discriminant = 4 * c[2] ** 2 - 12 * c[1] * c[3]
    shift = np.nan
    if discriminant > 0 and c[2] > 0:
        # Of the two roots the one that is the parabola's when the cubic term vanishes.
        lowest = -2 * c[1] / (2 * c[2] + np.sqrt(discriminant))
        if u.min() < lowest < u.max():
            shift = lowest + x.mean() - Curve("parabola").minima(x, losses[None]).at[0]
    return CubicTest(float(c[3] / error), float(shift))


def _averaged(x: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different sizes ``[sizes]`` in order, and the mean loss at each ``[sets, sizes]``."""
    sizes, index = np.unique(x, return_inverse=True)
    means = np.stack([losses[:, index == i].mean(axis=1) for i in range(len(sizes))], axis=1)
    return sizes, means


def _akima_slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Derivatives ``[sets, knots]`` at the knots ``x [knots]`` of values ``y [sets, knots]``."""
    m = np.diff(y, axis=1) / np.diff(x)
    left = 2 * m[:, :1] - m[:, 1:2]
    right = 2 * m[:, -1:] - m[:, -2:-1]
    m = np.concatenate([2 * left - m[:, :1], left, m, right, 2 * right - m[:, -1:]], axis=1)
    change = np.abs(np.diff(m, axis=1))
    before, after = change[:, :-2], change[:, 2:]
    total = before + after
    flat = total <= 1e-9 * total.max()
    weighted = (after * m[:, 1:-2] + before * m[:, 2:-1]) / np.where(flat, 1.0, total)
    return np.where(flat, 0.5 * (m[:, 1:-2] + m[:, 2:-1]), weighted)


def _hermite(x: np.ndarray, y: np.ndarray, slope: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The cubic with values and slopes ``[knots]`` at ``x``, evaluated at ``at``."""
    i = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
    h = x[i + 1] - x[i]
    t = (at - x[i]) / h
    return (
        (1 + 2 * t) * (1 - t) ** 2 * y[i]
        + t * (1 - t) ** 2 * h * slope[i]
        + t**2 * (3 - 2 * t) * y[i + 1]
        + t**2 * (t - 1) * h * slope[i + 1]
    )


def _akima_minima(x: np.ndarray, y: np.ndarray) -> Minima:
    """Minima of Akima's curves: at a root of the derivative of some piece, or at an end."""
    h, slope = np.diff(x), _akima_slopes(x, y)
    y0, d0, d1 = y[:, :-1], slope[:, :-1] * h, slope[:, 1:] * h
    rise = np.diff(y, axis=1)
    a, b = d0 + d1 - 2 * rise, 3 * rise - 2 * d0 - d1  # y0 + d0 t + b t^2 + a t^3
    with np.errstate(all="ignore"):
        root = np.sqrt(b**2 - 3 * a * d0)
        # The root with a positive second derivative, in a form without cancellation.
        t = np.where(b > 0, -d0 / (b + root), (root - b) / (3 * a))
        inner = np.where((t >= 0) & (t <= 1), y0 + t * (d0 + t * (b + t * a)), np.inf)
    best = np.argmin(inner, axis=1)[:, None]
    pick = lambda array: np.take_along_axis(array, best, axis=1)[:, 0]
    value, low, high = pick(inner), y[:, 0], y[:, -1]
    side = np.where((low <= value) & (low <= high), -1, np.where(high <= value, 1, 0))
    inside = side == 0
    at = (x[:-1] + 0 * y0)[np.arange(len(y)), best[:, 0]] + pick(t) * h[best[:, 0]]
    return Minima(np.where(inside, at, np.nan), np.where(inside, value, np.nan), side)
