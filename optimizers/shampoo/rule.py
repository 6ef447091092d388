"""Shampoo: gradients preconditioned along every mode by a root of that mode's statistic."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers.shampoo import grafting, stacked
from jaxopt_suite.optimizers.shampoo.blocks import Cutting, Stacks, usable, where_rows, wide
from jaxopt_suite.optimizers.shampoo.preconditioner import Kronecker, Preconditioner
from jaxopt_suite.optimizers.shampoo.refresh import Refresh


class ScaleByShampooState(NamedTuple):
    """State of ``scale_by_shampoo``: stacks of blocks, keyed by the shape of a block.

    Arithmetic is in float32, or in float64 if a parameter is; "wide" is that dtype.
    """

    count: jax.Array  # type: ignore[assignment]  # int32 []: updates so far
    mu: Stacks | None  # mu_dtype or wide [rows, *block]: mean of gradients; None if b1 is 0
    trace: Stacks | None  # mu_dtype or wide [rows, *block]: momentum; None if that is 0
    nu: Stacks | None  # wide [rows, *block]: moment of the grafted method; None if it has none
    preconditioners: dict[str, Preconditioner]  # statistics [rows, di, di], their roots, failures
    skipped: dict[str, jax.Array]  # int32 [rows, 1]: steps whose gradient could not be used


@dataclasses.dataclass(frozen=True)
class Shampoo:
    """What ``scale_by_shampoo`` was called with, checked."""

    b1: jax.typing.ArrayLike
    cutting: Cutting
    preconditioner: Kronecker
    refresh: Refresh
    graft: grafting.Graft
    graft_b2: jax.typing.ArrayLike
    graft_eps: jax.typing.ArrayLike
    graft_scope: grafting.Scope
    momentum: jax.typing.ArrayLike
    nesterov: bool
    mu_dtype: Any

    def init(self, params: optax.Params) -> ScaleByShampooState:
        """No statistics, and roots that are the identity."""
        core.check_real_floating(params, "shampoo")
        dtype, blocks = wide(params), self.cutting.blocks(params)

        def zeros(dtype: Any) -> Stacks:
            return {name: jnp.zeros(blocks.shape(name), dtype) for name in blocks.rows}

        mu_dtype = self.mu_dtype or dtype
        return ScaleByShampooState(
            count=jnp.zeros((), jnp.int32),
            mu=None if is_zero(self.b1) else zeros(mu_dtype),
            trace=None if is_zero(self.momentum) else zeros(mu_dtype),
            nu=zeros(dtype) if grafting.has_moment(self.graft) else None,
            preconditioners={
                name: self.preconditioner.init(rows, blocks.shape(name)[1:], dtype)
                for name, rows in blocks.rows.items()
            },
            skipped={name: jnp.zeros((rows, 1), jnp.int32) for name, rows in blocks.rows.items()},
        )

    def update(
        self,
        updates: optax.Updates,
        state: ScaleByShampooState,
        params: optax.Params | None = None,
        *,
        param_specs: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByShampooState]:
        """One step: gradients in, directions out."""
        del params, extra_args
        return stacked.run(self._on_stacks, self.cutting, updates, state, param_specs)

    def _on_stacks(
        self, given: Stacks, state: ScaleByShampooState, site: stacked.Site
    ) -> tuple[Stacks, ScaleByShampooState]:
        gradients, in_use = usable(given)
        count = optax.safe_increment(state.count)

        parts = {
            name: self.preconditioner.observe(state.preconditioners[name], g)
            for name, g in gradients.items()
        }
        refresh = self.refresh.for_part(site.devices)
        parts = refresh.run(self.preconditioner.refresh, parts, count)
        mu, mean = self._mean(state.mu, gradients)
        nu = self._moment(state.nu, gradients)
        directions = self._directions(parts, mean, nu, site, count)
        trace, directions = self._with_momentum(state.trace, directions)

        directions = {name: where_rows(in_use[name], x, 0) for name, x in directions.items()}
        skipped = {name: n + ~in_use[name][:, None] for name, n in state.skipped.items()}
        return directions, ScaleByShampooState(count, mu, trace, nu, parts, skipped)

    def _mean(self, mu: Stacks | None, gradients: Stacks) -> tuple[Stacks | None, Stacks]:
        """The new mean of the gradients, as it is stored and as it is used."""
        if mu is None:
            return None, gradients
        new = {name: _common.update_mean(mu[name], g, self.b1) for name, g in gradients.items()}
        return {name: x.astype(mu[name].dtype) for name, x in new.items()}, new

    def _moment(self, nu: Stacks | None, gradients: Stacks) -> Stacks | None:
        if nu is None:
            return None
        step = lambda x, g: grafting.update_moment(self.graft, x, g, self.graft_b2)
        return {name: step(nu[name], g) for name, g in gradients.items()}

    def _directions(
        self,
        parts: dict[str, Preconditioner],
        mean: Stacks,
        nu: Stacks | None,
        site: stacked.Site,
        count: jax.Array,
    ) -> Stacks:
        """Preconditioned, with the grafted method's lengths; before the start that method's.

        One or the other: what is not used is not computed. And a mean is corrected for its bias
        only in what is made of it, so that no corrected one is written down.
        """
        corrected = self._corrector(count)

        def grafted() -> Stacks:
            return {
                name: grafting.direction(
                    self.graft,
                    corrected(x),
                    nu[name] if nu else None,
                    self.graft_b2,
                    self.graft_eps,
                    count,
                )
                for name, x in mean.items()
            }

        def preconditioned() -> Stacks:
            found = {
                name: corrected(self.preconditioner.apply(parts[name], x))
                for name, x in mean.items()
            }
            if self.graft == "none":
                return found
            return grafting.rescaled(found, grafted(), site, self.graft_scope)

        branches = core.alike([preconditioned, grafted])
        return jax.lax.cond(count >= self.refresh.start, *branches)

    def _corrector(self, count: jax.Array) -> Callable[[jax.Array], jax.Array]:
        """Divides the mean of gradients, or what is linear in it, by the sum of its weights."""
        if is_zero(self.b1) or not self.preconditioner.bias_correction:
            return lambda x: x
        correction = _common.bias_correction(self.b1, count)
        return lambda x: x / correction.astype(x.dtype)

    def _with_momentum(
        self, trace: Stacks | None, directions: Stacks
    ) -> tuple[Stacks | None, Stacks]:
        if trace is None:
            return None, directions
        decayed = lambda x, d: jnp.asarray(self.momentum, d.dtype) * x.astype(d.dtype) + d
        new = {name: decayed(trace[name], d) for name, d in directions.items()}
        stored = {name: x.astype(trace[name].dtype) for name, x in new.items()}
        if not self.nesterov:
            return stored, new
        return stored, {name: decayed(new[name], d) for name, d in directions.items()}


def is_zero(value: Any) -> bool:
    """Whether it is known to be zero; of an array, whose value may change, it is not."""
    return isinstance(value, int | float) and value == 0
