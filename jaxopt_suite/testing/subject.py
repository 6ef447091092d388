"""The transformation under examination, with what several points need computed once."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import optax

from jaxopt_suite.testing import arguments
from jaxopt_suite.testing.cases import Case

STEPS = 3


class Crashed(Exception):
    """The transformation does not trace on a tree: one point reports it, others pass over it."""


@dataclasses.dataclass(frozen=True)
class Abstract:
    """Shapes and dtypes of two steps: first updates, and states before, between and after."""

    updates1: Any
    state0: Any
    state1: Any
    state2: Any


class Subject:
    """A factory of transformations and the values every point shares.

    Attributes:
      make_tx: the factory as the user gave it.
      signature: its signature.
      rate_name: name of the learning-rate argument, ``None`` for a raw rule.
      learning_rate: the value given to it.
      extra_args: keyword arguments for every ``update``.
      rtol: tolerance of float32 comparisons, relative to a leaf's largest magnitude.
      static_args: what ``optax.inject_hyperparams`` must leave alone.
    """

    def __init__(
        self,
        make_tx: Callable[..., optax.GradientTransformation],
        *,
        learning_rate: float,
        static_args: Iterable[str],
        bad_arguments: Iterable[Mapping[str, Any]],
        extra_args: Mapping[str, Any],
        rtol: float,
    ) -> None:
        self.make_tx = make_tx
        self.signature = arguments.signature_of(make_tx)
        self.rate_name = arguments.learning_rate_name(self.signature)
        self.learning_rate = learning_rate
        self.bad_arguments = tuple(bad_arguments)
        self.extra_args = dict(extra_args)
        self.rtol = rtol
        own = {p.name for p in self.signature.parameters.values() if arguments.is_static(p)}
        self.static_args = (own | set(static_args)) - {self.rate_name}
        self._abstract: dict[str, Abstract] = {}
        self._trajectories: dict[str, list[tuple[Any, Any]]] = {}

    def make(self, **overrides: Any) -> optax.GradientTransformation:
        """A new transformation: the learning rate as given, other arguments at their defaults."""
        return self.make_tx(**self.keywords(**overrides))

    def keywords(self, **overrides: Any) -> dict[str, Any]:
        """The arguments that ``make`` passes."""
        rate = {} if self.rate_name is None else {self.rate_name: self.learning_rate}
        return rate | overrides

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """One transformation that all points share."""
        return self.make()

    def compile(self, tx: optax.GradientTransformation) -> Callable[..., tuple[Any, Any]]:
        """``tx.update`` compiled, with the extra arguments filled in."""
        return jax.jit(functools.partial(self.update, tx))

    def update(
        self, tx: optax.GradientTransformation, grads: Any, state: Any, params: Any
    ) -> tuple[Any, Any]:
        """``tx.update`` with the extra arguments filled in."""
        return tx.update(grads, state, params, **self.extra_args)

    @functools.cached_property
    def step(self) -> Callable[..., tuple[Any, Any]]:
        """The shared transformation's update, compiled; one compilation per tree of parameters."""
        return self.compile(self.tx)

    def run(self, case: Case, grads: Iterable[Any]) -> list[tuple[Any, Any]]:
        """Compiled steps from ``init``: the updates and the state after each gradient."""
        return follow(self.tx, self.step, case.params(), grads)

    def trajectory(self, case: Case) -> list[tuple[Any, Any]]:
        """``STEPS`` compiled steps on the case's own gradients, remembered."""
        key = repr(case.like)
        if key not in self._trajectories:
            grads = [case.grads(i) for i in range(STEPS)]
            self._trajectories[key] = self.run(case, grads)
        return self._trajectories[key]

    def trace(self, case: Case) -> Abstract:
        """Two steps in shapes and dtypes only: traced, not compiled; remembered."""
        key = repr(case.like)
        if key not in self._abstract:
            step = functools.partial(jax.eval_shape, functools.partial(self.update, self.tx))
            state0 = jax.eval_shape(self.tx.init, case.like)
            updates1, state1 = step(case.like, state0, case.like)
            _, state2 = step(case.like, state1, case.like)
            self._abstract[key] = Abstract(updates1, state0, state1, state2)
        return self._abstract[key]

    def abstract(self, case: Case) -> Abstract:
        """``trace``, for points that have nothing to say where it raises.

        Raises:
          Crashed: if the transformation does not trace on the case.
        """
        try:
            return self.trace(case)
        except Exception as error:
            raise Crashed(f"does not trace on {case.name}: see runs_on_every_tree") from error


def follow(
    tx: optax.GradientTransformation,
    step: Callable[..., tuple[Any, Any]],
    params: Any,
    grads: Iterable[Any],
) -> list[tuple[Any, Any]]:
    """The updates and the state after each gradient, parameters held fixed.

    Args:
      tx: gives the first state.
      step: ``tx.update``, compiled or not.
      params: the parameters at every step.
      grads: one tree per step.
    """
    state, steps = tx.init(params), []
    for g in grads:
        updates, state = step(g, state, params)
        steps.append((updates, state))
    return steps
