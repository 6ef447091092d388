"""Factorisations of many matrices: the results are those of one matrix at a time, and they end."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_suite.core.linalg import batch_factorisation

MATRICES = np.random.default_rng(0).normal(size=(35, 6, 4)).astype(np.float32)

_MANY_AT_ONCE = """
import jax, jax.numpy as jnp
from jaxopt_suite.core.linalg import batch_factorisation

def factorise(stacks):
    return [batch_factorisation(jnp.linalg.qr)(x + i) for i, x in enumerate(stacks)]

stacks = list(jax.random.normal(jax.random.key(0), (8, 3, 40, 64, 64)))
for run, given in ((factorise, [x[0] for x in stacks]), (jax.vmap(factorise), stacks)):
    for _ in range(3):
        jax.block_until_ready(jax.jit(run)(given))
"""


def _factorise(tree, shift):
    u, s, vt = jnp.linalg.svd(tree["m"] + shift, full_matrices=False)
    return {"product": (u * s[None]) @ vt, "values": (s,)}


@pytest.mark.parametrize("transform", [lambda fn: fn, jax.jit])
@pytest.mark.parametrize("rows", [0, 1, 5, 16, 17, 35])
def test_a_batch_gives_what_its_matrices_give(rows, transform):
    matrices, shifts = MATRICES[:rows], np.arange(rows, dtype=np.float32)
    got = transform(batch_factorisation(_factorise))({"m": matrices}, shifts)
    # Singular values of float32 matrices of norm below 200: errors of some units of 1e-5.
    expected = matrices + shifts[:, None, None]
    np.testing.assert_allclose(got["product"], expected, rtol=0, atol=3e-4)
    assert got["values"][0].shape == (rows, 4)
    for found, matrix in zip(got["values"][0], expected.astype(np.float64), strict=True):
        alone = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)


def test_under_vmap_the_batches_are_one_and_each_gets_its_own():
    one = batch_factorisation(_factorise)
    shifts = np.arange(5, dtype=np.float32)
    got = jax.vmap(lambda m: one({"m": m}, shifts))(MATRICES.reshape(7, 5, 6, 4))
    for i in range(7):
        alone = one({"m": MATRICES[5 * i : 5 * i + 5]}, shifts)
        np.testing.assert_array_equal(got["product"][i], alone["product"])
        np.testing.assert_array_equal(got["values"][0][i], alone["values"][0])


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_a_cpu_has_a_call_for_each_matrix_and_accelerators_one_for_the_batch(platform):
    program = jax.jit(batch_factorisation(jnp.linalg.cholesky))
    square = np.stack([np.eye(4, dtype=np.float32)] * 35)
    text = program.trace(square).lower(lowering_platforms=(platform,)).as_text()
    calls = [line for line in text.splitlines() if "stablehlo" in line]
    calls = [line for line in calls if "cholesky" in line or "potrf" in line]
    assert calls
    assert any("35x4x4" in line for line in calls) == (platform != "cpu")
    assert ("stablehlo.while" in text) == (platform == "cpu")


def test_many_batches_in_one_program_do_not_wait_for_one_another():
    # In a process of its own, with one device: what hangs cannot be ended from within.
    settings = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", _MANY_AT_ONCE],
        env={**os.environ, **settings, "XLA_FLAGS": ""},
        timeout=60,
        check=True,
    )
