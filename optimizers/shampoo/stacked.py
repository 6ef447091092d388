"""A rule for stacks of blocks as a rule for trees, on one device or with the rows spread over many.

Left to the partitioner, cutting sharded leaves into blocks gathers them. So on a mesh the rule runs
in a ``shard_map`` over all axes, each device on its own rows, and ``exchange`` is all that crosses.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxopt_suite.optimizers._shards import aligned_specs, free_axes
from jaxopt_suite.optimizers.shampoo import routes
from jaxopt_suite.optimizers.shampoo.blocks import Blocks, Cutting, Stacks, wide
from jaxopt_suite.optimizers.shampoo.exchange import Route

State = TypeVar("State")


class Site(NamedTuple):
    """What a rule may know of the rows that it is given, besides themselves."""

    owners: dict[str, jax.Array]  # int32 [rows]: which leaf each row is of; -1: none
    leaves: int  # how many there are
    devices: int  # among which the rows of every stack are divided; this one has a part
    axes: tuple[str, ...]  # the mesh axes of these devices

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of all devices'."""
        return jax.lax.psum(x, self.axes) if self.axes else x


# (gradients, state, site) -> (directions, new state)
Rule = Callable[[Stacks, State, Site], tuple[Stacks, State]]


def run(
    rule: Rule[State], cutting: Cutting, updates: Any, state: State, param_specs: Any
) -> tuple[Any, State]:
    """One update of a tree.

    Args:
      rule: takes and gives stacks in the dtype of the arithmetic.
      cutting: how trees are cut.
      updates: the gradients.
      state: whose leaves are scalars, the same everywhere, and arrays ``[rows, ...]``.
      param_specs: the layout of the updates on the mesh of the context, or None.

    Returns:
      The directions, in the dtypes of the updates, and the new state.
    """
    with_paths, structure = jax.tree_util.tree_flatten_with_path(updates)
    paths, leaves = [path for path, _ in with_paths], [leaf for _, leaf in with_paths]
    blocks, dtype = cutting.blocks(updates), wide(updates)
    owners = {name: blocks.owners(name) for name in blocks.rows}
    mesh = {} if param_specs is None else free_axes()
    devices = math.prod(mesh.values())
    if devices == 1 or cutting.stack_multiple % devices:
        site = Site({name: jnp.asarray(x) for name, x in owners.items()}, len(leaves), 1, ())
        stacks, state = rule(blocks.stack([x.astype(dtype) for x in leaves]), state, site)
        return structure.unflatten(blocks.unstack(stacks, leaves)), state

    specs = aligned_specs(paths, param_specs)
    route = _route(blocks, specs, cutting.block_size, [x.dtype for x in leaves], mesh)
    leaf_specs = [route.grids[i].spec if i in route.grids else specs[i] for i in range(len(leaves))]
    rows = PartitionSpec(route.axes)
    state_specs = jax.tree.map(lambda x: rows if jnp.ndim(x) else PartitionSpec(), state)

    def on_device(
        leaves: list[jax.Array], state: State, tables: Any, owners: dict[str, jax.Array]
    ) -> tuple[list[jax.Array], State]:
        tables = jax.tree.map(lambda x: x[0], tables)
        site = Site(owners, len(leaves), devices, route.axes)
        gradients = route.to_owners(leaves, tables, dtype)
        directions, state = rule(gradients, state, site)
        return route.to_holders(directions, tables, leaves), state

    on_all = jax.shard_map(
        on_device,
        in_specs=(leaf_specs, state_specs, route.table_specs(), dict.fromkeys(owners, rows)),
        out_specs=(leaf_specs, state_specs),
        axis_names=set(mesh),
    )
    tables = jax.tree.map(jnp.asarray, [lane.tables for lane in route.lanes])
    directions, state = on_all(leaves, state, tables, jax.tree.map(jnp.asarray, owners))
    return structure.unflatten(directions), state


def _route(
    blocks: Blocks,
    specs: list[PartitionSpec],
    block_size: int,
    dtypes: list[Any],
    mesh: dict[str, int],
) -> Route:
    grids = {
        i: routes.make_grid(shape, merged, spec, block_size, mesh)
        for i, (shape, merged, spec) in enumerate(
            zip(blocks.shapes, blocks.merged, specs, strict=True)
        )
        if np.prod(shape) > 0
    }
    return Route(blocks, grids, routes.make_lanes(blocks, grids, dtypes, mesh), tuple(mesh))
