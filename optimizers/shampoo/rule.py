"""Shampoo: gradients preconditioned along every mode by a root of that mode's statistic."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers.shampoo import grafting, kronecker, stacked
from jaxopt_suite.optimizers.shampoo.blocks import Cutting, Stacks, square_lengths, usable, wide
from jaxopt_suite.optimizers.shampoo.preconditioner import InUse, Kronecker, Preconditioner
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


class _Seen(NamedTuple):
    """Of a stack, after it has seen a step's gradients."""

    factors: tuple[jax.Array, ...]  # as in the state
    weights: jax.Array  # likewise
    mean: Any  # wide [rows, *block]: of the gradients; None where mu is the same
    mu: Any  # as in the state, or None
    nu: Any  # likewise

    @property
    def used(self) -> jax.Array:
        """The mean of the gradients that directions are made of."""
        mean: jax.Array = self.mu if self.mean is None else self.mean
        return mean


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
        in_use = usable(given)
        count = optax.safe_increment(state.count)

        seen = {name: self._observe(state, name, g, in_use[name]) for name, g in given.items()}
        parts = self._refreshed(state.preconditioners, seen, site, count)
        directions = self._directions(given, seen, parts, site, count)
        trace, directions = self._with_momentum(state.trace, directions)

        directions = {name: core.where_rows(in_use[name], x, 0) for name, x in directions.items()}
        skipped = {name: n + ~in_use[name][:, None] for name, n in state.skipped.items()}
        mu = None if state.mu is None else {name: rows.mu for name, rows in seen.items()}
        nu = None if state.nu is None else {name: rows.nu for name, rows in seen.items()}
        return directions, ScaleByShampooState(count, mu, trace, nu, parts, skipped)

    def _observe(
        self, state: ScaleByShampooState, name: str, gradients: jax.Array, in_use: jax.Array
    ) -> _Seen:
        """The statistics and moments of a stack after a step's gradients."""

        def on_rows(old: _Seen, gradients: jax.Array, in_use: jax.Array) -> _Seen:
            g = core.where_rows(in_use, gradients, 0)
            factors, weights = self.preconditioner.observe(old.factors, old.weights, g)
            mean = g if old.mu is None else _common.update_mean(old.mu, g, self.b1)
            return _Seen(
                factors=factors,
                weights=weights,
                mean=None if old.mean is None else mean,
                mu=None if old.mu is None else mean.astype(old.mu.dtype),
                nu=self._moment(old.nu, g),
            )

        part = state.preconditioners[name]
        mu = None if state.mu is None else state.mu[name]
        kept_as_used = mu is not None and mu.dtype == gradients.dtype
        old = _Seen(
            factors=part.factors,
            weights=part.weights,
            mean=None if kept_as_used else gradients,
            mu=mu,
            nu=None if state.nu is None else state.nu[name],
        )
        return core.update_rows(on_rows, old, gradients, in_use)

    def _moment(self, nu: jax.Array | None, gradients: jax.Array) -> jax.Array | None:
        if nu is None:
            return None
        return grafting.update_moment(self.graft, nu, gradients, self.graft_b2)

    def _refreshed(
        self,
        old: dict[str, Preconditioner],
        seen: dict[str, _Seen],
        site: stacked.Site,
        count: jax.Array,
    ) -> dict[str, Preconditioner]:
        """With new roots of those whose turn it is."""
        factors = {name: rows.factors for name, rows in seen.items()}
        due = {
            name: InUse(seen[name].weights, part.roots, part.failures) for name, part in old.items()
        }
        refresh = self.refresh.for_part(site.devices)
        new = refresh.run(self.preconditioner.refresh, due, factors, count)
        kept = self.preconditioner.begun_anew
        return {
            name: Preconditioner(kept(factors[name], part.weights), *part)
            for name, part in new.items()
        }

    def _directions(
        self,
        given: Stacks,
        seen: dict[str, _Seen],
        parts: dict[str, Preconditioner],
        site: stacked.Site,
        count: jax.Array,
    ) -> Stacks:
        """Preconditioned, with the grafted method's lengths; before the start that method's.

        One or the other: what is not used is not computed. And a mean is corrected for its bias
        only in what is made of it, so that no corrected one is written down. What is made is
        written over the gradients.
        """
        corrected, started = self._corrector(count), count >= self.refresh.start
        of_parameters = self.graft != "none" and self.graft_scope == "parameter"

        def grafted(mean: jax.Array, nu: jax.Array | None) -> jax.Array:
            return grafting.direction(
                self.graft, corrected(mean), nu, self.graft_b2, self.graft_eps, count
            )

        def preconditioned(mean: jax.Array, nu: jax.Array | None, roots: Any) -> jax.Array:
            found = corrected(kronecker.multiply(mean, roots))
            if self.graft == "none" or of_parameters:
                return found
            lengths = square_lengths(found), square_lengths(grafted(mean, nu))
            return grafting.rescaled(found, *lengths)

        def on_rows(old: jax.Array, *args: Any) -> jax.Array:
            del old
            branches = core.alike([preconditioned, lambda mean, nu, _: grafted(mean, nu)], *args)
            return jax.lax.cond(started, *branches, *args)

        found = {
            name: core.update_rows(on_rows, g, seen[name].used, seen[name].nu, parts[name].roots)
            for name, g in given.items()
        }
        if not of_parameters:
            return found
        lengths = lambda stacks: grafting.by_parameter(
            {name: square_lengths(x) for name, x in stacks.items()}, site
        )
        wanted = lengths({name: grafted(rows.used, rows.nu) for name, rows in seen.items()})
        own = lengths(found)
        return {
            name: jnp.where(started, grafting.rescaled(x, own[name], wanted[name]), x)
            for name, x in found.items()
        }

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
