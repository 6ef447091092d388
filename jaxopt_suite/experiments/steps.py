"""The compiled functions of training, shared by runs that differ only in seed, data or cadence."""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxopt_suite.core import tree_bytes
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import model
from jaxopt_suite.experiments.config import TrainConfig, parse_settings
from jaxopt_suite.experiments.schedules import learning_rate_schedule
from jaxopt_suite.optimizers.registry import Recipe, registry

_NOT_COMPILED_IN = ("seed", "data", "log_every", "eval_every", "eval_batches")


class TrainState(NamedTuple):
    """What a step takes and gives, and what a checkpoint holds."""

    params: Any  # nested dict, f32
    opt_state: Any  # state of chain(clipping, optimizer): a pair


class Metrics(NamedTuple):
    """What a step reports; stays on the device until it is asked for."""

    loss: jax.Array  # f32 (), before the update, nats per byte
    grad_norm: jax.Array  # f32 (), before clipping
    update_norm: jax.Array  # f32 ()
    finite: jax.Array  # bool (), whether the three above are


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One model, one optimizer with all its settings, and their compiled functions.

    Attributes:
      settings: what of the config is compiled in; ``accepts`` compares it.
      hyperparameters: what the optimizer was given besides the learning rate.
      peak: the largest learning rate; None where the optimizer keeps its own.
      schedule: learning rate by number of updates made; None where the optimizer keeps its own.
      graphdef: the model without its parameters.
      tx: clipping, then the optimizer.
      eval_params: optimizer state and parameters to the point that is evaluated.
      abstract_state: shapes and dtypes of the state.
      abstract_tokens: int32 [batch_size, seq_len + 1].
    """

    settings: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    peak: float | None
    schedule: optax.Schedule | None
    graphdef: Any
    tx: optax.GradientTransformation
    eval_params: Callable[[Any, Any], Any]
    abstract_state: TrainState
    abstract_tokens: jax.ShapeDtypeStruct

    def accepts(self, config: TrainConfig) -> bool:
        """Whether ``config`` differs from its own in seed, data, folder or cadence at most."""
        return self.settings == _compiled_in(config)

    @property
    def n_params(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state, clipping not counted (it has none)."""
        return tree_bytes(self.abstract_state.opt_state[1])

    def initial(self, preset: str, seed: int) -> TrainState:
        """The state before the first step."""
        _, params = model.build(model.PRESETS[preset], seed=seed)
        return TrainState(params, jax.jit(self.tx.init)(params))

    def _step(self, state: TrainState, tokens: jax.Array) -> tuple[TrainState, Metrics]:
        loss_of = functools.partial(model.loss_fn, self.graphdef)
        loss, grads = jax.value_and_grad(loss_of)(state.params, tokens)
        updates, opt_state = self.tx.update(grads, state.opt_state, state.params)
        measured = loss, optax.tree.norm(grads), optax.tree.norm(updates)
        finite = jnp.all(jnp.isfinite(jnp.stack(measured)))
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state), Metrics(*measured, finite)

    def _evaluate(self, state: TrainState, tokens: jax.Array) -> jax.Array:
        params = self.eval_params(state.opt_state[1], state.params)
        return model.loss_fn(self.graphdef, params, tokens)

    @functools.cached_property
    def _traced_step(self) -> Any:
        return jax.jit(self._step, donate_argnums=0).trace(
            self.abstract_state, self.abstract_tokens
        )

    @functools.cached_property
    def step(self) -> Callable[[TrainState, np.ndarray], tuple[TrainState, Metrics]]:
        """The compiled step; it consumes the state it is given (its buffers are donated)."""
        return self._traced_step.lower().compile()

    @functools.cached_property
    def _loss_of_batch(self) -> Callable[[TrainState, np.ndarray], jax.Array]:
        return jax.jit(self._evaluate).lower(self.abstract_state, self.abstract_tokens).compile()

    def evaluate(self, state: TrainState, batches: list[np.ndarray]) -> float:
        """Mean loss over ``batches``, in nats per byte."""
        losses = [self._loss_of_batch(state, tokens) for tokens in batches]
        return float(np.mean(jax.device_get(losses), dtype=np.float64))

    def learning_rate(self, step: int) -> float | None:
        """The learning rate that step number ``step`` (from 1) was taken with."""
        return None if self.schedule is None else float(self.schedule(step - 1))


def find_recipe(name: str) -> Recipe:
    """The registry's recipe of that name.

    Raises:
      UserError: if there is none, with the list of those there are.
    """
    recipes = registry()
    if name not in recipes:
        raise UserError(f"--optimizer must be one of {', '.join(recipes)}, got {name!r}")
    return recipes[name]


def build_program(
    config: TrainConfig,
    *,
    recipe: Recipe | None = None,
    tx: optax.GradientTransformation | None = None,
) -> Program:
    """Traces the model and the optimizer of ``config``; compiles nothing yet.

    Args:
      config: what to train; its seed, data, folder and cadence play no part.
      recipe: instead of the registry's entry for ``config.optimizer``.
      tx: instead of a recipe: a finished transformation with a learning rate of its own.
        ``config.optimizer`` is then only a label.

    Returns:
      The program.

    Raises:
      UserError: if the preset, the optimizer or a hyperparameter is not a legal one.
      ValueError: if ``tx`` comes with a recipe, a learning rate or settings it would ignore.
    """
    config.validate()
    if config.preset not in model.PRESETS:
        legal = ", ".join(model.PRESETS)
        raise UserError(f"--preset must be one of {legal}, got {config.preset!r}")
    if tx is not None:
        if recipe is not None or config.learning_rate is not None or config.set:
            raise ValueError("tx is complete: give it without recipe, learning_rate or set")
        return _assemble(config, tx)
    recipe = recipe or find_recipe(config.optimizer)
    settings = parse_settings(config.set)
    peak = config.learning_rate or recipe.learning_rate
    schedule = learning_rate_schedule(
        recipe.schedule, peak, steps=config.steps, warmup_fraction=config.warmup_fraction
    )
    with _blaming_settings(config):
        return _assemble(
            config,
            recipe.make(schedule, **settings),
            hyperparameters={**recipe.defaults, **settings},
            peak=peak,
            schedule=schedule,
            eval_params=recipe.eval_params,
        )


def _assemble(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    *,
    hyperparameters: Mapping[str, Any] = types.MappingProxyType({}),
    peak: float | None = None,
    schedule: optax.Schedule | None = None,
    eval_params: Callable[[Any, Any], Any] | None = None,
) -> Program:
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    tx = optax.chain(clip, optimizer)
    graphdef, params = _abstract_model(model.PRESETS[config.preset])
    program = Program(
        settings=_compiled_in(config),
        hyperparameters=hyperparameters,
        peak=peak,
        schedule=schedule,
        graphdef=graphdef,
        tx=tx,
        eval_params=eval_params or (lambda opt_state, params: params),
        abstract_state=TrainState(params, jax.eval_shape(tx.init, params)),
        abstract_tokens=jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.int32),
    )
    _ = program._traced_step  # so that a hyperparameter only the update looks at is refused here
    return program


def _abstract_model(config: model.ModelConfig) -> tuple[Any, Any]:
    """The graph definition, and the shapes of the parameters, without making any."""
    module = nnx.eval_shape(lambda: model.Transformer(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def _compiled_in(config: TrainConfig) -> dict[str, Any]:
    return {name: v for name, v in config.identity().items() if name not in _NOT_COMPILED_IN}


@contextlib.contextmanager
def _blaming_settings(config: TrainConfig) -> Iterator[None]:
    """Turns the optimizer's complaints about what the user has set into the user's message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not config.set:  # then it is a bug of ours, and the traceback is wanted
            raise
        given = ", ".join(config.set)
        raise UserError(f"{config.optimizer} does not take --set {given}: {error}") from error
