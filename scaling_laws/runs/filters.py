"""``keep="N > 1e7 and optimizer == 'adamw'"``: an expression over columns, and nothing else."""

import ast
import functools
import operator
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Keep = str | Callable[[Mapping[str, np.ndarray]], Any] | None

_COMPARISONS: Mapping[type, Callable[[Any, Any], Any]] = types.MappingProxyType(
    {
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Lt: operator.lt,
        ast.LtE: operator.le,
        ast.Gt: operator.gt,
        ast.GtE: operator.ge,
        ast.In: lambda x, items: np.isin(x, items),
        ast.NotIn: lambda x, items: ~np.isin(x, items),
    }
)
_ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = types.MappingProxyType(
    {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.Pow: operator.pow,
    }
)


def mask_of(keep: str | Callable[..., Any], columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which rows ``keep`` keeps.

    Args:
      keep: comparisons of columns, numbers and texts, joined by ``and``, ``or`` and ``not``, with
        arithmetic and ``in [...]``; or a function of the columns.
      columns: float64 or object ``[rows]``.

    Returns:
      bool ``[rows]``. A comparison with a missing number is false, but for ``!=`` and ``not in``.

    Raises:
      TypeError, ValueError: if ``keep`` is neither, names a column that is not there, or its value
        is no truth value for each row.
    """
    rows = len(next(iter(columns.values())))
    if callable(keep):
        mask = np.asarray(keep(columns))
    elif isinstance(keep, str):
        try:
            tree = ast.parse(keep.strip(), mode="eval")
        except SyntaxError as error:
            raise ValueError(f"keep must be an expression, got {keep!r}: {error.msg}") from None
        try:
            with np.errstate(all="ignore"):
                mask = np.asarray(_evaluate(tree.body, columns))
        except _Unknown as problem:
            raise ValueError(f"keep {problem}, in {keep!r}") from None
        except TypeError as error:
            raise ValueError(f"keep compares what cannot be compared, {keep!r}: {error}") from None
    else:
        raise TypeError(f"keep must be text, a function or None, got {type(keep).__name__}")
    if mask.dtype != bool or mask.shape not in ((), (rows,)):
        raise ValueError(
            f"keep must give one truth value for each of {rows} rows, got {mask.dtype} of shape "
            f"{mask.shape}"
        )
    return np.broadcast_to(mask, (rows,))


class _Unknown(Exception):
    """Something that such an expression cannot have."""


def _evaluate(node: ast.expr, columns: Mapping[str, np.ndarray]) -> Any:
    value = functools.partial(_evaluate, columns=columns)
    if isinstance(node, ast.Name):
        if node.id not in columns:
            raise _Unknown(f"names {node.id!r}, which is not one of {', '.join(columns)}")
        return columns[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | str):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [value(item) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return np.logical_not(value(node.operand))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        return _ARITHMETIC[type(node.op)](value(node.left), value(node.right))
    if isinstance(node, ast.BoolOp):
        both = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
        return functools.reduce(both, map(value, node.values))
    if isinstance(node, ast.Compare) and all(type(op) in _COMPARISONS for op in node.ops):
        terms = [value(item) for item in (node.left, *node.comparators)]
        pairs = zip(node.ops, terms[:-1], terms[1:], strict=True)
        return functools.reduce(
            np.logical_and, [_COMPARISONS[type(op)](a, b) for op, a, b in pairs]
        )
    raise _Unknown(f"cannot have {ast.unparse(node)!r}")
