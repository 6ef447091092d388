"""What is done about small eigenvalues before a root is taken.

A statistic of T gradients has rank T at most, and in float32 the eigenvalues that should be zero
come out as ±1e-8 to ±1e-7 of the largest. A root without damping is made of that noise.
"""

import dataclasses
from typing import Literal

import jax

from jaxopt_suite import core

LEAST_SCALE = 1e-25
"""The largest eigenvalue counts as at least this, so that a zero matrix has a finite root."""


@dataclasses.dataclass(frozen=True)
class Relative:
    """Adds ``epsilon * λ I``, where λ estimates the largest eigenvalue: no unit of the loss counts.

    The rule of Anil et al., 2020, arXiv:2002.09018; λ is at least ``LEAST_SCALE``.

    Attributes:
      epsilon: above 0 and at most 1. float32 inverts condition numbers up to about 1e6.
      estimate: ``"power"``: by power iteration, between the largest diagonal entry and the largest
        eigenvalue; ``Eigh`` takes the eigenvalue itself. ``"norm"``: the largest sum of magnitudes
        in a row, an upper bound; Meta's rule in its higher-order solver.
    """

    epsilon: jax.typing.ArrayLike = 1e-6
    estimate: Literal["power", "norm"] = "power"

    def __post_init__(self) -> None:
        core.check_number("epsilon", self.epsilon, low=0.0, high=1.0, low_open=True)
        core.check_choice("estimate", self.estimate, ("power", "norm"))


@dataclasses.dataclass(frozen=True)
class Absolute:
    """Adds ``epsilon I``, in the unit of the matrix: that of a squared gradient.

    The rule of Shi et al., 2023, arXiv:2309.06497. With mean-reduced losses entries of 1e-10 are
    common, and an epsilon of 1e-8 then makes the root a multiple of the identity.

    Attributes:
      epsilon: at least 0. With 0 a singular matrix has no root, and the result says so.
    """

    epsilon: jax.typing.ArrayLike

    def __post_init__(self) -> None:
        core.check_number("epsilon", self.epsilon, low=0.0)


@dataclasses.dataclass(frozen=True)
class PseudoInverse:
    """Adds nothing; directions of eigenvalues up to ``max(rtol * largest, atol)`` get a root of 0.

    For ``Eigh`` only. Meta's ``PseudoInverseConfig`` has an ``rtol`` of 0.0, which inverts the
    noise that is positive; ours is their ``None``.

    Attributes:
      rtol: at least 0; ``None`` is the matrix's size times the dtype's epsilon.
      atol: at least 0, in the unit of the matrix.
    """

    rtol: float | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        if self.rtol is not None:
            core.check_number("rtol", self.rtol, low=0.0)
        core.check_number("atol", self.atol, low=0.0)


Damping = Relative | Absolute | PseudoInverse


def check_damping(damping: Damping) -> None:
    """Raises ``TypeError`` unless it is one of the three."""
    if not isinstance(damping, Relative | Absolute | PseudoInverse):
        raise TypeError(
            "damping must be roots.Relative(...), roots.Absolute(...) or roots.PseudoInverse(...), "
            f"got {damping!r}"
        )
