"""Parameters in fragments, and the timetable by which these are sent and arrive."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_suite import core

Order = Literal["strided", "sequential"]
ORDERS = ("strided", "sequential")


class Fragments:
    """Which fragment every leaf of the parameters belongs to; no leaf is cut.

    Args:
      params: a tree of arrays, or of their shapes.
      given: how many fragments, or the fragment of every leaf: a tree of ints like ``params``.
      order: how a number of them is cut. ``"sequential"``: each has consecutive leaves;
        ``"strided"``: each leaf in turn goes to the fragment that is smallest so far, which deals
        equal leaves round. In either, they hold about as many elements each.

    Attributes:
      count: how many there are.

    Raises:
      ValueError: if there are more fragments than leaves, or the tree is not like ``params``.
    """

    def __init__(self, params: Any, given: Any, order: str) -> None:
        leaves, self._structure = jax.tree.flatten(params)
        self.count = count_fragments(given)
        if not isinstance(given, int):
            self._of_leaf = _given(given, self._structure)
        elif given > max(len(leaves), 1):
            raise ValueError(
                f"fragments must be at most the number of leaves, {len(leaves)}: no leaf is cut; "
                f"got {given}"
            )
        else:
            cut = _strided if order == "strided" else _sequential
            self._of_leaf = cut([x.size for x in leaves], given)

    @property
    def tree(self) -> Any:
        """The fragment of every leaf, from 0."""
        return self._structure.unflatten(self._of_leaf)

    def pick(self, tree: Any, fragment: int) -> Any:
        """The leaves of one fragment, with ``optax.MaskedNode`` in the places of the others."""
        leaves = self._structure.flatten_up_to(tree)
        chosen = [
            x if i == fragment else optax.MaskedNode()
            for x, i in zip(leaves, self._of_leaf, strict=True)
        ]
        return self._structure.unflatten(chosen)

    def put(self, tree: Any, part: Any, fragment: int) -> Any:
        """``tree`` with the leaves of one fragment from ``part``, as ``pick`` made it."""
        rows = zip(
            self._structure.flatten_up_to(tree),
            self._structure.flatten_up_to(part),
            self._of_leaf,
            strict=True,
        )
        return self._structure.unflatten([new if i == fragment else old for old, new, i in rows])


def count_fragments(given: Any) -> int:
    """How many fragments a number, or a tree of ints, makes.

    Raises:
      ValueError, TypeError: unless it is an int of at least 1, or the ints of the tree are 0 up to
        some number without a gap.
    """
    if isinstance(given, int):
        core.check_int("fragments", given)
        return given
    numbers = jax.tree.leaves(given)
    for number in numbers:
        core.check_int("fragments", number, low=0)
    found = sorted(set(numbers))
    if not found or found != list(range(len(found))):
        raise ValueError(f"fragments must have every number from 0 up, got {found}")
    return len(found)


def _given(tree: Any, structure: Any) -> list[int]:
    found = jax.tree.structure(tree)
    if found != structure:
        raise ValueError(f"fragments must be a tree of ints like params, {structure}, got {found}")
    return jax.tree.leaves(tree)


def _strided(sizes: Sequence[int], count: int) -> list[int]:
    filled, taken, found = np.zeros(count, np.int64), np.zeros(count, np.int64), []
    for size in sizes:
        fragment = int(np.lexsort((taken, filled))[0])  # empty leaves are dealt round, too
        filled[fragment] += size
        taken[fragment] += 1
        found.append(fragment)
    return found


def _sequential(sizes: Sequence[int], count: int) -> list[int]:
    """By the middle of each leaf, among all elements; moved where a fragment would have none."""
    ends = np.cumsum(sizes, dtype=np.float64)
    middles = (ends - np.asarray(sizes) / 2) / max(sum(sizes), 1)
    wanted = np.minimum(np.floor(middles * count), count - 1).astype(int)
    found, last = [], -1
    for i, fragment in enumerate(wanted):
        enough = max(int(fragment), count - (len(sizes) - i))  # as many are left as leaves
        last = min(max(enough, last), last + 1)
        found.append(last)
    return found


class Event(NamedTuple):
    """Something that happens at the end of an inner step."""

    step: int  # from 1
    kind: Literal["send", "apply"]
    fragment: int


@dataclasses.dataclass(frozen=True)
class Timetable:
    """When fragments are sent and applied; every one once in a period.

    With period H and P fragments, fragment p (from 0) is sent at the end of the inner steps t, from
    1, with t = floor((p + 1) H / P) modulo H, and arrives ``delay`` steps later.

    Attributes:
      every: H, at least P.
      fragments: P.
      delay: at least 0 and below H.
    """

    every: int
    fragments: int
    delay: int

    def __post_init__(self) -> None:
        core.check_int("sync_every", self.every)
        if self.fragments > self.every:
            raise ValueError(
                f"fragments must be at most sync_every={self.every}, so that a step sends one, "
                f"got {self.fragments}"
            )
        core.check_int("delay", self.delay, low=0)
        if self.delay >= self.every:
            raise ValueError(
                f"delay must be below sync_every={self.every}, after which a fragment is sent "
                f"again, got {self.delay}"
            )

    def offset(self, fragment: int) -> int:
        """The first inner step after which a fragment is sent."""
        return (fragment + 1) * self.every // self.fragments

    def events(self, steps: int) -> Iterator[Event]:
        """What happens in the first ``steps`` inner steps, in order."""
        by_offset = {self.offset(p) % self.every: p for p in range(self.fragments)}
        for step in range(1, steps + 1):
            sent, arrived = step, step - self.delay
            if sent % self.every in by_offset:
                yield Event(step, "send", by_offset[sent % self.every])
            if arrived > 0 and arrived % self.every in by_offset:
                yield Event(step, "apply", by_offset[arrived % self.every])

    def sent(self, step: jax.Array) -> jax.Array:
        """The fragment sent at the end of an inner step; P if none is."""
        return self._at(step % self.every)

    def applied(self, step: jax.Array) -> jax.Array:
        """The fragment that arrives at the end of an inner step; P if none does."""
        sent = step - self.delay
        return jnp.where(sent > 0, self._at(sent % self.every), self.fragments)

    def _at(self, phase: jax.Array) -> jax.Array:
        table = np.full(self.every, self.fragments, np.int32)
        for p in range(self.fragments):
            table[self.offset(p) % self.every] = p
        return jnp.asarray(table)[phase]
