"""Inverse roots and eigenbases of stacks of positive semidefinite matrices."""

from jaxopt_suite.optimizers.roots.chebyshev import Chebyshev
from jaxopt_suite.optimizers.roots.damping import (
    Absolute,
    Damping,
    PseudoInverse,
    Relative,
    check_damping,
)
from jaxopt_suite.optimizers.roots.eigenbasis import Eigenbasis, eigenbasis
from jaxopt_suite.optimizers.roots.inverse import (
    SOLVERS,
    RootResult,
    inverse_root,
    keep_last_good,
    make_solver,
)
from jaxopt_suite.optimizers.roots.newton import CoupledHigherOrder, CoupledNewton
from jaxopt_suite.optimizers.roots.newton_db import NewtonDB
from jaxopt_suite.optimizers.roots.solver import Solved, Solver
from jaxopt_suite.optimizers.roots.spectral import Eigh
from jaxopt_suite.optimizers.roots.stack import Damped, Stack, damped

__all__ = [
    "SOLVERS",
    "Absolute",
    "Chebyshev",
    "CoupledHigherOrder",
    "CoupledNewton",
    "Damped",
    "Damping",
    "Eigenbasis",
    "Eigh",
    "NewtonDB",
    "PseudoInverse",
    "Relative",
    "RootResult",
    "Solved",
    "Solver",
    "Stack",
    "check_damping",
    "damped",
    "eigenbasis",
    "inverse_root",
    "keep_last_good",
    "make_solver",
]
