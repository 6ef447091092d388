r"""Compute-optimal sizes from isoFLOP slices: approach 2 of Hoffmann et al. (2022).

At each budget several sizes are trained, each on the tokens that spend it. The minimum of a curve
through their losses is $N^*(C)$, and $D^*$ is what the FLOP rule leaves for it. How sure that is
comes from noise: the losses are drawn again around themselves with the spread that seeds have, and
every minimum found again. A draw whose minimum leaves the sizes trained is not thrown away, which
would cut the distribution off at the edge: it is kept as "beyond the edge" in intervals and in the
regression (see ``allocation``).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxopt_suite import core
from jaxopt_suite.scaling_laws.allocation import Line, Optima, regress
from jaxopt_suite.scaling_laws.budgets import (
    Group,
    Noise,
    group,
    noise_of_repeats,
    noise_of_residuals,
)
from jaxopt_suite.scaling_laws.frontier import FlopRule, affordable
from jaxopt_suite.scaling_laws.refusals import NoInteriorOptimum, TooFewRuns, TooFewSlices
from jaxopt_suite.scaling_laws.slices import CubicTest, Curve, Minima, cubic_test

_TOLD = 3  # refused budgets among the warnings; all are in ``refused``
_LOPSIDED = 3.0  # |t| of the cubic term from which the parabola is called biased


@dataclasses.dataclass(frozen=True)
class Slice:
    """The optimum at one budget.

    Attributes:
      flops: the budget.
      n: optimal parameters.
      d: tokens that the budget leaves for them.
      loss: of the curve there.
      sizes: parameters of the runs in the window, ``[runs]``.
      losses: of these runs.
      interval: of ``n``; 0 or infinity where it lies beyond the sizes trained.
      censored: share of draws below the smallest and above the largest size.
      cubic: whether the slice is lopsided; ``cubic.shift`` estimates how far a parabola is off.
    """

    flops: float
    n: float
    d: float
    loss: float
    sizes: np.ndarray
    losses: np.ndarray
    interval: tuple[float, float] | None
    censored: tuple[float, float]
    cubic: CubicTest


@dataclasses.dataclass(frozen=True)
class IsoFLOP:
    """Optima of slices and the frontier through them.

    Attributes:
      curve: what was fitted to each slice.
      slices: smallest budget first.
      refused: budgets that were left out, with the reason.
      noise: of the losses; ``None`` where nothing says what it is.
      a: the line of ``ln N*`` on ``ln C``.
      b: the line of ``ln D*``. With ``6 N D``, ``a.slope + b.slope`` is 1.
      unconstrained: slopes of ``ln N*`` and of the minimum over ``ln D``, found separately.
      level: of intervals.
    """

    curve: Curve
    slices: tuple[Slice, ...]
    refused: tuple[str, ...]
    noise: Noise | None
    a: Line
    b: Line
    unconstrained: tuple[float, float]
    level: float

    @property
    def warnings(self) -> list[str]:
        """What makes the numbers doubtful."""
        found = list(self.refused[:_TOLD])
        if len(self.refused) > _TOLD:
            found.append(f"{len(self.refused) - _TOLD} more budgets were left out")
        lopsided = [s for s in self.slices if abs(s.cubic.t) > _LOPSIDED]
        if lopsided and self.curve.method == "parabola":
            shifts = [s.cubic.shift for s in lopsided if np.isfinite(s.cubic.shift)]
            size = f", by {np.expm1(np.mean(shifts)):+.0%} of N at their mean" if shifts else ""
            found.append(
                f"{len(lopsided)} of {len(self.slices)} slices are lopsided: cubics put the "
                f"minimum elsewhere than parabolas{size}"
            )
        if abs(self.a.curvature_t) > _LOPSIDED:
            found.append(
                f"the frontier bends (quadratic term {self.a.curvature:.2g}, "
                f"t = {self.a.curvature_t:.1f}): a single exponent does not extrapolate"
            )
        return found

    def __str__(self) -> str:
        low, high = self.a.interval
        lines = [f"{'FLOP':>9}  {'N':>9} {'D':>9} {'loss':>7}  interval of N"]
        for s in self.slices:
            band = "" if s.interval is None else "[{:.3g}, {:.3g}]".format(*s.interval)
            lines.append(f"{s.flops:9.3g}  {s.n:9.3g} {s.d:9.3g} {s.loss:7.4g}  {band}".rstrip())
        lines.append(
            f"N* ~ C^{self.a.slope:.3f} [{low:.3f}, {high:.3f}], D* ~ C^{self.b.slope:.3f}; "
            f"separately {self.unconstrained[0]:.3f} and {self.unconstrained[1]:.3f}"
        )
        return "\n".join([*lines, *(f"WARNING: {text}" for text in self.warnings)])


def isoflop(
    runs: Any,
    *,
    method: str = "parabola",
    exponents: tuple[float, float] | None = None,
    window: float | None = None,
    rule: FlopRule | None = None,
    budgets: Sequence[float] | None = None,
    tolerance: float = 0.1,
    noise: float | None = None,
    draws: int = 1000,
    floor: float = 0.02,
    on_edge: str = "raise",
    level: float = 0.9,
    seed: int = 0,
) -> IsoFLOP:
    """Optimal sizes per budget, and their frontier.

    Args:
      runs: columns ``N``, ``loss``, and ``D`` or ``C``; see ``fit``.
      method: ``"parabola"``, ``"law"`` or ``"akima"``; see ``slices``.
      exponents: ``(alpha, beta)`` for ``"law"``, of a fit for instance.
      window: factor in ``N`` around the best run of a slice within which runs are used; ``None``:
        all of them. A wide window biases a parabola, a narrow one makes it noisy.
      rule: FLOPs of ``N`` parameters on ``D`` tokens, a function of arrays; ``None``: ``6 N D``.
      budgets: FLOPs of the slices; ``None``: runs closer than ``tolerance`` are of one slice.
      tolerance: in nats of compute.
      noise: standard deviation of ``ln loss`` between seeds. ``None``: from runs that are repeats
        of one another, else from what cubics leave over.
      draws: how often losses are drawn again; 0 for none, then slices weigh the same.
      floor: least standard deviation of ``ln N*`` in the regression, in nats.
      on_edge: ``"raise"`` or ``"drop"``, for a budget without a minimum inside its sizes, or of
        whose draws most have none.
      level: of intervals.
      seed: of the draws.

    Raises:
      ValueError: for an illegal argument or column.
      TooFewRuns: for a slice with fewer than three sizes.
      NoInteriorOptimum: for a slice without one, unless they are dropped.
      TooFewSlices: if fewer than three are left.
    """
    core.check_choice("on_edge", on_edge, ("raise", "drop"))
    core.check_int("draws", draws, low=0)
    core.check_number("tolerance", tolerance, low=0.0)
    core.check_number("floor", floor, low=0.0)
    core.check_number("level", level, low=0.0, high=1.0, low_open=True, high_open=True)
    curve = Curve(method, exponents)
    if window is not None:
        core.check_number("window", window, low=1.0, low_open=True)
    found = group(runs, rule=rule, budgets=budgets, tolerance=tolerance)
    groups = [_windowed(each, window) for each in found]
    seeds = _noise(groups, noise)
    rng = np.random.default_rng(seed)
    kept, refused = [], []
    for each in groups:
        try:
            kept.append(_Slice.of(each, curve, seeds, draws, rng))
        except (NoInteriorOptimum, TooFewRuns) as problem:
            if on_edge == "raise":
                raise type(problem)(f"{problem}; on_edge='drop' leaves the budget out") from None
            refused.append(str(problem))
    if len(kept) < 3:
        raise TooFewSlices(
            f"a frontier needs at least 3 budgets with an optimum, got {len(kept)} of "
            f"{len(groups)}" + "".join(f"; {reason}" for reason in refused)
        )
    return _frontier(kept, curve, tuple(refused), seeds, rule, floor, level)


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A group with its minima over ``ln N`` and over ``ln D``: the first of each is the best."""

    group: Group
    n: Minima
    d: Minima

    @classmethod
    def of(
        cls,
        each: Group,
        curve: Curve,
        noise: Noise | None,
        draws: int,
        rng: np.random.Generator,
    ) -> "_Slice":
        sizes = len(np.unique(each.n))
        if sizes < 3:
            raise TooFewRuns(
                f"the slice at {each.flops:.3g} FLOP needs at least 3 sizes, got {sizes}"
            )
        count = draws if noise is not None else 0
        spread = 0.0 if noise is None else noise.of(each.loss)
        random = rng.standard_normal((count, len(each.loss)))
        losses = np.concatenate([each.loss[None], each.loss * np.exp(spread * random)])
        n = curve.minima(np.log(each.n), losses)
        d = curve.mirrored.minima(np.log(each.d), losses)
        lost = np.mean(n.side[1:] != 0) if count else 0.0
        if n.side[0] or d.side[0] or lost > 0.5:
            where = "below" if np.mean(n.side) < 0 else "above"
            raise NoInteriorOptimum(
                f"the slice at {each.flops:.3g} FLOP has no sure minimum between {each.n[0]:.3g} "
                f"and {each.n[-1]:.3g} parameters: train sizes {where}"
            )
        return cls(each, n, d)

    @property
    def edges(self) -> tuple[float, float]:
        return float(np.log(self.group.n[0])), float(np.log(self.group.n[-1]))

    @property
    def drawn(self) -> np.ndarray:
        """``ln N*`` of the draws, at an edge where it lies beyond it."""
        side = self.n.side[1:]
        low, high = self.edges
        return np.where(side < 0, low, np.where(side > 0, high, self.n.at[1:]))

    def interval(self, level: float) -> tuple[float, float] | None:
        side = self.n.side[1:]
        if not side.size:
            return None
        beyond = np.where(side < 0, -np.inf, np.where(side > 0, np.inf, self.n.at[1:]))
        tails = [(1 - level) / 2, (1 + level) / 2]
        low, high = np.quantile(beyond, tails, method="inverted_cdf")
        return float(np.exp(low)), float(np.exp(high))


def _windowed(each: Group, window: float | None) -> Group:
    if window is None:
        return each
    middle = each.n[np.argmin(each.loss)]
    rows = np.abs(np.log(each.n / middle)) <= np.log(window) * (1 + 1e-9)
    return Group(each.flops, each.n[rows], each.d[rows], each.loss[rows])


def _noise(groups: Sequence[Group], given: float | None) -> Noise | None:
    if given is not None:
        core.check_number("noise", given, low=0.0)
        return Noise(float(given), 0.0, 1.0, "given")
    return noise_of_repeats(groups) or noise_of_residuals(groups)


def _frontier(
    kept: Sequence[_Slice],
    curve: Curve,
    refused: tuple[str, ...],
    noise: Noise | None,
    rule: FlopRule | None,
    floor: float,
    level: float,
) -> IsoFLOP:
    flops = np.array([each.group.flops for each in kept])
    best = np.array([each.n.at[0] for each in kept])
    tokens = lambda log_n: np.log(affordable(rule, np.exp(log_n), flops))
    drawn = np.stack([each.drawn for each in kept], axis=1)
    side = np.stack([each.n.side[1:] for each in kept], axis=1)
    redrawn = len(drawn) > 0
    optima = Optima(drawn, side, drawn.std(axis=0)) if redrawn else None
    # More parameters are fewer tokens: what is censored above in N is below in D.
    others = Optima(tokens(drawn), -side, tokens(drawn).std(axis=0)) if redrawn else None
    a = regress(flops, best, optima, floor=floor, level=level)
    b = regress(flops, tokens(best), others, floor=floor, level=level)
    separate = np.array([each.d.at[0] for each in kept])
    alone = regress(flops, separate, others, floor=floor, level=level)
    slices = tuple(_result(each, level, d) for each, d in zip(kept, tokens(best), strict=True))
    return IsoFLOP(curve, slices, refused, noise, a, b, (a.slope, alone.slope), level)


def _result(each: _Slice, level: float, log_d: float) -> Slice:
    found, side = each.group, each.n.side[1:]
    share = lambda sign: float(np.mean(side == sign)) if side.size else 0.0
    return Slice(
        flops=found.flops,
        n=float(np.exp(each.n.at[0])),
        d=float(np.exp(log_d)),
        loss=float(each.n.value[0]),
        sizes=found.n,
        losses=found.loss,
        interval=each.interval(level),
        censored=(share(-1), share(1)),
        cubic=cubic_test(np.log(found.n), found.loss),
    )
