"""Shampoo's algebra in NumPy, one tensor and one mode at a time, by unfolding."""

import jax
import jax.numpy as jnp
import numpy as np


def unfold(x, mode):
    """``[d_mode, the rest]``."""
    return np.moveaxis(x, mode, 0).reshape(x.shape[mode], -1)


def gram(x, mode):
    """The Gram matrix of an unfolding."""
    return unfold(x, mode) @ unfold(x, mode).T


def times(x, matrix, mode):
    """``x`` multiplied along a mode by a matrix from the left."""
    return np.moveaxis(np.tensordot(matrix, x, (1, mode)), 0, mode)


def root(a, exponent):
    """``a ** -exponent`` of a symmetric positive definite matrix."""
    values, vectors = np.linalg.eigh(a)
    return (vectors * values**-exponent) @ vectors.T


def normal(shapes, steps, *, seed=0, dtype=np.float64):
    """For each step a dict of arrays of these shapes."""
    rng = np.random.default_rng(seed)
    return [
        {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
        for _ in range(steps)
    ]


def run(tx, gradients, *, params=None, each=None):
    """The updates of all steps as NumPy arrays, and the last state.

    Args:
      tx: a transformation.
      gradients: one tree for each step.
      params: a tree; ``None`` is zeros.
      each: (step from 1, state) -> state, applied before the step.
    """
    like = jax.tree.map(jnp.zeros_like, gradients[0]) if params is None else params
    state, update, found = tx.init(like), jax.jit(tx.update), []
    for step, g in enumerate(gradients, start=1):
        if each is not None:
            state = each(step, state)
        updates, state = update(jax.tree.map(jnp.asarray, g), state, like)
        found.append(jax.tree.map(np.asarray, updates))
    return found, state


def relative_difference(found, expected):
    """The largest difference over the largest magnitude."""
    return np.max(np.abs(found - expected)) / np.max(np.abs(expected))


def lowered(tx, params, platform):
    """An update lowered for a platform, which need not be there, as text."""
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params))
    return traced.lower(lowering_platforms=(platform,)).as_text()
