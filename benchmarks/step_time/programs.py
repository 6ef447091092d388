"""The compiled update of an optimizer, and what the compiler says of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers import Recipe

_NEVER = 2**30
# Hyperparameters that set how many steps lie between two refreshes of a projection.
_REFRESH_NAMES = ("refresh_every", "update_proj_gap")


@dataclasses.dataclass(frozen=True)
class Subject:
    """One thing to time: a recipe, possibly with refreshes forced or prevented.

    Attributes:
      name: the recipe's name.
      kind: ``"step"``; for a recipe that refreshes, ``"common step"`` or ``"refresh step"``.
      tx: the transformation.
    """

    name: str
    kind: str
    tx: optax.GradientTransformation


def subjects(recipe: Recipe) -> list[Subject]:
    """The steps of a recipe that differ in cost; the first refresh of all is never among them."""
    rate = recipe.learning_rate
    refreshes = [name for name in _REFRESH_NAMES if name in recipe.hyperparameters()]
    if not refreshes:
        return [Subject(recipe.name, "step", recipe.make(rate))]
    (name,) = refreshes
    return [
        Subject(recipe.name, "common step", recipe.make(rate, **{name: _NEVER})),
        Subject(recipe.name, "refresh step", recipe.make(rate, **{name: 1})),
    ]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled update and its costs.

    Attributes:
      step: ``(gradients, state, parameters) -> (state, parameters)``; the last two are donated.
      minimum_bytes: see ``minimum_bytes``.
      bytes_accessed: memory traffic that XLA counts in the optimised program; of a conditional, the
        dearer branch.
      flops: operations counted in the same way.
      temporary_bytes: scratch memory of the program.
      state_bytes: of the optimizer's state.
    """

    step: Any
    minimum_bytes: int
    bytes_accessed: int
    flops: int
    temporary_bytes: int
    state_bytes: int


def compile_update(
    tx: optax.GradientTransformation, params: Any, *, sharding: jax.sharding.Sharding | None = None
) -> Program:
    """Compiles the update for parameters of the shapes of ``params``; allocates nothing.

    Args:
      tx: the optimizer.
      params: shapes and dtypes of the parameters.
      sharding: of every array, on devices that need not be here; ``None`` is the default device.
    """

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    params = jax.tree.map(place, params)
    state = jax.tree.map(place, jax.eval_shape(tx.init, params))
    compiled: Any = jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params).compile()
    cost = compiled.cost_analysis()
    return Program(
        step=compiled,
        minimum_bytes=minimum_bytes(params, state),
        bytes_accessed=int(cost["bytes accessed"]),
        flops=int(cost.get("flops", 0.0)),
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        state_bytes=core.tree_bytes(state),
    )


def minimum_bytes(params: Any, state: Any) -> int:
    """The least memory traffic an update can have: g + 2p + 2s.

    Gradients are read (g bytes, as many as parameters); parameters (p) and state (s) are read and
    written once each.
    """
    size = core.tree_bytes(params)
    return size + 2 * size + 2 * core.tree_bytes(state)


def arrays(params: Any, *, seed: int) -> Any:
    """Normal numbers of standard deviation 0.02 in the shapes of ``params``."""
    rng = np.random.default_rng(seed)
    draw = lambda p: jnp.asarray(0.02 * rng.standard_normal(p.shape, np.float32), p.dtype)
    return jax.tree.map(draw, params)
