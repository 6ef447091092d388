"""Powers of two that matrices are scaled by: exact, for every size of number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_suite.optimizers.roots import stack


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponents_are_those_of_frexp_for_every_power_of_two_and_its_neighbours(dtype):
    limits = np.finfo(dtype)
    powers = np.ldexp(np.ones((), dtype), np.arange(limits.minexp, limits.maxexp))
    below = np.nextafter(powers[1:], np.zeros((), dtype))
    x = np.concatenate([powers, below, [limits.max]]).astype(dtype)
    with jax.enable_x64(True):
        found = jax.jit(stack.exponent_above)(x)
        none = jax.jit(stack.exponent_above)(np.zeros(1, dtype))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, np.frexp(x)[1])
    assert none[0] == limits.minexp


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_number_times_a_power_of_two_is_exact_and_may_pass_outside_the_range(dtype):
    limits = np.finfo(dtype)
    exponents = np.arange(-2 * limits.maxexp + 4, 2 * limits.maxexp - 4, dtype=np.int32)
    # Of either sign, and such that the product is a normal number.
    mantissas = np.random.default_rng(0).uniform(1, 2, len(exponents)) * (-1.0) ** exponents
    ends = np.clip(exponents, limits.minexp, limits.maxexp - 1)
    x = np.ldexp(mantissas.astype(dtype), np.clip(ends - exponents, limits.minexp, None))
    with jax.enable_x64(True):
        found = jax.jit(stack.times_power_of_two)(x, exponents)
    expected = np.ldexp(x, exponents)
    assert np.all(np.isfinite(expected))
    assert np.abs(expected).min() >= limits.tiny
    np.testing.assert_array_equal(found, expected)


def test_each_matrix_has_a_power_of_its_own_and_what_leaves_the_range_is_zero_or_infinite():
    x = jnp.ones((4, 2, 3))
    found = stack.times_power_of_two(x, jnp.array([0, 3, -300, 200], jnp.int32))
    np.testing.assert_array_equal(
        found, np.array([1, 8, 0, np.inf])[:, None, None] * np.ones((2, 3))
    )
