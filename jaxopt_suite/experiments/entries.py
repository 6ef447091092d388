"""Who takes part in a comparison, with which settings and around which learning rate."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.assembly import of_layout
from jaxopt_suite.experiments.config import CompareConfig, parse_settings
from jaxopt_suite.experiments.outer_loop import with_outer_loop
from jaxopt_suite.experiments.table import Rate
from jaxopt_suite.optimizers.registry import Recipe, registry


@dataclasses.dataclass(frozen=True)
class Entry:
    """One optimizer of the comparison with what the user said about it.

    Attributes:
      recipe: the registry's entry.
      settings: its hyperparameters as given by the user.
      rate: its learning rate; the middle of the grid in a sweep.
    """

    recipe: Recipe
    settings: Mapping[str, Any]
    rate: Rate

    def settings_as_text(self) -> tuple[str, ...]:
        """The settings as ``NAME=VALUE``."""
        return tuple(f"{name}={value!r}" for name, value in self.settings.items())

    def steps_per_round(self) -> int | None:
        """As of the recipe, with these settings."""
        return self.recipe.steps_per_round(**{**self.recipe.hyperparameters(), **self.settings})


def _check_setting(name: str, recipes: Iterable[Recipe]) -> None:
    """Raises unless one of ``recipes`` has the setting ``name`` (``b2`` or ``adamw.b2``)."""
    owner, dot, own = name.rpartition(".")
    named = {recipe.name: recipe for recipe in recipes}
    if dot and owner not in named:
        raise UserError(
            f"--set {name}: {owner!r} is not one of the optimizers compared: {', '.join(named)}"
        )
    candidates = [named[owner]] if dot else list(named.values())
    if not any(own in _legal(recipe) for recipe in candidates):
        legal = "; ".join(f"{r.name}: {', '.join(sorted(_legal(r)))}" for r in candidates)
        raise UserError(f"--set {name}: no optimizer compared has {own!r}. Legal names: {legal}")


def _legal(recipe: Recipe) -> set[str]:
    return {"learning_rate", *recipe.hyperparameters()}


def _rate(recipe: Recipe, given: Any) -> Rate:
    if given is None:
        return Rate(recipe.learning_rate, "tuned default")
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if not (number and math.isfinite(given) and given > 0):
        raise UserError(f"--set learning_rate must be a positive, finite number, got {given!r}")
    return Rate(float(given), "given")


def _entry(recipe: Recipe, settings: Mapping[str, Any], config: CompareConfig) -> Entry:
    """What concerns ``recipe`` in the settings; one that names it outranks one for all."""
    general = {name: value for name, value in settings.items() if name in _legal(recipe)}
    prefix = f"{recipe.name}."
    own = {n.removeprefix(prefix): v for n, v in settings.items() if n.startswith(prefix)}
    chosen = general | own
    rate = _rate(recipe, chosen.pop("learning_rate", None))
    layout = of_layout(recipe, config)
    try:
        recipe.make(rate.value, **layout | chosen)
    except (TypeError, ValueError) as error:
        raise UserError(f"--set: {recipe.name}: {error}") from error
    return Entry(recipe, chosen, rate)


def entries(config: CompareConfig) -> list[Entry]:
    """The optimizers that ``config`` lists, each with its settings, in the order listed.

    Args:
      config: what to compare.

    Returns:
      One entry for each optimizer.

    Raises:
      UserError: for an optimizer that is unknown or listed twice, an empty list, a setting that no
        listed optimizer has, one that communicates without workers to do so, or one that cannot
        be the inner optimizer of an outer loop that is asked for.
    """
    config.validate()
    recipes = registry()
    for name in config.names():
        if name not in recipes:
            raise UserError(f"--optimizers: {name!r} is not one of {', '.join(recipes)}")
    listed = [with_outer_loop(recipes[name], config) for name in config.names()]
    settings = parse_settings(config.set)
    for name in settings:
        _check_setting(name, listed)
    return [_entry(recipe, settings, config) for recipe in listed]
