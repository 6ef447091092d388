"""When the roots of which blocks are taken: all of them every K steps, or a K-th at every step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxopt_suite import core

Schedule = Literal["together", "staggered"]
SCHEDULES = ("together", "staggered")

# (stacks, reads) -> new stacks: dicts of pytrees of arrays [rows, ...], by the names of stacks.
Work = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Refresh:
    """A schedule.

    Attributes:
      schedule: ``"together"`` or ``"staggered"``.
      every: K, steps between two refreshes of a block.
      start: the first step (counted from 1) that uses roots, at least K if staggered.
      multiple: stacks consist of this many equal parts, one a device; a slot takes rows of each.
    """

    schedule: Schedule
    every: int
    start: int
    multiple: int

    def run(
        self, work: Work, stacks: dict[str, Any], reads: dict[str, Any], count: jax.Array
    ) -> dict[str, Any]:
        """``stacks`` with ``work`` done on the blocks whose turn it is.

        Args:
          work: what a refresh does; its result has the shapes and dtypes of the stacks it gets.
          stacks: for each name a pytree of arrays ``[rows, ...]``, which is written over.
          reads: for each name a pytree of other arrays ``[rows, ...]`` that it is made of.
          count: int32 ``[]``, this step's number, from 1.
        """
        if self.schedule == "together":
            due = (count == self.start) | ((count > self.start) & (count % self.every == 0))
            return jax.lax.cond(due, work, lambda same, _: same, stacks, reads)
        return self._one_slot(work, stacks, reads, count)

    def for_part(self, devices: int) -> "Refresh":
        """The same for the rows of one of so many devices."""
        return dataclasses.replace(self, multiple=self.multiple // devices)

    def _one_slot(
        self, work: Work, stacks: dict[str, Any], reads: dict[str, Any], count: jax.Array
    ) -> dict[str, Any]:
        """Step t refreshes slot t mod K of every stack, so that all had their turn by step K.

        A stack of fewer blocks than slots leaves some slots empty; each stack begins where the one
        before it ended, so that the empty slots of all do not fall on one step.
        """
        result, used = dict(stacks), 0
        for name, stack in sorted(stacks.items()):
            rows = len(jax.tree.leaves(stack)[0]) // self.multiple
            width = -(-rows // self.every)
            slots = -(-rows // width)
            slot = (count - used) % self.every
            used += slots
            # The last slot may reach back into the one before it: a slice has one length.
            first = jnp.minimum(slot * width, rows - width)
            of_rows = lambda tree, read, name=name: work({name: tree}, {name: read})[name]
            result[name] = jax.lax.cond(
                slot < slots,
                functools.partial(self._on_rows, of_rows, first, width),
                lambda same, _: same,
                stack,
                reads[name],
            )
        return result

    def _on_rows(
        self, work: Callable[..., Any], first: jax.Array, width: int, stack: Any, reads: Any
    ) -> Any:
        """``work`` on rows ``first`` to ``first + width`` of every device's part of the stack."""

        def parted(x: jax.Array) -> jax.Array:
            return x.reshape(self.multiple, -1, *x.shape[1:])

        def taken(x: jax.Array) -> jax.Array:
            rows = jax.lax.dynamic_slice_in_dim(parted(x), first, width, 1)
            return rows.reshape(-1, *x.shape[1:])

        def put_back(x: jax.Array, new: jax.Array) -> jax.Array:
            new = new.reshape(self.multiple, width, *x.shape[1:])
            return jax.lax.dynamic_update_slice_in_dim(parted(x), new, first, 1).reshape(x.shape)

        return jax.tree.map(put_back, stack, work(*jax.tree.map(taken, (stack, reads))))


def make_refresh(schedule: Schedule, every: int, start: int | None, multiple: int) -> Refresh:
    """A checked schedule; a ``start`` of ``None`` is ``every``."""
    core.check_choice("refresh", schedule, SCHEDULES)
    core.check_int("refresh_every", every)
    if start is not None:
        core.check_int("start_step", start)
        if schedule == "staggered" and start < every:
            raise ValueError(
                f"start_step must be at least refresh_every={every} where refresh='staggered', so "
                f"that every block has a root by then; got {start}"
            )
    return Refresh(schedule, every, every if start is None else start, multiple)
