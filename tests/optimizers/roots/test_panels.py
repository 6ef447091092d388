"""QR factors panel by panel: orthonormal whatever the rank, and QR's own where that is unique."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_suite.optimizers.roots.panels import panel_qr

SIZES = [100, 200, 384]  # one panel, two with the last one padded, three full ones


def _matrix(kind, size):
    rng = np.random.default_rng(size)
    dense = rng.standard_normal((size, size))
    if kind == "of rank 3":
        return dense[:, :3] @ rng.standard_normal((3, size))
    if kind == "graded":
        return dense * np.logspace(0, -12, size)
    if kind == "with two equal halves":
        return np.tile(dense[:, : size // 2], (1, 2))
    return {"dense": dense, "zero": 0 * dense, "orthonormal": np.linalg.qr(dense)[0]}[kind]


@pytest.mark.parametrize("size", SIZES)
def test_factors_are_orthonormal_and_give_the_matrix_whatever_its_rank(size):
    kinds = ["dense", "of rank 3", "graded", "with two equal halves", "zero", "orthonormal"]
    matrices = np.stack([_matrix(kind, size) for kind in kinds]).astype(np.float32)
    found, diagonal = (np.asarray(x, np.float64) for x in panel_qr(jnp.asarray(matrices)))
    for kind, q, a, r in zip(kinds, found, matrices.astype(np.float64), diagonal, strict=True):
        # float32's rounding over up to 384 columns.
        np.testing.assert_allclose(q.T @ q, np.eye(size), atol=3e-6, err_msg=kind)
        triangle = q.T @ a
        scale = max(np.abs(a).max(), 1.0)
        np.testing.assert_allclose(np.tril(triangle, -1), 0, atol=3e-5 * scale, err_msg=kind)
        np.testing.assert_allclose(r, np.diagonal(triangle), atol=3e-5 * scale, err_msg=kind)


@pytest.mark.parametrize("size", SIZES)
def test_of_a_matrix_of_full_rank_they_are_qrs_up_to_the_signs_of_columns(size):
    dense = _matrix("dense", size) + 10 * np.eye(size)  # well conditioned: QR is unique
    found, diagonal = (np.asarray(x)[0] for x in panel_qr(jnp.asarray(dense[None], jnp.float32)))
    expected, triangle = np.linalg.qr(dense)
    signs = np.sign(np.diagonal(triangle)) * np.sign(diagonal)
    np.testing.assert_allclose(found * signs, expected, atol=2e-5)
    np.testing.assert_allclose(diagonal * signs, np.diagonal(triangle), rtol=1e-4, atol=2e-5)
