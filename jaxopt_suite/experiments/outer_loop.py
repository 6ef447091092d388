"""``--diloco-workers``: any recipe as the inner optimizer of an outer loop."""

import dataclasses
import functools
from typing import Any

import optax

from jaxopt_suite.experiments.compress import compressed
from jaxopt_suite.experiments.config import LayoutConfig, refuse
from jaxopt_suite.optimizers.diloco import diloco, mean_over_workers, outer_params
from jaxopt_suite.optimizers.diloco.recipes import outer_sgd
from jaxopt_suite.optimizers.registry import Recipe

SYNC_EVERY = 50
OUTER_LR = 0.7
OUTER_MOMENTUM = 0.9


def with_outer_loop(recipe: Recipe, config: LayoutConfig) -> Recipe:
    """The recipe itself, or with ``--diloco-workers`` that of DiLoCo around it.

    Its name, learning rate, schedule and hyperparameters are those of the inner optimizer.

    Args:
      recipe: of an optimizer that leaves the mean over workers to others.
      config: the options of the outer loop; ``--compress`` is about its mean.

    Raises:
      UserError: if the optimizer cannot be an inner one, or an option is not what it must be.
    """
    if config.diloco_workers is None:
        return recipe
    _check_inner(recipe, config)
    every = config.sync_every or SYNC_EVERY

    @functools.wraps(recipe.factory)  # its signature: the hyperparameters are the inner ones
    def factory(
        learning_rate: optax.ScalarOrSchedule, *, axis_name: str, **hyperparameters: Any
    ) -> optax.GradientTransformation:
        inner = recipe.factory(learning_rate, **hyperparameters)
        outer = _outer(config, axis_name)
        return diloco(inner, outer, sync_every=every, axis_name=axis_name)

    copies = 1 if config.outer_momentum == 0 else 2  # outer parameters, and their momentum
    elements, size = recipe.state_elements, recipe.state_bytes
    formula = f"{recipe.state_formula} + {'2mn' if copies == 2 else 'mn'}"
    if size is not None:
        formula = f"{recipe.state_formula.removesuffix(' bytes')} + {4 * copies}mn bytes"
    return dataclasses.replace(
        recipe,
        factory=factory,
        communicates=True,
        apart=True,
        eval_params=outer_params,
        state_formula=formula,
        state_elements=lambda m, n, **hp: elements(m, n, **hp) + copies * m * n,
        state_bytes=size and (lambda m, n, **hp: size(m, n, **hp) + 4 * copies * m * n),
        wire="8mn (N-1)/N every sync_every steps",
        steps_per_round=lambda **_: every,
    )


def _check_inner(recipe: Recipe, config: LayoutConfig) -> None:
    workers = config.diloco_workers
    if recipe.apart:
        legal = f"given without {recipe.name}, an outer loop itself: --mesh worker={workers}, --set"
        refuse("diloco_workers", workers, legal)
    if recipe.communicates:
        legal = f"given without {recipe.name}, whose workers agree in every step"
        refuse("diloco_workers", workers, legal)
    if recipe.eval_params is not None:
        legal = f"given without {recipe.name}, which is not evaluated at the parameters it trains"
        refuse("diloco_workers", workers, legal)


def _outer(config: LayoutConfig, axis_name: str) -> optax.GradientTransformation:
    """Nesterov's SGD after the mean of outer gradients, which ``--compress`` is about."""
    mean = mean_over_workers(axis_name)
    if config.compress is not None:
        mean = compressed(config, axis_name)
    rate = OUTER_LR if config.outer_lr is None else config.outer_lr
    momentum = OUTER_MOMENTUM if config.outer_momentum is None else config.outer_momentum
    return outer_sgd(mean, rate, momentum or None)
