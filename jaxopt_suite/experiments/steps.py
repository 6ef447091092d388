"""The compiled functions of training, shared by runs that differ only in seed, data or cadence."""

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_suite.core import tree_bytes
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import assembly, model
from jaxopt_suite.experiments.config import FREE_ON_RESUME, LAYOUT, TrainConfig, parse_settings
from jaxopt_suite.experiments.outer_loop import with_outer_loop
from jaxopt_suite.experiments.schedules import learning_rate_schedule
from jaxopt_suite.optimizers.registry import Recipe, registry
from jaxopt_suite.parallel import wire
from jaxopt_suite.parallel.layout import TrainState
from jaxopt_suite.parallel.meshes import format_mesh
from jaxopt_suite.parallel.metrics import Metrics
from jaxopt_suite.parallel.train_step import TrainStep
from jaxopt_suite.parallel.workers import map_axes

__all__ = ["Metrics", "Program", "TrainState", "build_program", "find_recipe"]

_NOT_COMPILED_IN = frozenset(
    ("seed", "data", "log_every", "eval_every", "eval_batches", *FREE_ON_RESUME)
).difference(LAYOUT)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """One model, one optimizer with all its settings, and their compiled functions.

    Attributes:
      settings: what of the config is compiled in; ``accepts`` compares it.
      hyperparameters: what the optimizer was given besides the learning rate.
      peak: the largest learning rate; None where the optimizer keeps its own.
      schedule: learning rate by number of updates made; None where the optimizer keeps its own.
      sizes: of the model.
      graphdef: the model without its parameters.
      train_step: the step, for one worker's parameters of the shapes ``abstract_params``.
      eval_params: optimizer state and parameters to the point that is evaluated.
      steps_per_round: in which each branch that sends between workers is taken once; None: not
        known.
      abstract_params: shapes and dtypes of the parameters.
      abstract_tokens: int32 [batch_size, seq_len + 1].
    """

    settings: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    peak: float | None
    schedule: optax.Schedule | None
    sizes: model.ModelConfig
    graphdef: Any
    train_step: TrainStep
    eval_params: Callable[[Any, Any], Any]
    steps_per_round: int | None
    abstract_params: Any
    abstract_tokens: jax.ShapeDtypeStruct

    def accepts(self, config: TrainConfig) -> bool:
        """Whether ``config`` differs from its own in seed, data, folder or cadence at most."""
        return self.settings == _compiled_in(config)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state, and on a mesh its shardings."""
        return self.train_step.abstract_state(self.abstract_params)

    @property
    def mesh(self) -> str | None:
        """The mesh it runs on, as ``--mesh`` has it; None: one device."""
        mesh = self.train_step.mesh
        return None if mesh is None else format_mesh(mesh.shape)

    @property
    def n_params(self) -> int:
        """Number of trained parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_params))

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state on all devices, with the memory of ``--compress``."""
        return tree_bytes(self.abstract_state.opt_state)

    @functools.cached_property
    def traffic(self) -> wire.Traffic:
        """Bytes that a device sends in a step, counted in the compiled program."""
        mesh = self.train_step.mesh
        if mesh is None:
            return wire.Traffic(0.0, 0.0)
        found = wire.collectives(self._compiled_step, mesh)
        return wire.traffic(found, steps=self.steps_per_round, axis=assembly.WORKER_AXIS)

    def initial(self, seed: int) -> TrainState:
        """The state before the first step; no device ever holds more of it than its part."""
        return self.train_step.init(lambda: model.build(self.sizes, seed=seed)[1])

    @functools.cached_property
    def _lowered_step(self) -> Any:
        return self.train_step.lower(self.abstract_params, self.abstract_tokens)

    @functools.cached_property
    def _compiled_step(self) -> Any:
        return self._lowered_step.compile()

    @property
    def step(self) -> Callable[[TrainState, np.ndarray], tuple[TrainState, Metrics]]:
        """The compiled step; it consumes the state it is given (its buffers are donated)."""
        compiled, shard = self._compiled_step, self.train_step.shard_batch
        return lambda state, tokens: compiled(state, shard(tokens))

    def agreed(self, state: TrainState) -> Any:
        """The parameters that are evaluated; of workers that differ, what they would agree on."""
        state = map_axes(
            lambda axis, x: x if axis is None else jnp.mean(x, axis=0).astype(x.dtype),
            self.train_step.layout(self.abstract_params).axes,
            state,
        )
        return self.eval_params(state.opt_state[1], state.params)

    def _evaluate(self, state: TrainState, tokens: jax.Array) -> jax.Array:
        layout = self.train_step.layout(self.abstract_params)
        return model.loss_fn(self.graphdef, self.agreed(layout.fetched(state)), tokens)

    @functools.cached_property
    def _loss_of_batch(self) -> Callable[[TrainState, np.ndarray], jax.Array]:
        return jax.jit(self._evaluate)

    def evaluate(self, state: TrainState, batches: list[np.ndarray]) -> float:
        """Mean loss over ``batches``, in nats per byte."""
        shard = self.train_step.shard_batch
        losses = [self._loss_of_batch(state, shard(tokens)) for tokens in batches]
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
    sizes: model.ModelConfig | None = None,
) -> Program:
    """Traces the model and the optimizer of ``config``; compiles nothing yet.

    Args:
      config: what to train; its seed, data, folder and cadence play no part.
      recipe: instead of the registry's entry for ``config.optimizer``.
      tx: instead of a recipe: a finished transformation with a learning rate of its own.
        ``config.optimizer`` is then only a label.
      sizes: of a model that is no preset; ``config.preset`` is then only a label.

    Returns:
      The program.

    Raises:
      UserError: if the preset, the optimizer or a hyperparameter is not a legal one.
      ValueError: if ``tx`` comes with a recipe, a learning rate, settings or an outer loop that it
        would ignore.
    """
    config.validate()
    sizes = sizes or assembly.find_preset(config.preset)
    if tx is not None:
        given = (recipe, config.learning_rate, config.diloco_workers)
        if any(value is not None for value in given) or config.set:
            raise ValueError(
                "tx is complete: give it without recipe, learning_rate, set or diloco_workers"
            )
        return _assemble(config, sizes, tx)
    recipe = with_outer_loop(recipe or find_recipe(config.optimizer), config)
    settings = parse_settings(config.set)
    peak = config.learning_rate or recipe.learning_rate
    schedule = learning_rate_schedule(
        recipe.schedule, peak, steps=config.steps, warmup_fraction=config.warmup_fraction
    )
    layout = assembly.of_layout(recipe, config)
    with _blaming_settings(config):
        return _assemble(
            config,
            sizes,
            recipe.make(schedule, **layout | settings),
            hyperparameters={**recipe.defaults, **settings},
            peak=peak,
            schedule=schedule,
            eval_params=recipe.eval_params,
            communicates=recipe.communicates,
            steps_per_round=recipe.steps_per_round(**recipe.hyperparameters() | settings),
        )


def _assemble(
    config: TrainConfig,
    sizes: model.ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    hyperparameters: Mapping[str, Any] = types.MappingProxyType({}),
    peak: float | None = None,
    schedule: optax.Schedule | None = None,
    eval_params: Callable[[Any, Any], Any] | None = None,
    communicates: bool = False,
    steps_per_round: int | None = None,
) -> Program:
    graphdef, params = assembly.abstract_model(sizes, config)
    program = Program(
        settings=_compiled_in(config),
        hyperparameters=hyperparameters,
        peak=peak,
        schedule=schedule,
        sizes=sizes,
        graphdef=graphdef,
        train_step=assembly.assemble_step(
            config,
            optimizer,
            sizes=sizes,
            graphdef=graphdef,
            mesh=assembly.build_mesh(config),
            clip=config.clip,
            communicates=communicates,
            watched=config.batch_size if config.noise_scale else None,
        ),
        eval_params=eval_params or (lambda opt_state, params: params),
        steps_per_round=steps_per_round,
        abstract_params=params,
        abstract_tokens=jax.ShapeDtypeStruct((config.batch_size, config.seq_len + 1), jnp.int32),
    )
    try:
        program.train_step.check_batch(program.abstract_tokens)
    except ValueError as error:
        raise UserError(f"--batch-size: {error}") from error
    _ = program._lowered_step  # so that a hyperparameter only the update looks at is refused here
    return program


def _compiled_in(config: TrainConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in _NOT_COMPILED_IN}


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
