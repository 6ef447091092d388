"""The same train step twice: made by the library, and written by hand."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxopt_suite.experiments import model
from jaxopt_suite.optimizers import registry
from jaxopt_suite.parallel.train_step import make_train_step

LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Task:
    """What to compile for.

    Attributes:
      sizes: of the model.
      mesh: the devices, one axis ``data``.
      tokens: shape and dtype of a batch.
      scan_layers: whether the model loops over its layers.
    """

    sizes: model.ModelConfig
    mesh: Mesh
    tokens: jax.ShapeDtypeStruct
    scan_layers: bool

    def model(self) -> tuple[Any, Any]:
        """Graph definition and abstract parameters."""
        make = lambda: model.Transformer(self.sizes, rngs=nnx.Rngs(0), scan_layers=self.scan_layers)
        graphdef, state = nnx.split(nnx.eval_shape(make))
        return graphdef, nnx.to_pure_dict(state)


def ours(task: Task, graphdef: Any, params: Any) -> Callable[[], jax.stages.Lowered]:
    """Traces and lowers the library's step."""
    recipe = registry()["adamw"]
    step = make_train_step(
        functools.partial(model.loss_fn, graphdef),
        recipe.make(LEARNING_RATE),
        task.mesh,
        param_specs=model.param_specs(task.sizes, task.mesh),
    )
    return lambda: step.lower(params, task.tokens)


def by_hand(task: Task, graphdef: Any, params: Any) -> Callable[[], jax.stages.Lowered]:
    """Traces and lowers the step as one would write it for this model and mesh alone."""
    tx = optax.adamw(LEARNING_RATE, **registry()["adamw"].defaults)
    whole = NamedSharding(task.mesh, PartitionSpec())
    split = NamedSharding(task.mesh, PartitionSpec("data"))

    def step(params: Any, state: Any, tokens: jax.Array) -> tuple[Any, Any, Any]:
        loss, grads = jax.value_and_grad(functools.partial(model.loss_fn, graphdef))(params, tokens)
        updates, state = tx.update(grads, state, params)
        squares = (optax.tree.norm(tree, squared=True) for tree in (grads, updates))
        metrics = jnp.stack([loss, *squares, jnp.ones_like(loss)])
        return optax.apply_updates(params, updates), state, metrics

    def lower() -> jax.stages.Lowered:
        state = jax.eval_shape(tx.init, params)
        jitted = jax.jit(
            step, in_shardings=(whole, whole, split), out_shardings=whole, donate_argnums=(0, 1)
        )
        return jitted.lower(params, state, task.tokens)

    return lower


def compiling(
    task: Task, program: Callable[..., Any], clock: Callable[[], float]
) -> Callable[[], float]:
    """Compiles a program anew at each call, and says in how many milliseconds by ``clock``."""
    graphdef, params = task.model()

    def compile_() -> float:
        jax.clear_caches()  # neither is to profit from what the other has traced
        start = clock()
        program(task, graphdef, params)().compile()
        return 1e3 * (clock() - start)

    return compile_
