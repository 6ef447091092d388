"""SOAP: Adam in the slowly turning eigenbases of Shampoo's statistics."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers.shampoo import kronecker
from jaxopt_suite.optimizers.shampoo.blocks import Blocks, Stacks, cut, usable, where_rows, wide
from jaxopt_suite.optimizers.shampoo.eigenbases import Bases, Method, Rotated
from jaxopt_suite.optimizers.shampoo.refresh import Refresh, Schedule, make_refresh

FirstStep = Literal["update", "skip"]
FIRST_STEPS = ("update", "skip")


class ScaleBySoapState(NamedTuple):
    """State of ``scale_by_soap``: stacks of blocks, keyed by the shape of a block.

    Arithmetic is in float32, or in float64 if a parameter is; "wide" is that dtype.
    """

    count: jax.Array  # type: ignore[assignment]  # int32 []: gradients seen so far
    rotated: dict[str, Rotated]  # moments [rows, *block]; statistics and bases [rows, di, di]
    skipped: dict[str, jax.Array]  # int32 [rows]: steps whose gradient could not be used


@dataclasses.dataclass(frozen=True)
class _Soap:
    """What ``scale_by_soap`` was called with, checked."""

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    eps_mode: _common.EpsMode
    block_size: int
    merge_dims: bool
    stack_multiple: int
    bases: Bases
    refresh: Refresh
    method: Method
    skip_first: bool
    mu_dtype: Any

    def init(self, params: optax.Params) -> ScaleBySoapState:
        core.check_real_floating(params, "soap")
        dtype, blocks = wide(params), self._blocks(params)
        return ScaleBySoapState(
            count=jnp.zeros((), jnp.int32),
            rotated={
                name: self.bases.init(blocks.shape(name), dtype, self.mu_dtype or dtype)
                for name in blocks.rows
            },
            skipped={name: jnp.zeros(rows, jnp.int32) for name, rows in blocks.rows.items()},
        )

    def update(
        self,
        updates: optax.Updates,
        state: ScaleBySoapState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySoapState]:
        del params, extra_args
        leaves, structure = jax.tree.flatten(updates)
        blocks, dtype = self._blocks(updates), wide(updates)
        gradients, in_use = usable(blocks.stack([x.astype(dtype) for x in leaves]))
        count = optax.safe_increment(state.count)
        first = count == 1

        begin = lambda parts: self.bases.refresh(
            self._observe(parts, gradients, first), method="eigh"
        )
        parts = jax.lax.cond(first, begin, lambda same: same, state.rotated)
        steps = count - 1 if self.skip_first else count
        directions, parts = self._adam(parts, gradients, steps)
        parts = self._observe(parts, gradients, ~first)
        again = lambda due: self.bases.refresh(due, method=self.method)
        parts = self.refresh.run(again, parts, steps)

        directions = {name: where_rows(in_use[name], x, 0) for name, x in directions.items()}
        skipped = {name: n + ~in_use[name] for name, n in state.skipped.items()}
        new_state = ScaleBySoapState(count, parts, skipped)
        return structure.unflatten(blocks.unstack(directions, leaves)), new_state

    def _blocks(self, tree: Any) -> Blocks:
        return cut(
            [jnp.shape(x) for x in jax.tree.leaves(tree)],
            block_size=self.block_size,
            merge_dims=self.merge_dims,
            multiple=self.stack_multiple,
        )

    def _observe(
        self, parts: dict[str, Rotated], gradients: Stacks, active: jax.Array
    ) -> dict[str, Rotated]:
        return {name: self.bases.observe(parts[name], g, active) for name, g in gradients.items()}

    def _adam(
        self, parts: dict[str, Rotated], gradients: Stacks, steps: jax.Array
    ) -> tuple[Stacks, dict[str, Rotated]]:
        """Adam's direction in each basis, turned back; and the moments. Nothing for step 0."""
        directions, new = {}, {}
        for name, g in gradients.items():
            part = parts[name]
            turned = kronecker.rotate(g, part.bases)
            mu = _common.update_mean(part.mu, turned, self.b1)
            nu = _common.update_mean(part.nu, jnp.square(turned), self.b2)
            at = jnp.maximum(steps, 1)
            correction = _common.bias_correction(self.b1, at).astype(mu.dtype)
            direction = _common.divide_by_root(
                mu / correction,
                nu,
                _common.bias_correction(self.b2, at),
                eps=self.eps,
                eps_root=0.0,
                eps_mode=self.eps_mode,
            )
            begun = steps > 0
            back = kronecker.rotate_back(direction, part.bases)
            directions[name] = jnp.where(begun, back, 0)
            new[name] = part._replace(
                mu=jnp.where(begun, mu, 0).astype(part.mu.dtype), nu=jnp.where(begun, nu, 0)
            )
        return directions, new
