"""Points about arguments: schedules are followed, bad values and bad trees are refused by name."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_suite.testing import arguments, compare
from jaxopt_suite.testing.cases import Case
from jaxopt_suite.testing.subject import Subject, follow


def follows_schedules(subject: Subject, case: Case) -> None:
    """Every argument annotated optax.ScalarOrSchedule takes a schedule and follows it each step."""
    parameters = subject.signature.parameters.values()
    names = [p.name for p in parameters if arguments.takes_schedule(p)]
    if not names:
        raise compare.NotApplicable("no argument is annotated optax.ScalarOrSchedule")
    for name in names:
        _follows(subject, case, name)


def _follows(subject: Subject, case: Case, name: str) -> None:
    value = subject.learning_rate if name == subject.rate_name else 0.1

    def updates(argument: Any) -> list[Any]:
        tx = subject.make(**{name: argument})
        steps = follow(tx, subject.compile(tx), case.params(), [case.grads(0), case.grads(1)])
        return [u for u, _ in steps]

    scalar = updates(value)
    # A schedule may hand over float32 where the scalar was a Python float.
    tolerance = 10 * subject.rtol
    constant = updates(lambda count: value)
    compare.require_equal(constant, scalar, f"{name}=constant: updates[step]", rtol=tolerance)
    late = updates(lambda count: jnp.where(count < 1, 0.0, value))
    text = f"{name}=schedule, 0 at count 0 and {value:g} after: other updates at step 0 than"
    compare.require(
        compare.differs(late[0], constant[0]), f"{text} {name}={value:g}", "the same updates"
    )
    early = updates(lambda count: jnp.where(count < 1, value, 0.0))
    text = f"{name}=schedule, {value:g} at count 0 and 0 after: other updates at step 1 than"
    compare.require(
        compare.differs(early[1], constant[1]), f"{text} {name}={value:g}", "the same updates"
    )


def weight_decay_is_decoupled(subject: Subject, case: Case) -> None:
    """weight_decay adds -learning_rate * weight_decay * params where mask is true, nothing else."""
    if not {"weight_decay", "mask", subject.rate_name} <= set(subject.signature.parameters):
        raise compare.NotApplicable("no arguments named weight_decay and mask beside a rate")
    decay, params = 0.1, {"in": case.params(), "out": case.params(1)}
    grads = {"in": case.grads(0), "out": case.grads(1)}

    def first_updates(weight_decay: float) -> Any:
        tx = subject.make(weight_decay=weight_decay, mask={"in": True, "out": False})
        return follow(tx, subject.compile(tx), params, [grads])[0][0]

    difference = jax.tree.map(lambda a, b: a - b, first_updates(decay), first_updates(0.0))
    factor = -subject.learning_rate * decay
    expected = jax.tree.map(lambda p: factor * p, params["in"])
    # A difference of two updates ten times as large has one digit less.
    tolerance = 100 * subject.rtol
    compare.require_equal(difference["in"], expected, "decay of params", rtol=tolerance)
    zeros = jax.tree.map(jnp.zeros_like, params["out"])
    compare.require_equal(difference["out"], zeros, "decay of masked-out params")


def refuses_bad_learning_rate(subject: Subject, case: Case) -> None:
    """A negative or NaN learning rate raises at construction, naming argument and value."""
    del case  # nothing is initialised
    if subject.rate_name is None:
        raise compare.NotApplicable("no learning rate")
    for value in (-1.0, math.nan):
        _refuses(subject, {subject.rate_name: value})


def refuses_bad_arguments(subject: Subject, case: Case) -> None:
    """Each of bad_arguments raises at construction, naming argument and value."""
    del case  # nothing is initialised
    if not subject.bad_arguments:
        raise compare.NotApplicable("no bad_arguments were given")
    for bad in subject.bad_arguments:
        _refuses(subject, bad)


def _refuses(subject: Subject, bad: Any) -> None:
    text = ", ".join(f"{name}={value!r}" for name, value in bad.items())
    error = _error(lambda: subject.make(**bad))
    expected = f"ValueError or TypeError for {text}, naming argument and value"
    compare.require(error is not None, expected, "no error at construction")
    assert error is not None
    named = any(k in str(error) and _shows(v, str(error)) for k, v in bad.items())
    right = isinstance(error, ValueError | TypeError) and named
    compare.require(right, expected, compare.one_line(error))


def _shows(value: Any, message: str) -> bool:
    return repr(value) in message or str(value) in message


def _error(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def names_missing_params(subject: Subject, case: Case) -> None:
    """update without params works, or raises a ValueError that asks for params."""
    state = subject.tx.init(case.params())
    update = lambda: subject.tx.update(case.grads(0), state, **subject.extra_args)
    error = _error(update)
    if error is None:
        return
    clear = isinstance(error, ValueError) and "param" in str(error)
    compare.require(clear, "a ValueError that asks for params", compare.one_line(error))


def refuses_integer_leaves(subject: Subject, case: Case) -> None:
    """An integer leaf among the parameters raises a TypeError that names its path."""
    integers = [
        path
        for path, leaf in compare.paths_and_leaves(case.like)
        if jnp.issubdtype(leaf.dtype, jnp.integer)
    ]
    if not integers:
        raise compare.NotApplicable("no integer leaf in this tree")

    def first_use(params: Any) -> Any:
        return subject.update(subject.tx, params, subject.tx.init(params), params)

    error = _error(lambda: jax.eval_shape(first_use, case.like))
    found = "no error" if error is None else compare.one_line(error)
    refused = isinstance(error, TypeError) and integers[0] in str(error)
    compare.require(refused, f"a TypeError that names {integers[0]}", found)
