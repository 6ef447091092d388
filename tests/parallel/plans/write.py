"""Writes the compiled train steps that ``tests/parallel/test_memory.py`` reads: needs libtpu.

JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 PYTHONPATH=. python tests/parallel/plans/write.py
"""

import gzip
import pathlib

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxopt_suite.parallel.memory import compiler_figures
from jaxopt_suite.parallel.meshes import make_mesh
from jaxopt_suite.parallel.topologies import describe
from jaxopt_suite.parallel.train_step import make_train_step

# Activations far larger than what the chip itself can hold.
LAYERS, WIDTH, BATCH = 4, 1024, 65536
PARAMS = {
    "into": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32),
    "layers": jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32),
}
SPLIT = {"into": None, "layers": PartitionSpec(None, None, "model")}
CASES = {
    "data.v5e-2x2": ({"data": 4}, {}),
    "data-model.v5e-2x2": ({"data": 2, "model": 2}, {"param_specs": SPLIT}),
    "zero1-remat.v5e-2x2": ({"data": 4}, {"shard_state_over": ("data",), "remat": True}),
}


def loss(params, batch):
    """A multi-layer perceptron whose layers are looped over."""
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    x, _ = jax.lax.scan(layer, batch @ params["into"], params["layers"])
    return jnp.mean(jnp.square(x))


def main() -> None:
    """Writes every case, and prints the compiler's own figures for the test."""
    devices = describe("v5e:2x2").devices
    for name, (sizes, options) in CASES.items():
        step = make_train_step(
            loss, optax.adamw(1e-3), make_mesh(sizes, devices=devices), **options
        )
        batch = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
        compiled = step.lower(PARAMS, batch).compile()
        path = pathlib.Path(__file__).with_name(f"{name}.txt.gz")
        path.write_bytes(gzip.compress(compiled.as_text().encode(), mtime=0))
        print(name, compiler_figures(compiled, "tpu"))


if __name__ == "__main__":
    main()
