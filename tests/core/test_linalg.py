"""Factorisations of many matrices: the results are those of one matrix at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_suite.core.linalg import batch_factorisation

MATRICES = np.random.default_rng(0).normal(size=(5, 6, 4)).astype(np.float32)


@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit])
def test_a_batch_gives_what_its_matrices_give(transform):
    def factorise(tree, shift):
        u, s, vt = jnp.linalg.svd(tree["m"] + shift, full_matrices=False)
        return {"product": (u * s[None]) @ vt, "values": (s,)}

    shifts = jnp.arange(5.0)
    got = transform(batch_factorisation(factorise))({"m": MATRICES}, shifts)
    # Singular values of float32 matrices of norm below 30: errors of some units of 1e-6.
    np.testing.assert_allclose(
        got["product"], MATRICES + np.arange(5.0)[:, None, None], rtol=0, atol=1e-4
    )
    for i in range(5):
        alone = np.linalg.svd(MATRICES[i].astype(np.float64) + i, compute_uv=False)
        np.testing.assert_allclose(got["values"][0][i], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_cpu_takes_one_matrix_after_another_and_accelerators_the_batch(platform):
    program = jax.jit(batch_factorisation(jnp.linalg.qr))
    text = program.trace(MATRICES).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) == (platform == "cpu")
