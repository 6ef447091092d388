"""The parameter trees a transformation is tried on, from the smallest to the largest.

Nothing here holds an array: a case is a tree of ``jax.ShapeDtypeStruct`` and draws its values when
asked, so that importing this module starts no backend.
"""

import dataclasses
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

DTYPES = ("float32", "bfloat16", "float16")


class Layer(NamedTuple):
    """A container of parameters that is neither a dict nor a tuple."""

    kernel: Any
    bias: Any


@dataclasses.dataclass(frozen=True)
class Case:
    """A named tree of parameters, known by its shapes and dtypes.

    Attributes:
      name: what a report calls it.
      like: a pytree of ``jax.ShapeDtypeStruct``; ``None`` and ``optax.MaskedNode`` stay.
    """

    name: str
    like: Any

    def params(self, seed: int = 0) -> Any:
        """Parameters of magnitude 0.5 to 1.5 and random sign: no rule meets a zero by accident."""
        return self._draw(f"params {seed}")

    def grads(self, step: int, *, scale: float = 1.0) -> Any:
        """The gradient of step ``step``: magnitudes 0.5 to 1.5 times ``scale``, signs random."""
        return self._draw(f"grads {step}", scale)

    def leaves_alone(self) -> list["Case"]:
        """One case for each leaf, smallest leaf first: what a failure is shrunk to."""
        paths = jax.tree_util.tree_leaves_with_path(self.like)
        if len(paths) <= 1:
            return []
        paths.sort(key=lambda item: (item[1].size, item[1].ndim))
        return [
            Case(f"{self.name}, only {jax.tree_util.keystr(path)}", {"leaf": leaf})
            for path, leaf in paths
        ]

    def __str__(self) -> str:
        return describe(self.like)

    def _draw(self, label: str, scale: float = 1.0) -> Any:
        rng = np.random.default_rng(zlib.crc32(label.encode()))

        def one(leaf: Any) -> jax.Array:
            size = rng.uniform(0.5, 1.5, leaf.shape) * rng.choice([-1.0, 1.0], leaf.shape)
            return jnp.asarray(np.asarray(size * scale, leaf.dtype))

        return jax.tree.map(one, self.like)


class _Text(str):
    """A string whose repr has no quotes, to print shapes inside containers."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def describe(tree: Any, *, limit: int = 160) -> str:
    """A tree on one line with each array as ``dtype[shape]``, cut after ``limit`` characters."""

    def leaf_text(leaf: Any) -> _Text:
        if not hasattr(leaf, "shape"):
            return _Text(f"{type(leaf).__name__} {leaf!r}")
        return _Text(f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]")

    text = repr(jax.tree.map(leaf_text, tree))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def of_dtype(case: Case, dtype: str) -> Case:
    """The same tree with every leaf of another dtype."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), case.like)
    return Case(f"{case.name}, {dtype}", like)


def tree_cases() -> tuple[Case, ...]:
    """Every kind of tree the contract names, float32, smallest first."""
    w, b = _f32(3, 4), _f32(4)
    return (
        Case("no leaves", {}),
        Case("scalar", _f32()),
        Case("vector", b),
        Case("square matrix", _f32(3, 3)),
        Case("tall matrix", _f32(6, 2)),
        Case("wide matrix", _f32(2, 6)),
        Case("one-column matrix", _f32(3, 1)),
        Case("empty vector", {"w": b, "empty": _f32(0)}),
        Case("empty matrix", {"w": w, "empty": _f32(0, 3)}),
        Case("order-3 tensor", _f32(2, 3, 4)),
        Case("order-4 tensor", _f32(2, 2, 3, 2)),
        Case("None leaf", {"w": w, "none": None}),
        Case("MaskedNode leaf", {"w": w, "masked": optax.MaskedNode()}),
        Case("nested containers", {"block": (Layer(w, b), [_f32()]), "head": {"w": w}}),
        Case("many leaves", {f"w{i}": w if i % 2 else b for i in range(40)}),
    )


def plain_case() -> Case:
    """One matrix and one vector: what numerical points and wrappers are tried on."""
    return Case("a matrix and a vector", {"b": _f32(4), "w": _f32(3, 4)})


def integer_case() -> Case:
    """A tree with an integer leaf, which no optimizer can move."""
    integer = jax.ShapeDtypeStruct((3,), jnp.int32)
    return Case("an integer leaf", {"tokens_seen": integer, "w": _f32(3, 4)})


def in_every_dtype(*cases: Case) -> tuple[Case, ...]:
    """The cases in each of ``DTYPES``; float32 first, then in the order given."""
    return tuple(of_dtype(case, dtype) for dtype in DTYPES for case in cases)


def every_shape() -> Case:
    """The trees that differ in shape as one tree: one compilation instead of many."""
    containers = {"no leaves", "None leaf", "MaskedNode leaf", "nested containers", "many leaves"}
    cases = [case for case in tree_cases() if case.name not in containers]
    return Case("every shape", {case.name: case.like for case in cases})
