"""Collectives that run on a mesh and in a simulated fleet, with results typed equal."""

import jax
import jax.numpy as jnp

from jaxopt_suite.core.varying import vary

AxisNames = str | tuple[str, ...]


def bound_axis_size(axis_name: str, who: str) -> int:
    """The number of workers along ``axis_name``.

    Args:
      axis_name: the workers' axis.
      who: the transformation that needs it, for the message.

    Raises:
      ValueError: if no surrounding ``vmap`` or ``shard_map`` has such an axis.
    """
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"{who} communicates over axis_name={axis_name!r}, which is not bound here: run it "
            f"under parallel.run_workers(..., axis_name={axis_name!r}) or "
            f"parallel.make_train_step(..., worker_axis={axis_name!r})"
        ) from None


def gather_equal(x: jax.Array, axis_names: AxisNames, *, tiled: bool = False) -> jax.Array:
    """``jax.lax.all_gather`` along a new first axis, typed as equal on all devices.

    The plain one is typed as varying, so that nothing made from it could leave a ``shard_map`` as
    one value; the other type cannot be asked for under ``vmap``.

    Args:
      x: this worker's array.
      axis_names: the axes to gather over, the first changing slowest.
      tiled: join the arrays along their first axis instead of stacking them along a new one.
    """
    names = (axis_names,) if isinstance(axis_names, str) else axis_names
    if not _on_mesh(names):
        return jax.lax.all_gather(x, axis_names, tiled=tiled)
    return jax.lax.all_gather(vary(x, names), axis_names, tiled=tiled, to="invarying")


def any_worker(flag: jax.Array, axis_names: tuple[str, ...]) -> jax.Array:
    """Whether a boolean scalar is true anywhere along the axes: equal on all devices."""
    return jax.lax.pmax(vary(flag.astype(jnp.int32), axis_names), axis_names).astype(bool)


def _on_mesh(axis_names: tuple[str, ...]) -> bool:
    return set(axis_names) <= set(jax.sharding.get_abstract_mesh().manual_axes)
