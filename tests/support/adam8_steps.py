"""Steps of Adam over codes of 8 bits: gradients, the step's numbers, and when two agree."""

import jax.numpy as jnp
import numpy as np

from jaxopt_suite import kernels

B1, B2, EPS = 0.9, 0.99, 1e-8

HARD = {
    "a denormal": 1e-40,
    "a number whose moment is denormal": 5e-38,
    "a number whose square is none": 1e-30,
    "a number whose square is infinite": 1e30,
    "infinity": np.inf,
    "not a number": np.nan,
}


def gradients(shape, steps, dtype="float32", seed=0):
    """Of many sizes within a block, and of another from step to step."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-2, 1, (steps, *[1] * len(shape)))
    spread = 10.0 ** rng.uniform(-3, 0, shape)
    return jnp.asarray(scales * spread * rng.normal(size=(steps, *shape)), dtype)


def numbers(step, b1=B1, b2=B2, eps=EPS):
    return kernels.adam8_numbers(b1, b2, eps, (1 - b1**step, 1 - b2**step))


def assert_directions_agree(found, expected, dtype):
    """But for a few units in the last place: two sums and a quotient may be fused differently."""
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    np.testing.assert_allclose(
        found, expected, rtol=1e-6 if dtype == "float32" else 1e-2, atol=1e-6
    )


def assert_moments_agree(found, expected):
    for name, new, old in zip(found._fields, found, expected, strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        if "scales" in name:
            np.testing.assert_allclose(new, old, rtol=1e-6)
        else:  # and such a unit may turn a near tie into the next code
            apart = np.abs(np.asarray(new, int) - np.asarray(old, int))
            assert apart.max() <= 1
            assert apart.mean() < 1e-4
