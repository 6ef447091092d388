"""How often a loop of an optimised program turns, read from its text.

Worked out from what ``lax.scan`` and ``lax.fori_loop`` compile to: an integer in the carry that
begins at a constant, moves by a constant, and is compared with a constant or with another,
unchanging part of the carry. Each of these may hide behind copies, conversions, fusions, calls, and
the unchanging carry of an outer loop. Some backends also print the number (``known_trip_count``);
TPUs do not, and CPUs have been seen to print a wrong one for an unsigned counter that goes down, so
it only counts where nothing could be worked out.
"""

import dataclasses
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxopt_suite.parallel.hlo import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INTEGER = re.compile(r"\{?\s*(-?\d+)\s*\}?")
_SAME_VALUE = ("copy", "bitcast", "convert", "reshape", "opt-barrier")
_CALLS = ("fusion", "call")
_FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE"}


@dataclasses.dataclass(frozen=True)
class _Value:
    """``carry[index] + offset``, or the constant ``offset`` where there is no index."""

    index: int | None
    offset: int


class _Scope(NamedTuple):
    """A computation, and what its parameters are."""

    module: "Module"
    computation: "Computation"
    is_carry: bool = False  # the parameter is the carry of the loop in question
    caller: "_Scope | None" = None
    operands: tuple[str, ...] = ()  # the caller's: for each parameter, or where a loop begins
    is_turn: bool = False  # a turn of an outer loop, whose carry may have changed since it began

    def inside(self, call: "Instruction") -> "_Scope":
        """The scope of the computation that an instruction of this one calls."""
        callee = self.module.computations[call.called[0]]
        return _Scope(self.module, callee, caller=self, operands=call.operands)


def trip_count(module: "Module", home: str, loop: "Instruction") -> int | None:
    """How often the body runs each time the loop is reached.

    Args:
      module: the program.
      home: the computation that ``loop`` is in.
      loop: an instruction with the opcode ``while``.

    Returns:
      None if the text does not tell.
    """
    trips = _worked_out(module, home, loop)
    known = _KNOWN.search(loop.attributes)
    return int(known[1]) if trips is None and known else trips


def _worked_out(module: "Module", home: str, loop: "Instruction") -> int | None:
    condition, body = (
        _Scope(module, module.computations[loop.computation(role) or ""], is_carry=True)
        for role in ("condition", "body")
    )
    test = _comparison(condition, condition.computation.root)
    if test is None:
        return None
    counter, bound, direction = test
    if counter.index is None:
        counter, bound, direction = bound, counter, _FLIPPED[direction]
    outside = _outside(module, home)
    begin = _element(outside, loop.operands[0], counter.index)
    end = _bound(bound, outside, body, loop.operands[0])
    after = _element(body, body.computation.root.name, counter.index)
    if begin is None or begin.index is not None or end is None:
        return None
    if after is None or after.index != counter.index:
        return None
    dtype = loop.shapes[counter.index].dtype if counter.index is not None else ""
    if not re.fullmatch(r"[su]\d+", dtype):
        return None
    bits = int(dtype[1:])
    lowest = 0 if dtype.startswith("u") else -(2 ** (bits - 1))
    start = begin.offset + counter.offset
    # Unsigned steps down are printed as additions of nearly 2^bits.
    step = (after.offset + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
    trips = _turns(start, step, end, direction)
    wraps = trips is not None and not 0 <= start + trips * step - lowest < 2**bits
    return None if wraps else trips


def _outside(module: "Module", home: str) -> _Scope:
    """The scope around a loop: its computation, that one's only caller, and so on."""
    computation, callers = module.computations[home], module.callers[home]
    if len(callers) != 1 or callers[0][1].opcode not in (*_CALLS, "while"):
        return _Scope(module, computation)
    name, call = callers[0]
    is_turn = call.opcode == "while"
    return _Scope(
        module,
        computation,
        caller=_outside(module, name),
        operands=call.operands,
        is_turn=is_turn,
    )


def _bound(bound: _Value, outside: _Scope, body: _Scope, carry: str) -> int | None:
    """The constant that the counter is compared with, if it is one throughout the loop."""
    if bound.index is None:
        return bound.offset
    begin = _element(outside, carry, bound.index)
    if begin is None or begin.index is not None or not _unchanged(body, bound.index):
        return None
    return begin.offset + bound.offset


def _unchanged(body: _Scope, index: int) -> bool:
    """Whether a turn of a loop leaves one element of its carry as it was."""
    return _element(body, body.computation.root.name, index) == _Value(index, 0)


def _turns(begin: int, step: int, end: int, direction: str) -> int | None:
    """The smallest t >= 0 at which ``begin + t * step`` no longer compares so with ``end``."""
    if direction in ("GT", "GE"):
        mirrored = {"GT": "LT", "GE": "LE"}[direction]
        return _turns(-begin, -step, -end, mirrored)
    if direction == "NE":
        trips, rest = divmod(end - begin, step) if step else (-1, 0)
        return trips if trips >= 0 and rest == 0 else None
    end += direction == "LE"
    if begin >= end:
        return 0
    return -(-(end - begin) // step) if step > 0 else None


def _comparison(scope: _Scope, at: "Instruction") -> tuple[_Value, _Value, str] | None:
    """Both sides and direction of an integer comparison, looked for through copies and fusions."""
    by_name = scope.computation.by_name
    if at.opcode in _CALLS:
        inner = scope.inside(at)
        return _comparison(inner, inner.computation.root)
    if at.opcode in _SAME_VALUE:
        return _comparison(scope, by_name[at.operands[0]])
    direction = at.attribute("direction")
    if at.opcode != "compare" or direction not in _FLIPPED:
        return None
    left, right = (_value(scope, operand) for operand in at.operands)
    return None if left is None or right is None else (left, right, direction)


def _value(scope: _Scope, name: str) -> _Value | None:
    """An integer instruction as a linear function of the carry; None if it is nothing so plain."""
    at = scope.computation.by_name[name]
    if at.opcode == "constant":
        literal = _INTEGER.fullmatch(at.arguments)
        return _Value(None, int(literal[1])) if literal else None
    if at.opcode == "parameter" and scope.caller is not None and not scope.is_turn:
        return _value(scope.caller, scope.operands[int(at.arguments)])
    if at.opcode == "get-tuple-element":
        return _element(scope, at.operands[0], int(at.attribute("index") or 0))
    if at.opcode in _SAME_VALUE:
        return _value(scope, at.operands[0])
    if at.opcode in _CALLS:
        inner = scope.inside(at)
        return _value(inner, inner.computation.root.name)
    if at.opcode in ("add", "subtract"):
        left, right = (_value(scope, operand) for operand in at.operands)
        return _sum(left, right, -1 if at.opcode == "subtract" else 1)
    return None


def _sum(left: _Value | None, right: _Value | None, sign: int) -> _Value | None:
    if left is None or right is None:
        return None
    if right.index is None:
        return _Value(left.index, left.offset + sign * right.offset)
    if left.index is None and sign == 1:
        return _Value(right.index, left.offset + right.offset)
    return None


def _element(scope: _Scope, name: str, index: int | None) -> _Value | None:
    """One element of an instruction whose value is a tuple."""
    at = scope.computation.by_name[name]
    if index is None:
        return None
    if at.opcode == "tuple":
        return _value(scope, at.operands[index])
    if at.opcode == "parameter" and scope.is_carry:
        return _Value(index, 0)
    if at.opcode == "parameter" and scope.caller is not None:
        if scope.is_turn and not _unchanged(scope._replace(is_carry=True), index):
            return None
        return _element(scope.caller, scope.operands[int(at.arguments)], index)
    if at.opcode in _SAME_VALUE:
        return _element(scope, at.operands[0], index)
    if at.opcode in _CALLS:
        inner = scope.inside(at)
        return _element(inner, inner.computation.root.name, index)
    return None
