"""Eigenbases: of a decomposition, of SOAP's step, and what follows them."""

import jax
import jax.numpy as jnp
import numpy as np
import psd_matrices as psd
import pytest

from jaxopt_suite.optimizers import roots

solve = jax.jit(roots.eigenbasis, static_argnames=("method",))
STACK = psd.stack_of(1e3, n=10, scales=(1e-8, 1.0, 1e5))


def orthonormal(q):
    q = np.asarray(q)
    return np.abs(q.transpose(0, 2, 1) @ q - np.eye(q.shape[-1])).max()


def soap_step(a, q):
    """The refresh of the official code in float64, with R's diagonal made positive."""
    estimate = np.diag(q.T @ a @ q)
    order = np.argsort(-estimate, kind="stable")
    new, r = np.linalg.qr(a @ q[:, order])
    return new * np.sign(np.diag(r)), order


def test_a_decomposition_is_in_descending_order_and_diagonalises():
    found = solve(STACK)
    for a, q, values in zip(STACK, found.basis, found.eigenvalues, strict=True):
        exact = np.linalg.eigvalsh(a.astype(np.float64))[::-1]
        np.testing.assert_allclose(values, exact, atol=1e-6 * exact[0])  # float32's decomposition
        np.testing.assert_allclose(
            np.asarray(q).T @ a @ np.asarray(q), np.diag(exact), atol=2e-6 * exact[0]
        )
        largest = np.argmax(np.abs(q), axis=0)
        assert np.all(np.asarray(q)[largest, np.arange(10)] > 0)
    assert orthonormal(found.basis) < 1e-5
    assert found.permutation.tolist() == [list(range(10))] * 3
    assert found.ok.all()


def test_a_step_of_qr_is_soaps():
    rng = np.random.default_rng(2)
    previous = np.stack([np.linalg.qr(rng.standard_normal((10, 10)))[0] for _ in STACK])
    found = solve(STACK, previous=previous.astype(np.float32), method="qr")
    for i, a in enumerate(STACK):
        expected, order = soap_step(a.astype(np.float64), previous[i])
        assert found.permutation[i].tolist() == order.tolist()
        # QR of a product of condition 1e3: 6e-8 * 1e3, and the shift of 1e-6 of the largest.
        np.testing.assert_allclose(found.basis[i], expected, atol=3e-3)
        np.testing.assert_allclose(found.basis[i][:, :4], expected[:, :4], atol=1e-4)
    assert orthonormal(found.basis) < 1e-5


def test_steps_of_qr_converge_to_the_decomposition():
    a = psd.of_spectrum(4.0 ** -np.arange(8), seed=1)[None]
    found = solve(a, previous=np.eye(8, dtype=np.float32)[None], method="qr")
    for _ in range(12):  # ratios of 4: 4**-12 = 6e-8
        found = solve(a, previous=found.basis, method="qr")
    exact = solve(a, previous=found.basis)
    np.testing.assert_allclose(found.basis, exact.basis, atol=1e-3)  # gaps of 2e-4: 6e-8 / 2e-4
    np.testing.assert_allclose(found.eigenvalues[0], 4.0 ** -np.arange(8), atol=1e-6)
    assert found.permutation[0].tolist() == list(range(8))


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_what_is_kept_by_column_follows_eigenvalues_that_cross(method):
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0].astype(np.float32)
    a = ((q * np.float32([1.0, 5.0, 2.0])) @ q.T)[None]
    found = solve(a, previous=q[None], method=method)
    assert found.permutation.tolist() == [[1, 2, 0]]
    np.testing.assert_allclose(found.basis[0], q[:, [1, 2, 0]], atol=1e-5)  # sign kept too
    np.testing.assert_allclose(found.eigenvalues[0], [5.0, 2.0, 1.0], rtol=1e-5)


def test_a_null_space_keeps_its_columns():
    """The official step would make them of rounding noise."""
    q = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0].astype(np.float32)
    a = (np.outer(q[:, 0], q[:, 0]) + 0.5 * np.outer(q[:, 1], q[:, 1]))[None].astype(np.float32)
    found = solve(a, previous=q[None], method="qr")
    order = np.asarray(found.permutation[0])
    assert order[:2].tolist() == [0, 1]
    # The shift is 6 * 1.2e-7 of the largest, and A q is zero to 6e-8: a tenth of it.
    np.testing.assert_allclose(found.basis[0], q[:, order], atol=0.3)
    nothing = solve(np.zeros((1, 6, 6), np.float32), previous=q[None], method="qr")
    np.testing.assert_allclose(nothing.basis[0], q, atol=1e-6)  # QR of a multiple of q


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_padding_stays_the_identity_and_changes_nothing(method):
    sizes = np.array([4, 0, 7])
    rng = np.random.default_rng(5)
    padded = rng.standard_normal((3, 7, 7)).astype(np.float32)
    previous = np.tile(np.eye(7, dtype=np.float32), (3, 1, 1))
    for i, n in enumerate(sizes):
        padded[i, :n, :n] = psd.of_spectrum(3.0 ** -np.arange(n), seed=i)
        previous[i, :n, :n] = np.linalg.qr(rng.standard_normal((n, n)))[0] if n else 0
    found = solve(padded, previous=previous, method=method, sizes=sizes)
    assert found.ok.all()
    for i, n in enumerate(sizes):
        np.testing.assert_array_equal(found.basis[i, n:, n:], np.eye(7 - n))
        assert not np.any(found.basis[i, :n, n:])
        assert not np.any(found.eigenvalues[i, n:])
        assert found.permutation[i, n:].tolist() == list(range(n, 7))
        if n:
            alone = solve(
                padded[i : i + 1, :n, :n], previous=previous[i : i + 1, :n, :n], method=method
            )
            # The shift of a step is b times rounding, and b differs: 5e-7 over gaps of 1e-3.
            np.testing.assert_allclose(found.basis[i, :n, :n], alone.basis[0], atol=1e-3)
            assert found.permutation[i, :n].tolist() == alone.permutation[0].tolist()


@pytest.mark.parametrize("method", ["eigh", "qr"])
def test_a_broken_matrix_keeps_the_previous_basis(method):
    broken = STACK.copy()
    broken[1, 0, 0] = np.inf
    previous = solve(STACK).basis
    found = solve(broken, previous=previous[:, :, ::-1], method=method)
    assert found.ok.tolist() == [True, False, True]
    np.testing.assert_array_equal(found.basis[1], previous[1, :, ::-1])
    assert found.permutation[1].tolist() == list(range(10))
    assert np.isfinite(found.basis).all()


def test_without_a_previous_basis_a_broken_matrix_has_the_identity():
    found = solve(np.full((1, 3, 3), np.nan, np.float32))
    np.testing.assert_array_equal(found.basis[0], np.eye(3))
    assert not found.ok[0]


def test_it_runs_under_jit_and_keeps_float64():
    with jax.enable_x64(True):
        a = jnp.asarray(STACK, jnp.float64)
        found = solve(a)
        assert found.basis.dtype == jnp.float64
        assert orthonormal(found.basis) < 1e-13


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("method must be one of 'eigh', 'qr'", {"method": "svd"}),
        ("needs a previous basis", {"method": "qr"}),
        ("previous must have the shape", {"previous": np.eye(3)[None]}),
    ],
)
def test_wrong_arguments_are_refused_by_name(words, options):
    with pytest.raises(ValueError, match=words):
        roots.eigenbasis(STACK, **options)
