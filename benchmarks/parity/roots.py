"""Inverse roots against the solvers of PyTorch Distributed Shampoo, as one-sided preconditioners.

Of a gradient G the update is ``-lr (G G^T + ρ I)^(-1/p) G``: that is what both sides' roots are put
to. ρ is a hundredth of the largest row sum, so that the condition of what is inverted is below
101 and the agreement is that of two float32 computations and not of their rounding.
"""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.parity.compare import LEARNING_RATE, Case, Departure, Method, difference_of_updates
from jaxopt_suite.optimizers import roots

_RHO = 1e-2
_DAMPING = roots.Relative(_RHO, estimate="norm")


def _ours(order: Fraction, solver: roots.Solver) -> optax.GradientTransformation:
    def one(g: jax.Array) -> jax.Array:
        rows = g.reshape(len(g), -1)
        gram = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
        root = roots.inverse_root(gram[None], order, solver=solver, damping=_DAMPING).root[0]
        return jnp.matmul(root, rows, precision=jax.lax.Precision.HIGHEST).reshape(g.shape)

    tx = optax.stateless(lambda updates, params: jax.tree.map(one, updates))
    return optax.chain(tx, optax.scale_by_learning_rate(LEARNING_RATE))


class _Preconditioned:
    """The official root in the same update; where it takes an epsilon, it is given ours."""

    def __init__(self, official: Any, params: Any, order: Fraction, config: Any) -> None:
        self._official, self._params = official, list(params)
        self._order, self._config = order, config

    def step(self) -> None:
        torch = self._official.torch
        for p in self._params:
            rows = p.grad.reshape(len(p.grad), -1)
            gram = rows @ rows.T
            epsilon = 0.0 if self._has_epsilon() else _RHO * float(gram.abs().sum(1).max())
            root = self._official.matrix_inverse_root(
                gram, root=self._order, root_inv_config=self._config, epsilon=epsilon
            )
            with torch.no_grad():
                p.add_((root @ rows).reshape(p.shape), alpha=-LEARNING_RATE)

    def _has_epsilon(self) -> bool:
        return isinstance(self._config, self._official.CoupledHigherOrderConfig)


def _case(official: Any, name: str, order: Fraction, solver: roots.Solver, config: Any) -> Case:
    return Case(
        name=f"{name}, p = {order}",
        settings={"order": str(order), "damping": f"{_RHO:g} of the largest row sum"},
        ours=lambda weight_decay: _ours(order, solver),
        official=lambda params, weight_decay: _Preconditioned(
            official, params.values(), order, config
        ),
        transposed=False,
    )


def _build(official: Any) -> tuple[list[Case], list[Departure]]:
    higher = official.CoupledHigherOrderConfig(rel_epsilon=_RHO, abs_epsilon=0.0)
    newton, eigen = official.CoupledNewtonConfig(), official.EigenConfig()
    four = Fraction(4)
    solvers = [
        ("eigh", four, roots.Eigh(negative="shift"), eigen),
        ("coupled Newton", four, roots.CoupledNewton(), newton),
        ("coupled higher order", four, roots.CoupledHigherOrder(), higher),
        ("coupled higher order", Fraction(5, 2), roots.CoupledHigherOrder(), higher),
    ]
    cases = [_case(official, *each) for each in solvers]
    return cases, [
        Departure(
            "The damping is relative to the largest eigenvalue by default; the official default is "
            "an absolute epsilon, and the higher-order solver has both."
        ),
        Departure(
            "Eigenvalues below the damping are raised to it by default; the official code shifts "
            'all of them (negative="shift"; figure: the default, p = 4).',
            lambda: difference_of_updates(cases[0], _ours(four, roots.Eigh())).value,
        ),
        Departure(
            "A root whose residual is large is marked, and the previous one kept; the official "
            "higher-order solver raises, and coupled Newton logs."
        ),
        Departure(
            "A pseudo-inverse leaves out what is within rounding of zero by default; the official "
            "default (rank_rtol=0.0) inverts positive noise (rtol=0.0)."
        ),
    ]


METHOD = Method(
    name="roots",
    repository="facebookresearch/optimizers",
    marks=("distributed_shampoo/preconditioner/matrix_functions.py",),
    packages=("torch",),
    module="distributed_shampoo/preconditioner/matrix_functions.py",
    build=_build,
)
