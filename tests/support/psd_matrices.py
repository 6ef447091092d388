"""Positive semidefinite matrices with given eigenvalues, and their roots in float64."""

import numpy as np


def of_spectrum(values, seed=0):
    """A float32 matrix ``[n, n]`` with these eigenvalues, up to its own rounding."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    a = (q * np.asarray(values)) @ q.T
    return (0.5 * a + 0.5 * a.T).astype(np.float32)


def stack_of(condition, n=24, scales=(1e-9, 1.0, 1e6)):
    """Matrices ``[3, n, n]`` of one condition number and of three scales."""
    values = np.logspace(0, -np.log10(condition), n)
    return np.stack([s * of_spectrum(values, seed) for seed, s in enumerate(scales)])


def exact_root(a, order, relative=0.0, absolute=0.0):
    """``(a + damping)^(-1/order)`` in float64; relative to the largest eigenvalue."""
    values, q = np.linalg.eigh(np.asarray(a, np.float64))
    damped = np.maximum(values, 0) + relative * values[-1] + absolute
    return (q * damped ** (-1 / float(order))) @ q.T


def relative_error(got, expected):
    """Frobenius norm of the difference over that of the expected."""
    return np.linalg.norm(np.asarray(got, np.float64) - expected) / np.linalg.norm(expected)
