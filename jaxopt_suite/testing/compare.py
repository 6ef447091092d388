"""Comparisons that say what was expected and what was found."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_suite.testing.cases import describe


class Violation(Exception):
    """A point does not hold: what it expected and what was found."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected = expected
        self.found = found


class NotApplicable(Exception):
    """A point says nothing about this transformation, for the reason in the message."""


def one_line(error: BaseException) -> str:
    """An exception as ``Type: first line``, cut after 200 characters."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def require(holds: bool, expected: str, found: str) -> None:
    """Raises ``Violation`` unless ``holds``."""
    if not holds:
        raise Violation(expected, found)


def paths_and_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Each leaf with its path as text; a lone array has the path ``(the leaf)``."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path) or "(the leaf)", leaf) for path, leaf in pairs]


def is_key(x: Any) -> bool:
    """Whether ``x`` is an array of typed random keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_floating(x: Any) -> bool:
    """Whether ``x`` is an array of real floating-point numbers."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def to_numpy(x: Any) -> np.ndarray:
    """Any leaf as a NumPy array: keys as their data, floating numbers as float64."""
    if is_key(x):
        return np.asarray(jax.random.key_data(x))
    array = np.asarray(x)
    return array.astype(np.float64) if is_floating(array) else array


def require_same_tree(found: Any, expected: Any, what: str) -> None:
    """Raises unless both have one tree structure, containers and ``None`` included."""
    if jax.tree.structure(found) != jax.tree.structure(expected):
        raise Violation(f"{what} of the tree {describe(expected)}", describe(found))


def require_same_shapes(found: Any, expected: Any, what: str) -> None:
    """Raises at the first leaf whose shape differs; the trees are alike."""
    for (path, f), e in zip(paths_and_leaves(found), jax.tree.leaves(expected), strict=True):
        shape, wanted = jnp.shape(f), jnp.shape(e)
        require(shape == wanted, f"{what}{path} of shape {wanted}", str(shape))


def require_same_dtypes(found: Any, expected: Any, what: str) -> None:
    """Raises at the first leaf whose dtype differs; the trees are alike."""
    for (path, f), e in zip(paths_and_leaves(found), jax.tree.leaves(expected), strict=True):
        require(f.dtype == e.dtype, f"{what}{path} of dtype {e.dtype}", str(f.dtype))


def require_equal(found: Any, expected: Any, what: str, *, rtol: float = 0.0) -> None:
    """Raises at the first leaf that differs by more than ``rtol`` times its largest entry.

    Args:
      found: a tree of arrays.
      expected: the tree it should equal.
      what: names the tree in the message.
      rtol: largest difference relative to the leaf's largest magnitude, widened to the precision of
        the tree's coarsest leaf; 0 demands equal bits. Equal NaN and infinities count as equal:
        other points look for them.
    """
    require_same_tree(found, expected, what)
    require_same_shapes(found, expected, what)
    tolerance = max(rtol, _coarsest(expected)) if rtol else 0.0
    for (path, f), e in zip(paths_and_leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = to_numpy(f), to_numpy(e)
        finite = np.abs(b, where=np.isfinite(b), out=np.zeros(b.shape)) if is_floating(b) else b
        atol = tolerance * float(np.max(finite, initial=0.0)) if is_floating(b) else 0.0
        if np.allclose(a, b, rtol=0.0, atol=atol, equal_nan=True):
            continue
        with np.errstate(invalid="ignore"):
            worst = np.unravel_index(np.argmax(np.nan_to_num(np.abs(a - b), nan=np.inf)), a.shape)
        where = f"{what}{path}[{', '.join(map(str, worst))}]"
        raise Violation(f"{where} = {b[worst]:.9g} within {atol:.1e}", f"{a[worst]:.9g}")


def _coarsest(tree: Any) -> float:
    """The largest machine epsilon among the leaves: a bfloat16 moment limits what follows."""
    floating = filter(is_floating, jax.tree.leaves(tree))
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in floating), default=0.0)


def differs(found: Any, expected: Any) -> bool:
    """Whether any bit of any leaf differs."""
    try:
        require_equal(found, expected, "")
    except Violation:
        return True
    return False


def require_finite(tree: Any, what: str) -> None:
    """Raises at the first floating leaf that holds a NaN or an infinity."""
    for path, leaf in paths_and_leaves(tree):
        if is_floating(leaf) and not np.isfinite(to_numpy(leaf)).all():
            bad = to_numpy(leaf)[~np.isfinite(to_numpy(leaf))][0]
            raise Violation(f"{what}{path} finite", str(bad))


def require_no_nan(tree: Any, what: str) -> None:
    """Raises at the first floating leaf that holds a NaN."""
    for path, leaf in paths_and_leaves(tree):
        if is_floating(leaf) and np.isnan(to_numpy(leaf)).any():
            raise Violation(f"{what}{path} without NaN", "NaN")
