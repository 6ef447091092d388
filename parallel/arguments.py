"""What ``make_train_step`` is given, checked against the mesh and completed."""

from collections.abc import Iterable
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from jaxopt_suite.core.checks import check_int
from jaxopt_suite.parallel.meshes import BATCH_AXES
from jaxopt_suite.parallel.specs import entries_of, parts


def check_meshless(worker_axis: str | None, workers: int | None, **of_a_mesh: Any) -> None:
    """Raises if something only makes sense with a mesh, or workers are named but not counted.

    Args:
      worker_axis: the axis of a simulated fleet, or None.
      workers: its size, or None.
      **of_a_mesh: the arguments that need a mesh.

    Raises:
      ValueError: naming the argument.
    """
    for name, value in of_a_mesh.items():
        if value:
            raise ValueError(f"{name}={value!r} needs a mesh (one device makes one, too)")
    if (worker_axis is None) != (workers is None):
        raise ValueError(
            "without a mesh, worker_axis and workers come together, "
            f"got {worker_axis=} and {workers=}"
        )
    if workers is not None:
        check_int("workers", workers)


def check_axes(
    mesh: Mesh, worker_axis: str | None, workers: int | None, over: tuple[str, ...]
) -> None:
    """Raises ``ValueError`` unless the mesh has the axes, and each has one purpose."""
    if worker_axis is not None:
        check_names("worker_axis", (worker_axis,), mesh)
    check_names("shard_state_over", over, mesh)
    if worker_axis in over:
        raise ValueError(
            f"shard_state_over={over} holds the worker axis {worker_axis!r}, whose workers keep "
            "state of their own"
        )
    rest = [n for n in mesh.axis_names if n not in (worker_axis, *over) and mesh.shape[n] > 1]
    if worker_axis is not None and over and rest:
        # XLA's partitioner (JAX 0.10.2) ends the process on such programs.
        raise ValueError(
            f"shard_state_over={over} beside {worker_axis=} takes a mesh of no other axes, and "
            f"this one has {', '.join(map(repr, rest))}: leave one of the three out"
        )
    size = None if worker_axis is None else mesh.shape[worker_axis]
    if workers not in (None, size):
        raise ValueError(f"{workers=}, but the mesh has {size} for {worker_axis=}")


def check_names(argument: str, names: Iterable[str], mesh: Mesh) -> None:
    """Raises ``ValueError`` for the first of ``names`` that is no axis of the mesh."""
    for name in names:
        if name not in mesh.axis_names:
            legal = ", ".join(map(repr, mesh.axis_names))
            raise ValueError(f"{argument} must be of the mesh's axes {legal}, got {name!r}")


def full_batch_spec(
    mesh: Mesh, batch_spec: PartitionSpec | None, worker_axis: str | None
) -> PartitionSpec:
    """The spec of a batch, completed.

    Args:
      mesh: where to.
      batch_spec: as given; None: the first axis over ``BATCH_AXES``.
      worker_axis: comes first, so that a worker's rows are consecutive whatever splits them again.

    Raises:
      ValueError: if it names an axis that the mesh does not have.
    """
    if batch_spec is None:
        batch_spec = PartitionSpec(tuple(name for name in mesh.axis_names if name in BATCH_AXES))
    entries = entries_of(batch_spec, 1)
    check_names("batch_spec", (name for entry in entries for name in entry), mesh)
    if worker_axis is not None:
        entries[0] = (worker_axis, *(name for name in entries[0] if name != worker_axis))
    return PartitionSpec(*(entry or None for entry in entries))


def batch_shards(mesh: Mesh, batch_spec: PartitionSpec) -> int:
    """Number of parts that the first axis of a batch is split into."""
    return parts(mesh, entries_of(batch_spec, 1)[0])
