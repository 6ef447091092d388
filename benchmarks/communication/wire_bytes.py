"""Bytes of compressed means in programs compiled for TPUs, beside closed forms and all-reduce."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from benchmarks import _results
from jaxopt_suite import parallel
from jaxopt_suite.optimizers.compression import compressed_mean, compressors
from jaxopt_suite.optimizers.compression.compressor import Compressor
from jaxopt_suite.optimizers.compression.exchange import (
    EXCHANGES,
    check_exchange,
    choose,
    sent_bytes,
)
from jaxopt_suite.parallel import topologies, wire

TOLERANCE = 0.02  # of the closed form

# Two matrices of 16.8 million entries, and a vector that is too short to be worth compressing.
WHOLE = {"up": (2048, 8192), "down": (8192, 2048), "scale": (512,)}
SPECS = {"up": P(None, "model"), "down": P("model", None), "scale": P()}

COMPRESSORS: Mapping[str, Compressor] = {
    "identity()": compressors.identity(),
    "top_k(fraction=0.001)": compressors.top_k(fraction=0.001),
    "top_k(4, chunk=4096)": compressors.top_k(4, chunk=4096),
    "random_k(fraction=0.001)": compressors.random_k(fraction=0.001),
    "sign()": compressors.sign(),
    "ternary()": compressors.ternary(),
    "int8()": compressors.int8(),
    "int4()": compressors.int4(),
    "fp8()": compressors.fp8(),
    "low_rank(4)": compressors.low_rank(4),
    "dct_top_k(4)": compressors.dct_top_k(4),
}

_LARGEST_GATHER = 4 * 2**30  # bytes of payloads on one chip: more is no use and does not fit


class Place(NamedTuple):
    """Where to compile for, and which exchanges are of interest there."""

    topology: str
    mesh: str
    exchanges: tuple[str, ...]


PLACES = (
    Place("v5e:4x4", "worker=4,model=4", EXCHANGES),
    Place("v5e:16x16", "worker=64,model=4", EXCHANGES),
    Place("v5e:2x4", "worker=8", ("auto",)),
    Place("v5e:8x8", "worker=64", ("auto",)),
    Place("v5e:16x16", "worker=256", ("auto",)),
)


def measure(names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """A table for every place: what is sent along the workers' axis in one train step.

    Args:
      names: meshes of the places to compile for; none: all.

    Raises:
      UserError: if there is no place with such a mesh.
      ModuleNotFoundError: if the TPU compiler is not installed; the message says how to get it.
    """
    _results.check_names("place with mesh", names, (place.mesh for place in PLACES))
    for place in PLACES:
        if names and place.mesh not in names:
            continue
        devices = topologies.describe(place.topology).devices
        mesh = parallel.make_mesh(parallel.parse_mesh(place.mesh), devices=devices)
        rows = []
        for name, compressor in COMPRESSORS.items():
            for exchange in place.exchanges:
                if _is_possible(compressor, exchange, mesh):
                    rows.append({"compressor": name} | entry(compressor, exchange, mesh))
                    print(place.topology, place.mesh, rows[-1], flush=True)
        yield {"topology": place.topology, "mesh": place.mesh, "entries": rows}


def entry(compressor: Compressor, exchange: str, mesh: Mesh) -> dict[str, Any]:
    """Bytes of one compressor in one exchange, per device and step.

    Returns:
      exchange: the one asked for; ``way``: the one taken for the matrices.
      sent, closed_form: bytes along the workers' axis; their ratio ``off``.
      all_reduce: what the same gradients in float32 send, whole.
      times_fewer: ``all_reduce / sent``.
      largest_float: bytes of the largest collective of floats; ``matrix_bytes``: what a device
        holds of one matrix, in float32.
    """
    workers = mesh.shape["worker"]
    mean = compressed_mean(
        compressor, axis_name="worker", exchange=exchange, dense=lambda path, leaf: leaf.ndim < 2
    )
    found = among_workers(optax.chain(mean, optax.sgd(0.1)), mesh)
    shapes = {name: local_shape(name, mesh) for name in WHOLE}
    way = choose(compressor, shapes["up"], workers, exchange)
    flag = 2 * (mesh.size - 1) / mesh.size * 4
    closed = flag + sum(
        _whole_lines(
            sum(sent_bytes(compressor, shapes[name], workers, each) for name in names),
            workers,
            each,
        )
        for each, names in ((way, ("up", "down")), ("dense", ("scale",)))
    )
    dense = sum(sent_bytes(compressor, shape, workers, "dense") for shape in shapes.values())
    sent = sum(c.total for c in found)
    return {
        "exchange": exchange,
        "way": way,
        "sent": sent,
        "closed_form": closed,
        "off": round(sent / closed - 1, 5),
        "all_reduce": dense,
        "times_fewer": round(dense / sent, 2),
        "largest_float": largest_float(found),
        "matrix_bytes": 4 * math.prod(shapes["up"]),
        "kinds": sorted({f"{c.kind} {c.dtype}" for c in found if c.payload > 4}),
    }


def kept(rows: list[dict[str, Any]]) -> bool:
    """Whether all bytes are as promised, and whole tensors travel only where they are meant to."""
    return all(
        abs(e["off"]) <= TOLERANCE
        and (e["compressor"] == "identity()" or e["largest_float"] < e["matrix_bytes"])
        for row in rows
        for e in row["entries"]
    )


def among_workers(tx: optax.GradientTransformation, mesh: Mesh) -> list[wire.Collective]:
    """What a train step with this optimizer sends along the workers' axis.

    Raises:
      RuntimeError: if it cannot be known how often one of them runs.
    """

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        hidden = jnp.tanh(batch @ params["up"]) @ params["down"]
        return jnp.mean(hidden**2) + jnp.sum(params["scale"] ** 2)

    specs = SPECS if "model" in mesh.axis_names else P()
    step = parallel.make_train_step(loss, tx, mesh, worker_axis="worker", param_specs=specs)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in WHOLE.items()}
    batch = jax.ShapeDtypeStruct((mesh.shape["worker"], WHOLE["up"][0]), jnp.float32)
    found = [
        c
        for c in wire.collectives(step.lower(params, batch).compile(), mesh)
        if c.axes and "worker" in c.axes
    ]
    inexact = [c for c in found if not c.exact]
    if inexact:
        raise RuntimeError(f"collectives that run an unknown number of times: {inexact}")
    return found


def largest_float(found: Sequence[wire.Collective]) -> int:
    """Bytes of the largest collective of floats."""
    return max((c.payload for c in found if c.dtype in ("f32", "bf16", "f16")), default=0)


def _whole_lines(sent: float, workers: int, way: str) -> float:
    """``sent`` bytes with the padding of the one buffer that goes to each of the other workers."""
    copies = {"gather": workers - 1, "two_phase": 2 * (workers - 1)}.get(way)
    return copies * math.ceil(sent / copies / 128) * 128 if copies else sent


def local_shape(name: str, mesh: Mesh) -> tuple[int, ...]:
    """The shape that a device holds of a leaf."""
    split = [mesh.shape.get(axis, 1) if axis else 1 for axis in SPECS[name]]
    split += [1] * (len(WHOLE[name]) - len(split))
    return tuple(size // by for size, by in zip(WHOLE[name], split, strict=True))


def _is_possible(compressor: Compressor, exchange: str, mesh: Mesh) -> bool:
    try:
        check_exchange(compressor, exchange)
    except ValueError:
        return False
    if exchange == "auto" and compressor.name != "low_rank" and "model" in mesh.axis_names:
        return False  # the others are compiled, and it is one of them
    payloads = (
        sum(compressor.nbytes(local_shape(name, mesh)) for name in WHOLE) * mesh.shape["worker"]
    )
    return exchange != "gather" or payloads <= _LARGEST_GATHER
