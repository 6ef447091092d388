"""Compiles small programs and writes their optimised HLO text, for the tests of the readers.

    python tests/parallel/programs/write.py TARGET [CASE ...]

TARGET is ``cpu``; or a TPU topology such as ``v5e:4x4`` or, for two slices, ``v5e:2x2*2`` (needs
``jax[tpu]`` but no TPU; set ``JAX_PLATFORMS=cpu`` and ``TPU_SKIP_MDS_QUERY=1``); or ``h100``, with
the path of a GPU target description in ``GPU_TARGET`` (needs ``jax-cuda12-pjrt`` but no GPU).

The files beside this one were written with JAX 0.10.2 and libtpu 0.0.42. What the readers do not
use is left out: the tables of source locations, and the compiler's own notes on each instruction
where they name no trip count and no matrix product.
"""

import functools
import gzip
import os
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_suite.parallel.meshes import make_mesh

HERE = pathlib.Path(__file__).parent
LAYERS, WIDTH, HIDDEN, BATCH = 4, 128, 256, 64


def _array(mesh, shape, *spec, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def _constrain(mesh, tree, *spec):
    return jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec))), tree
    )


def _mlp(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def _loss(params, x):
    return jnp.mean(_mlp(params, x) ** 2)


def _params(mesh, up=(), down=(), layers=()):
    return {
        "up": _array(mesh, (*layers, WIDTH, HIDDEN), *up),
        "down": _array(mesh, (*layers, HIDDEN, WIDTH), *down),
    }


def _sgd(params, grads):
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def data_parallel(devices):
    """SGD of two matrices; the batch is divided and the parameters are whole everywhere."""
    mesh = make_mesh({"data": len(devices)}, devices=devices)

    def step(params, x):
        loss, grads = jax.value_and_grad(_loss)(params, x)
        return _sgd(params, grads), loss

    return step, (_params(mesh), _array(mesh, (BATCH, WIDTH), "data"))


def zero1(devices):
    """Momentum SGD, the momentum divided over the data axis; new parameters are gathered."""
    mesh = make_mesh({"data": len(devices)}, devices=devices)

    def step(params, momentum, x):
        grads = jax.grad(_loss)(params, x)
        grads = _constrain(mesh, grads, "data")
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        params = _sgd(_constrain(mesh, params, "data"), momentum)
        return _constrain(mesh, params), momentum

    shards = _params(mesh, ("data",), ("data",))
    return step, (_params(mesh), shards, _array(mesh, (BATCH, WIDTH), "data"))


def fsdp(devices):
    """Layers in a scan, each parameter divided over the axis that the batch is divided over."""
    mesh = make_mesh({"fsdp": len(devices)}, devices=devices)

    @jax.checkpoint  # otherwise the gathered parameters are kept for the backward pass
    def layer(x, params):
        whole = _constrain(mesh, params)  # gathers, and reduce-scatters the gradient
        x = _constrain(mesh, x, "fsdp")
        hidden = _constrain(mesh, jnp.tanh(x @ whole["up"]), "fsdp")
        return hidden @ whole["down"], None

    def step(params, x):
        loss = lambda params: jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2)
        loss, grads = jax.value_and_grad(loss)(params)
        return _sgd(params, grads), loss

    params = _params(mesh, (None, "fsdp"), (None, "fsdp"), layers=(LAYERS,))
    return step, (params, _array(mesh, (BATCH, WIDTH), "fsdp"))


def tensor_parallel(devices):
    """The hidden dimension of each layer divided over ``model``, the batch over ``data``."""
    mesh = make_mesh({"data": len(devices) // 2, "model": 2}, devices=devices)

    def loss_fn(params, x):
        def layer(x, params):
            return x + _mlp(params, x), None

        return jnp.mean(jax.lax.scan(layer, x, params)[0] ** 2)

    def step(params, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        return _sgd(params, grads), loss

    params = _params(mesh, (None, None, "model"), (None, "model"), layers=(LAYERS,))
    return step, (params, _array(mesh, (BATCH, WIDTH), "data"))


def _shift(x, axis, size):
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])


def explicit(devices):
    """One collective of each kind, each of its own size, over one of two axes or over both."""
    data = len(devices) // 2
    mesh = make_mesh({"data": data, "model": 2}, devices=devices)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P(("data", "model")), out_specs=P(), check_vma=False
    )
    def step(a, b, c, d, e, f):
        return (
            jax.lax.psum(a, "model"),
            jax.lax.all_gather(b, "data", tiled=True),
            jax.lax.psum_scatter(c, "data", tiled=True),
            jax.lax.all_to_all(d.reshape(data, -1, WIDTH), "data", 0, 0),
            _shift(e, "data", data),
            jax.lax.psum(f, ("data", "model")),
        )

    rows = (8, 16, 32 * data, 32 * data, 40, 48)
    both = ("data", "model")
    return step, tuple(_array(mesh, (n * len(devices), WIDTH), both) for n in rows)


def padded(devices):
    """A reduce-scatter whose pieces are no multiple of what TPUs scatter in."""
    n = len(devices)
    mesh = make_mesh({"data": n}, devices=devices)
    step = jax.shard_map(
        lambda x: jax.lax.psum_scatter(x, "data", tiled=True),
        mesh=mesh,
        in_specs=P(),
        out_specs=P("data"),
        check_vma=False,
    )
    return step, (_array(mesh, (24 * n, WIDTH)),)


def loops(devices):
    """Collectives in a scan, a scan of scans, a branch, and a loop that ends when it will."""
    data = len(devices) // 2
    mesh = make_mesh({"data": data, "model": 2}, devices=devices)

    def shifts(x, n):
        return jax.lax.fori_loop(0, n, lambda _, x: _shift(x, "data", data) * 0.5, x)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    def step(a, b, c, d):
        a = shifts(a, 7)
        b = jax.lax.fori_loop(0, 3, lambda _, b: jax.lax.psum(shifts(b, 5), "model") * 0.3, b)
        first = jax.lax.psum(jnp.sum(a), ("data", "model"))
        c = jax.lax.cond(first > 0, lambda c: _shift(c, "data", data), lambda c: c * 2, c)
        goes_on = lambda d: jax.lax.psum(jnp.sum(d), ("data", "model")) < 1e6
        d = jax.lax.while_loop(goes_on, lambda d: d + _shift(d, "data", data), d)
        return a, b, c, d

    return step, tuple(_array(mesh, (n * data, WIDTH), "data") for n in (8, 16, 24, 32))


def ragged(devices):
    """Rows sent in pieces of unequal length; not to be had on the CPU."""
    n = len(devices)
    mesh = make_mesh({"data": n}, devices=devices)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    def step(x, out, sizes):
        offsets = jnp.cumsum(sizes) - sizes
        return jax.lax.ragged_all_to_all(x, out, offsets, sizes, offsets, sizes, axis_name="data")

    rows, sizes = _array(mesh, (16 * n, WIDTH), "data"), (n * n,)
    return step, (rows, rows, _array(mesh, sizes, "data", dtype=jnp.int32))


def products(devices):
    """A plain and a batched matrix product on one device; on GPUs as calls of cuBLAS."""
    mesh = make_mesh({"data": 1}, devices=devices[:1])
    step = lambda a, b, q, k: (a @ b, jnp.einsum("bqhd,bkhd->bhqk", q, k))
    heads = _array(mesh, (4, 64, 4, 32))
    return step, (_array(mesh, (64, WIDTH)), _array(mesh, (WIDTH, HIDDEN)), heads, heads)


def between_slices(devices):
    """A sum over two TPU slices and over the chips of each, and one over the slices alone."""
    both = ("worker", "data")
    grid = np.array(devices).reshape(2, -1)  # the devices of a slice follow one another
    mesh = Mesh(grid, both, axis_types=(AxisType.Auto,) * 2)
    step = jax.shard_map(
        lambda x, y: (jax.lax.psum(x, both), jax.lax.psum(y, "worker")),
        mesh=mesh,
        in_specs=P(both),
        out_specs=P(),
        check_vma=False,
    )
    shape = (32 * len(devices), WIDTH)
    return step, (_array(mesh, shape, both), _array(mesh, shape, both))


CASES = {
    case.__name__: case
    for case in (
        data_parallel,
        zero1,
        fsdp,
        tensor_parallel,
        explicit,
        padded,
        loops,
        ragged,
        products,
        between_slices,
    )
}


OPTIONS = {"products.h100": {"xla_gpu_enable_triton_gemm": False}}
STORED = {
    "v5e:2x2": (*CASES,)[:-1],
    "v5e:2x2*2": ("between_slices",),
    "v5e:4x4": ("zero1", "fsdp", "explicit"),
    "v5p:2x2x2": (*CASES,)[:5],
    "h100": (*CASES,)[:-1],
}


def compiled(case, devices, **options):
    """The program of a case, compiled for devices, which may be only described."""
    step, arguments = CASES[case](devices)
    return jax.jit(step).lower(*arguments).compile(compiler_options=options)


def shorten(text):
    """The text without the tables of source locations and most notes of the compiler."""
    text = re.sub(r"\n\nFileNames\n.*?\n\n\n", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r" stack_frame_id=\d+|scheduling_name=\"[^\"]*\" ?", "", text)
    note = r", backend_config=(?!.*(?:known_trip_count|dot_dimension_numbers)).*"
    return re.sub(note, "", text)


def devices_of(target):
    """Devices of a target by name; they need not exist."""
    from jax.experimental import topologies

    if target == "cpu":
        return jax.devices()
    if target != "h100":
        name, _, slices = target.partition("*")
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=int(slices or 1)
        ).devices
    config = pathlib.Path(os.environ["GPU_TARGET"]).read_text()
    return topologies.get_topology_desc(
        platform="cuda", target_config=config, topology="1x1x8"
    ).devices


def main(target, *cases):
    """Writes the given cases of a target, or those that the tests read; long ones compressed."""
    devices = devices_of(target)
    for case in cases or STORED[target]:
        options = OPTIONS.get(f"{case}.{target}", {})
        text = shorten(compiled(case, devices, **options).as_text())
        file = HERE / f"{case}.{target.replace(':', '-').replace('*', '-')}.txt"
        if len(text) <= 20_000:
            file.write_text(text)
        else:
            file = file.with_suffix(".txt.gz")
            file.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(file.name, file.stat().st_size)


def read(name):
    """The text of a stored program, ``CASE.TARGET``."""
    plain = HERE / f"{name}.txt"
    if plain.exists():
        return plain.read_text()
    return gzip.decompress((HERE / f"{name}.txt.gz").read_bytes()).decode()


if __name__ == "__main__":
    main(*sys.argv[1:])
