"""Every compressor in the variants that matter, and what several of their tests do with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_suite.optimizers.compression import compressors

CASES = {
    "identity": compressors.identity(),
    "top_k": compressors.top_k(5),
    "top_k fraction": compressors.top_k(fraction=0.1),
    "top_k chunks": compressors.top_k(3, chunk=16),
    "top_k 12 bits": compressors.top_k(fraction=0.05, chunk=300, values="bfloat16"),
    "random_k": compressors.random_k(fraction=0.2),
    "random_k scaled": compressors.random_k(7, scaled=True),
    "sign": compressors.sign(),
    "sign blocks": compressors.sign(block=16),
    "sign l2": compressors.sign("l2", block=24),
    "ternary": compressors.ternary(),
    "ternary blocks": compressors.ternary(12),
    "ternary clip": compressors.ternary(clip=2.5),
    "int8": compressors.int8(),
    "int8 tensor": compressors.int8(None),
    "int8 stochastic": compressors.int8(16, stochastic=True),
    "int4": compressors.int4(),
    "int4 odd block": compressors.int4(7),
    "int4 stochastic": compressors.int4(16, stochastic=True),
    "e4m3": compressors.fp8(),
    "e5m2 blocks": compressors.fp8("e5m2", block=32),
    "low_rank": compressors.low_rank(2),
    "dct_top_k": compressors.dct_top_k(4, side=8),
    "dct_top_k divisors": compressors.dct_top_k(4, side=8, pad=False, values="bfloat16"),
}


def like(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32)


def round_trip(compressor, x, key=None) -> jax.Array:
    key = jax.random.key(0) if key is None else key
    return _round_trip(compressor, jnp.asarray(x, jnp.float32), key)


@functools.partial(jax.jit, static_argnums=0)  # one compilation, not one for each operation
def _round_trip(compressor, x, key):
    return compressor.decode(compressor.encode(x, key), like(x))


def relative_error(compressor, x, key=None) -> float:
    """‖C(x) − x‖² / ‖x‖², in float64."""
    x = np.asarray(x, np.float32)
    difference = np.asarray(round_trip(compressor, x, key), np.float64) - x
    return float(np.sum(difference**2) / np.sum(x.astype(np.float64) ** 2))


def draws(compressor, x, count: int) -> np.ndarray:
    """C(x) for ``count`` keys, float64 ``[count, *x.shape]``."""
    keys = jax.random.split(jax.random.key(42), count)
    one = jax.jit(jax.vmap(lambda key: round_trip(compressor, x, key)))
    return np.asarray(one(keys), np.float64)
