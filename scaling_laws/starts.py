"""Where a fit starts from: points that fill a box of plausible values, grids, published values."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxopt_suite import core
from jaxopt_suite.scaling_laws import coordinates
from jaxopt_suite.scaling_laws.law import Law

_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)


def halton(count: int, dimensions: int, seed: int) -> np.ndarray:
    """A Halton sequence ``[count, dimensions]`` in [0, 1), shifted by ``seed`` modulo 1.

    Raises:
      ValueError: for more than 16 dimensions, where its projections become lines.
    """
    if dimensions > len(_PRIMES):
        raise ValueError(
            f"starts can be spread over at most {len(_PRIMES)} parameters, got {dimensions}: "
            "give explicit starts"
        )
    points = np.zeros((count, dimensions))
    for column, base in zip(points.T, _PRIMES, strict=False):
        index, digit = np.arange(1, count + 1), 1.0
        while index.any():
            digit /= base
            column += digit * (index % base)
            index //= base
    shift = np.random.default_rng(seed).random(dimensions)
    return (points + shift) % 1.0


def spread(law: Law, centring: np.ndarray, smallest: float, count: int, seed: int) -> np.ndarray:
    """Solver vectors ``[count, p]`` that fill the law's start ranges in centred coordinates.

    Args:
      law: with the ranges.
      centring: matrix of ``coordinates.centring``.
      smallest: the smallest observed output, the unit of relative ranges.
      count: of starts.
      seed: of the shift.
    """
    z = halton(count, len(law.names), seed)
    for column, parameter in zip(z.T, law.parameters, strict=True):
        unit = abs(smallest) if parameter.relative else 1.0
        low, high = (np.array(parameter.start) * unit).tolist()
        if parameter.positive:
            low, high = np.log(low), np.log(high)
        column[:] = low + (high - low) * column
    return z @ np.linalg.inv(centring).T


def published(law: Law) -> np.ndarray:
    """The presets of a law as solver vectors ``[presets, p]``."""
    if not law.presets:
        return np.zeros((0, len(law.names)))
    return np.stack([coordinates.to_theta(law, preset.values) for preset in law.presets.values()])


def grid(**values: Sequence[float]) -> dict[str, np.ndarray]:
    """Every combination of the given values, as arrays by parameter name, ready for ``fit``."""
    points = np.array(list(itertools.product(*values.values())), np.float64)
    return dict(zip(values, points.T, strict=True))


def resolve(
    law: Law,
    starts: int | Mapping[str, Any],
    centring: np.ndarray,
    smallest: float,
    seed: int,
) -> np.ndarray:
    """The starts a user asked for, as solver vectors ``[starts, p]``.

    Args:
      law: to fit.
      starts: how many to spread, published ones besides; or values by parameter name.
      centring: matrix of ``coordinates.centring``.
      smallest: the smallest observed output.
      seed: of the spread.

    Raises:
      ValueError: for fewer than one start, wrong names, or values that are not finite.
    """
    if isinstance(starts, Mapping):
        theta = np.atleast_2d(coordinates.to_theta(law, starts))
        if not np.isfinite(theta).all():
            raise ValueError(f"starts of {law.name} must be finite, got {dict(starts)!r}")
        return theta
    core.check_int("starts", starts)
    theirs = published(law)
    return np.concatenate([spread(law, centring, smallest, starts, seed), theirs])
