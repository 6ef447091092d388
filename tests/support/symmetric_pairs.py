"""Pairs of stacks of symmetric matrices, and of their products the triangle that counts."""

import jax.numpy as jnp
import numpy as np


def commuting(k, n, seed=0):
    """Two polynomials of symmetric matrices ``[k, n, n]``, float32."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(k, n, n)))[0]
    make = lambda values: np.einsum("kia,ka,kja->kij", q, values, q)
    pair = make(rng.normal(size=(k, n))), make(rng.uniform(0.5, 2.0, size=(k, n)))
    return [jnp.asarray(0.5 * (x + x.swapaxes(1, 2)), jnp.float32) for x in pair]


def not_commuting(k, n, seed=0):
    """Two stacks ``[k, n, n]``, float32."""
    halves = np.random.default_rng(seed).normal(size=(2, k, n, n))
    return [jnp.asarray(x + x.swapaxes(1, 2), jnp.float32) for x in halves]


def by_lower_triangle(product):
    """The symmetric matrices that have the lower triangles of these."""
    lower = np.tril(product)
    return lower + np.swapaxes(np.tril(product, -1), 1, 2)


def in_float64(a, b):
    """The products by their lower triangles."""
    return by_lower_triangle(np.asarray(a, np.float64) @ np.asarray(b, np.float64))


def sizes(a, b):
    """Of each entry of the products the sum of its terms' magnitudes, in float64."""
    return np.abs(np.asarray(a, np.float64)) @ np.abs(np.asarray(b, np.float64))


def assert_overflow_where_they_must(found, a, b):
    """Infinite where the sum is too large, finite where no part of it can be, by lower triangles.

    In between it depends on the order in which terms of both signs are added.
    """
    largest = float(np.finfo(np.float32).max)
    lower = np.tril(np.ones(a.shape, bool))
    assert not np.isfinite(found)[lower & (np.abs(in_float64(a, b)) > 1.1 * largest)].any()
    assert np.isfinite(found)[lower & (sizes(a, b) < 0.9 * largest)].all()
