"""Packing: exact round trips for every length, and the bytes it promises."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_suite.optimizers.compression import packing


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 64, 101])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_codes_come_back_exactly_from_the_promised_bytes(width, count):
    codes = np.random.default_rng(count).integers(0, 2**width, count).astype(np.uint8)
    packed = packing.pack(jnp.asarray(codes), width)
    assert packed.dtype == jnp.uint8
    assert packed.nbytes == packing.packed_bytes(count, width) == -(-count * width // 8)
    np.testing.assert_array_equal(packing.unpack(packed, width, count), codes)


def test_bits_are_packed_in_planes():
    flags = jnp.zeros(16, bool).at[jnp.asarray([0, 3, 14])].set(True)  # bytes 0, 1, 0 of 2
    np.testing.assert_array_equal(packing.pack(flags, 1), [1 + (1 << 7), 1 << 1])


@pytest.mark.parametrize("count", [0, 1, 2, 5, 100])
@pytest.mark.parametrize(
    ("size", "bits"),
    [(1, 8), (256, 8), (257, 12), (4096, 12), (4097, 16), (65536, 16), (65537, 32), (2**31, 32)],
)
def test_indices_take_the_narrowest_width_and_come_back_exactly(size, bits, count):
    indices = np.random.default_rng(count).integers(0, size, count)
    indices[: min(2, count)] = [size - 1, 0][:count]  # the ends of the range
    packed = packing.pack_indices(jnp.asarray(indices, jnp.int32), size)
    assert packed.nbytes == packing.index_bytes(count, size)
    assert packed.nbytes == (3 * ((count + 1) // 2) if bits == 12 else count * bits // 8)
    np.testing.assert_array_equal(packing.unpack_indices(packed, size, count), indices)
