"""Tiles with a block in every row, as one warpgroup of an NVIDIA GPU holds them.

In the memory of a GPU a tensor lies entry after entry, so it is a matrix with a block in every row
for nothing. Beyond the last row the copy engine (TMA) reads zeros and writes nothing, so that the
last tile needs no care. A row is a warp's, four entries in a row a lane's: a block's largest
magnitude takes five shuffles and no exchange between warps.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

ROWS = 32  # of a tile: their scales are 128 bytes, the least that Mosaic of JAX 0.10.2 copies
WHOLE = 4  # scales: where there is a row of them for each worker the copy engine wants 16 bytes

# Four rows to the four warps; in each 32 lanes with four entries in a row, again and again.
LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((4, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
# The other semantics, JAX 0.12's default, lay shared memory out by eight rows and refuse a rest.
PARAMETERS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def spread(column: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number of each row, at each of its entries."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(column, shape, (0,)), LAYOUT)


def padded(x: jax.Array, multiple: int) -> jax.Array:
    """With zeros at the end of the last dimension, up to a multiple."""
    return jnp.pad(x, [*[(0, 0)] * (x.ndim - 1), (0, -x.shape[-1] % multiple)])
