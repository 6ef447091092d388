"""What a factory's signature says: which argument is which, before anything is built."""

import collections.abc
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

_NUMBERS = (float, jax.Array)


def signature_of(make_tx: Callable[..., Any]) -> inspect.Signature:
    """The signature with annotations evaluated where they can be, as written otherwise."""
    try:
        return inspect.signature(make_tx, eval_str=True)
    except NameError:
        return inspect.signature(make_tx)


def learning_rate_name(signature: inspect.Signature) -> str | None:
    """``learning_rate`` if there is one, else the first argument without a default, else none."""
    if "learning_rate" in signature.parameters:
        return "learning_rate"
    for parameter in signature.parameters.values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not variadic:
            return parameter.name
    return None


def _members(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def takes_schedule(parameter: inspect.Parameter) -> bool:
    """Whether the annotation contains ``optax.ScalarOrSchedule`` (or ``optax.Schedule`` itself)."""
    if isinstance(parameter.annotation, str):
        return "Schedule" in parameter.annotation
    return optax.Schedule in _members(parameter.annotation)


def is_static(parameter: inspect.Parameter) -> bool:
    """Whether ``optax.inject_hyperparams`` must leave the argument alone.

    True for an int, str, bool or callable by default or by annotation, never for a schedule.
    """
    default, members = parameter.default, _members(parameter.annotation)
    if takes_schedule(parameter):
        return False
    if default is not parameter.empty and (isinstance(default, int | str) or callable(default)):
        return True
    if any(member in _NUMBERS for member in members):
        return False
    origins = {typing.get_origin(member) for member in members}
    static_origins = {collections.abc.Callable, typing.Literal}
    return bool({int, str, bool}.intersection(m for m in members if isinstance(m, type))) or bool(
        origins & static_origins
    )


def chosen_dtypes(signature: inspect.Signature) -> set[Any]:
    """The dtypes that ``*_dtype`` or ``dtype_*`` arguments ask for."""
    chosen = set()
    for name, parameter in signature.parameters.items():
        given = parameter.default not in (parameter.empty, None)
        if given and (name.endswith("dtype") or name.startswith("dtype")):
            chosen.add(jnp.dtype(parameter.default))
    return chosen
