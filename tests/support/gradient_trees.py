"""Gradients for tests of single methods: several shapes, signs that change step by step."""

import jax
import jax.numpy as jnp
import numpy as np

SHAPES = {"square": (4, 4), "tall": (7, 3), "wide": (3, 5), "vector": (6,), "scalar": ()}


def gradients(steps, *, shapes=SHAPES, seed=0, dtype=np.float64):
    """A list of NumPy gradient trees whose entries have drift, noise and changing signs."""
    rng = np.random.default_rng(seed)
    drift = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return [
        {
            name: (np.cos(0.7 * t) * drift[name] + rng.normal(size=shape)).astype(dtype)
            for name, shape in shapes.items()
        }
        for t in range(steps)
    ]


def run(tx, grads, *, dtype=jnp.float32):
    """The updates (NumPy float64) at every step, and the last state, from parameters of zeros."""
    as_jax = lambda tree: {k: jnp.asarray(v, dtype) for k, v in tree.items()}
    params = {k: jnp.zeros(np.shape(v), dtype) for k, v in grads[0].items()}
    state, history, update = tx.init(params), [], jax.jit(tx.update)
    for g in grads:
        updates, state = update(as_jax(g), state, params)
        history.append({k: np.asarray(v, np.float64) for k, v in updates.items()})
    return history, state


def assert_histories_close(ours, theirs, **tolerance):
    assert len(ours) == len(theirs)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for name in b:
            np.testing.assert_allclose(
                a[name], b[name], err_msg=f"step {step + 1}, {name}", **tolerance
            )
