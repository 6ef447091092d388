"""Kernels against float64 from one entry to 2**24: no worse than their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_suite import kernels
from jaxopt_suite.kernels.dct import dct_matrix

exhaustive = pytest.mark.exhaustive
SIZES = [1, 7, 1000, 2**14, 2**17 + 3, *(pytest.param(2**n, marks=exhaustive) for n in (20, 24))]
WHOLE = [2**14, *(pytest.param(2**n, marks=exhaustive) for n in (17, 20, 24))]


def drawn(*shape, seed=0):
    """Of many magnitudes, with zeros among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10 ** rng.uniform(-4, 4, size=shape)
    return jnp.asarray(np.where(rng.uniform(size=shape) < 0.01, 0.0, x), jnp.float32)


def both(call):
    """By the kernel and by the definition, one after the other.

    The interpreter computes in callbacks, which may wait for ever for what else was begun.
    """
    return [jax.block_until_ready(call(impl=impl)) for impl in ("interpret", "xla")]


def assert_no_worse(found, plain, exact, roundings):
    """Root mean square and largest error; sums in another order may be off by some roundings."""
    unit = roundings * 2.0**-24 * np.max(np.abs(exact))
    errors = [np.abs(np.asarray(x, np.float64) - exact) for x in (found, plain)]
    by_kernel, by_definition = (np.sqrt(np.mean(error**2)) for error in errors)
    assert by_kernel <= 1.05 * by_definition + unit / np.sqrt(exact.size)
    assert np.max(errors[0]) <= 1.5 * np.max(errors[1]) + unit


@pytest.mark.parametrize("size", SIZES)
def test_int8_decodes_what_the_definition_decodes(size):
    x = drawn(size)
    found, plain = both(functools.partial(kernels.int8_encode, x))
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    scales = np.repeat(np.asarray(found.scales, np.float64), 256)[:size]
    error = np.abs(np.asarray(found.decoded, np.float64) - np.asarray(x, np.float64))
    assert (error <= scales * (1 / 254 + 2e-7)).all()  # half a code


@pytest.mark.parametrize("size", SIZES)
def test_a_mean_of_int8_is_no_worse_than_the_definition_s(size):
    messages = [kernels.int8_encode(drawn(size, seed=i), impl="xla") for i in range(3)]
    codes, scales = (
        jnp.stack([getattr(m, name) for m in messages]) for name in ("codes", "scales")
    )
    found, plain = both(functools.partial(kernels.int8_mean, codes, scales, (size,)))
    each = np.repeat(np.asarray(scales, np.float64) / 127, 256, axis=1)[:, :size]
    assert_no_worse(
        found, plain, np.mean(np.asarray(codes, np.float64) * each, axis=0), roundings=3
    )


@pytest.mark.parametrize("size", WHOLE)
@pytest.mark.parametrize("scale", ["l1", "l2"])
def test_scales_of_signs_are_no_worse_than_the_definition_s(size, scale):
    x = drawn(size // 256, 256)
    found, plain = both(functools.partial(kernels.sign_encode, x, scale=scale))
    np.testing.assert_array_equal(found.bits, plain.bits)
    wide = np.abs(np.asarray(x, np.float64))
    exact = np.mean(wide, 1) if scale == "l1" else np.sqrt(np.mean(wide**2, 1))
    relative = lambda message: np.asarray(message.scales, np.float64) / exact
    assert_no_worse(relative(found), relative(plain), np.ones_like(exact), roundings=2)


@pytest.mark.parametrize("size", WHOLE)
def test_a_mean_of_signs_is_no_worse_than_the_definition_s(size):
    shape = (size // 256, 256)
    messages = [kernels.sign_encode(drawn(*shape, seed=i), impl="xla") for i in range(3)]
    bits, scales = (jnp.stack([getattr(m, name) for m in messages]) for name in ("bits", "scales"))
    found, plain = both(functools.partial(kernels.sign_mean, bits, scales, shape))
    exact = np.mean([np.asarray(m.decoded, np.float64) for m in messages], axis=0)
    assert_no_worse(found, plain, exact, roundings=3)


@pytest.mark.parametrize("size", WHOLE)
def test_a_step_of_adam_in_8_bits_is_no_worse_than_the_definition_s(size):
    shape = (size // 256, 256)
    g, zeros = drawn(*shape), kernels.adam8_zeros(shape)
    numbers = kernels.adam8_numbers(0.9, 0.99, 1e-8, (0.1, 0.01))
    step = functools.partial(kernels.adam8_update, numbers=numbers)
    first = step(g, zeros, impl="xla")[1]
    found, plain = both(functools.partial(step, -0.7 * g, first))
    mu, nu = (np.asarray(x, np.float64) for x in kernels.adam8_decode(first))
    wide = np.asarray(-0.7 * g, np.float64)
    b1, rest1, b2, rest2, eps, c1, c2 = np.asarray(numbers, np.float64)
    mu, nu = b1 * mu + rest1 * wide, b2 * nu + rest2 * wide**2
    assert_no_worse(found[0], plain[0], mu / c1 / (np.sqrt(nu / c2) + eps), roundings=4)


@pytest.mark.parametrize("size", WHOLE)
def test_coefficients_are_no_worse_than_the_definition_s(size):
    x = drawn(64, size // 64)
    found, plain = both(functools.partial(kernels.dct_top_k, x, 16, (64, 64)))
    chunks = np.asarray(x, np.float64).reshape(64, -1, 64).swapaxes(0, 1)
    matrix = np.asarray(dct_matrix(64), np.float64)
    exact = (matrix @ chunks @ matrix.T).reshape(len(chunks), -1)

    def there(message):
        """The coefficients that were found, over the largest of their chunk; and these exactly."""
        right = np.take_along_axis(exact, np.asarray(message.indices), axis=1)
        largest = np.max(np.abs(right), axis=1, keepdims=True)
        return np.asarray(message.values, np.float64) / largest, right / largest

    (by_kernel, right), (by_definition, also_right) = there(found), there(plain)
    errors = by_kernel - right, by_definition - also_right
    assert_no_worse(*errors, np.zeros(1), roundings=0)


@pytest.mark.parametrize("size", WHOLE)
def test_gram_matrices_and_symmetric_products_are_no_worse_than_the_definitions(size):
    side = 128 if size < 2**20 else 1024
    blocks = drawn(size // side**2, side, side)
    zeros = jnp.zeros_like(blocks)
    found, plain = both(functools.partial(kernels.gram_update, zeros, blocks, 0.0, 1.0))
    wide = np.asarray(blocks, np.float64)
    exact = wide @ wide.swapaxes(1, 2)
    assert_no_worse(found, plain, exact, roundings=2)
    symmetric = found / jnp.max(jnp.abs(found))
    found, plain = both(functools.partial(kernels.symmetric_product, symmetric, symmetric))
    wide = np.asarray(symmetric, np.float64)
    assert_no_worse(found, plain, wide @ wide, roundings=2)
