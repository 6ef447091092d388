"""``--compress`` and ``--feedback``: functions of the library, written as calls of them."""

import ast
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from jaxopt_suite.experiments.config import LayoutConfig, refuse
from jaxopt_suite.optimizers.compression import compressed_mean, compressors, feedback

Factories = Mapping[str, Callable[..., Any]]

COMPRESSORS: Factories = {
    name: getattr(compressors, name) for name in compressors.__all__ if name != "Compressor"
}
FEEDBACKS: Factories = {
    rule.__name__: rule
    for rule in (feedback.none, feedback.ef, feedback.ef21, feedback.econtrol, feedback.momentum)
}


def compressed(config: LayoutConfig, axis_name: str) -> optax.GradientTransformation:
    """The link that ``--compress``, ``--feedback`` and ``--exchange`` describe.

    Args:
      config: ``compress`` is given.
      axis_name: the workers' axis.

    Raises:
      UserError: if one of them is not what it must be.
    """
    compressor = parse_call("compress", config.compress or "", COMPRESSORS)
    rule = None
    if config.feedback is not None:
        rule = parse_call("feedback", config.feedback, FEEDBACKS)
    try:
        return compressed_mean(
            compressor, axis_name=axis_name, feedback=rule, exchange=config.exchange
        )
    except ValueError as error:
        refuse("exchange", config.exchange, f"one that the compressor can do ({error})")


def parse_call(option: str, text: str, factories: Factories) -> Any:
    """What a text such as ``top_k(9, chunk=256)`` makes; nothing else in it is evaluated.

    Args:
      option: that it was given with.
      text: the name of a factory, and in brackets, if it needs any, literals and calls of others.
      factories: by name.

    Raises:
      UserError: naming the option, its value, and what is legal.
    """
    try:
        return _evaluate(ast.parse(text.strip(), mode="eval").body, factories, outermost=True)
    except (SyntaxError, LookupError):
        refuse(option, text, f"a call of one of: {', '.join(map(_usage, factories.values()))}")
    except (TypeError, ValueError) as error:
        refuse(option, text, f"a call with legal arguments ({error})")


def _evaluate(node: ast.expr, factories: Factories, *, outermost: bool = False) -> Any:
    if isinstance(node, ast.Name):
        return factories[node.id]()
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        factory = factories[node.func.id]
        args = [_evaluate(each, factories) for each in node.args]
        named = {str(each.arg): _evaluate(each.value, factories) for each in node.keywords}
        return factory(*args, **named)
    if outermost:
        raise LookupError("not a call")
    return ast.literal_eval(node)


def _usage(factory: Callable[..., Any]) -> str:
    """``top_k(k, fraction, chunk, values)``."""
    return f"{factory.__name__}({', '.join(inspect.signature(factory).parameters)})"
