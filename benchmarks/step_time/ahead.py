"""The update compiled for a TPU that is not here: what the compiler counts, against adamw's."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from benchmarks.step_time import programs
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.optimizers import Recipe


def measure(
    recipes: Sequence[Recipe], baseline: Recipe, params: Any, *, topology: str
) -> list[dict[str, Any]]:
    """Memory traffic of each recipe's update on one chip, and its ratio to the baseline's.

    Nothing is run, so the figures are exact and no time stands beside them.

    Args:
      recipes: what to compile; one that refreshes is compiled without its refreshes.
      baseline: what to compare with.
      params: shapes and dtypes of the parameters.
      topology: as ``jax.experimental.topologies`` names it, such as ``"v5e:2x2"``.

    Raises:
      UserError: if there is no TPU compiler here or it does not know the topology.
    """
    sharding = _one_chip(topology)
    compile_ = lambda tx: programs.compile_update(tx, params, sharding=sharding)
    theirs = compile_(baseline.make(baseline.learning_rate)).bytes_accessed
    rows = []
    for recipe in recipes:
        subject = programs.subjects(recipe)[0]
        program = compile_(subject.tx)
        rows.append(
            {
                "optimizer": subject.name,
                "kind": subject.kind,
                "bytes_accessed": program.bytes_accessed,
                "ratio": program.bytes_accessed / theirs,
                "temporary_bytes": program.temporary_bytes,
                "state_bytes": program.state_bytes,
            }
        )
        print(
            f"{subject.name:14s} {subject.kind:13s} {program.bytes_accessed / 1e6:9.1f} MB moved "
            f"{rows[-1]['ratio']:7.4f} times {baseline.name}",
            flush=True,
        )
    return rows


def _one_chip(topology: str) -> jax.sharding.Sharding:
    """Everything on the first chip of a topology."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu looks for a cloud's metadata
    try:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the compiler's own types differ between versions
        raise UserError(
            f"--topology {topology}: cannot compile for it ({error}); it needs the package libtpu "
            "(pip install 'jaxopt-suite[tpu-aot]') and a name such as v5e:2x2"
        ) from error
    mesh = jax.sharding.Mesh(
        np.array(chips[:1]), ("chip",), axis_types=(jax.sharding.AxisType.Auto,)
    )
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
