"""Orthonormal eigenbases that follow a slowly changing matrix, for methods that work in them."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxopt_suite import core
from jaxopt_suite.optimizers.roots.panels import panel_qr
from jaxopt_suite.optimizers.roots.products import distance_to_identity, product, symmetric_part
from jaxopt_suite.optimizers.roots.spectral import decompose
from jaxopt_suite.optimizers.roots.stack import cleaned, inside_of, times_power_of_two

_ORTHONORMAL = 1e-2  # float32 gives 1e-6 to 1e-5; more than this is no basis


class Eigenbasis(NamedTuple):
    """Bases of a stack of matrices; each is orthonormal, whatever the matrix was."""

    basis: jax.Array  # f32 or f64 [k, b, b]: eigenvectors in columns, the identity in the padding
    eigenvalues: jax.Array  # same dtype [k, b]: estimates in descending order, 0 in the padding
    permutation: jax.Array  # int32 [k, b]: column j continues the previous column permutation[j]
    ok: jax.Array  # bool [k]: whether the basis is new; else it is the previous one


def eigenbasis(
    matrices: jax.Array,
    *,
    previous: jax.Array | None = None,
    method: Literal["eigh", "qr"] = "eigh",
    sizes: jax.Array | None = None,
) -> Eigenbasis:
    r"""Eigenvectors of each matrix, or a step towards them from the previous ones.

    ``"eigh"`` decomposes. ``"qr"`` is a step of orthogonal iteration, as in SOAP: with the previous
    basis Q, estimates $e = \mathrm{diag}(Q^T A Q)$ and π that sorts them in descending order,

    $$Q \leftarrow \mathrm{qr}\left(A\, Q_{:,\pi}\right).$$

    **What follows the basis.** Quantities by column, as a second moment in the basis, are carried
    over by ``v[permutation]``; they are not rotated, as in SOAP. Vectors are rotated: a moment m in
    the previous coordinates becomes $Q_{new}^T Q_{old}\, m$. The permutation is π with both
    methods, so that after a decomposition too the quantity of the i-th largest estimate goes to the
    i-th eigenvector; without ``previous`` it is that of no change.

    **Signs** are chosen so that nothing depends on a library's: of a column that follows another
    one, so that their product with A is positive (QR) or their own product is (eigh); without a
    previous basis, so that the largest entry is positive.

    A matrix that is not finite, or a basis that is not orthonormal to 1e-2, leaves the previous
    basis (the identity, if there is none) and the permutation of no change, with ``ok`` false.

    Departures from the official code (nikhilvyas/SOAP): in a step of QR, A gets a multiple of the
    identity of the size of its own rounding (its largest entry times b times the dtype's epsilon),
    so that columns of a null space stay what they were, where the official ones become rounding
    noise; the signs of the official step are those of its QR.

    Args:
      matrices: real floating ``[k, b, b]``, positive semidefinite; the symmetric part counts.
      previous: ``[k, b, b]``, orthonormal, the identity in the padding. ``"qr"`` needs it.
      method: ``"eigh"`` or ``"qr"``.
      sizes: as for ``inverse_root``; the padding's columns come last and stay the identity's.

    Returns:
      An ``Eigenbasis``.

    Raises:
      TypeError, ValueError: for a wrong argument, or if ``"qr"`` has no previous basis.

    References:
      Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024, arXiv:2409.11321.
    """
    core.check_choice("method", method, ("eigh", "qr"))
    inside = inside_of(matrices, sizes)
    if previous is None and method == "qr":
        raise ValueError('method="qr" needs a previous basis, got previous=None')
    if previous is not None and jnp.shape(previous) != jnp.shape(matrices):
        raise ValueError(
            f"previous must have the shape of matrices, {jnp.shape(matrices)}, "
            f"got {jnp.shape(previous)}"
        )
    scaled, exponent, finite = cleaned(matrices, inside)
    scaled = symmetric_part(scaled)
    start = None if previous is None else jnp.asarray(previous, scaled.dtype)
    found = (
        _decomposed(scaled, inside, start)
        if start is None or method == "eigh"
        else (_stepped(scaled, inside, start))
    )
    found = found._replace(eigenvalues=times_power_of_two(found.eigenvalues, exponent))
    return _guarded(found, finite, start)


def _decomposed(a: jax.Array, inside: jax.Array, previous: jax.Array | None) -> Eigenbasis:
    values, vectors = decompose(a, inside)
    if previous is None:
        largest = jnp.argmax(jnp.abs(vectors), axis=1, keepdims=True)
        along = jnp.take_along_axis(vectors, largest, axis=1)[:, 0]
        permutation = _no_change(a)
    else:
        permutation, ordered, _, _ = _sorted_columns(a, inside, previous)
        along = jnp.sum(vectors * ordered, axis=1)
    return _basis(vectors, jnp.where(inside, values, 0), permutation, along)


def _stepped(a: jax.Array, inside: jax.Array, previous: jax.Array) -> Eigenbasis:
    permutation, ordered, image, values = _sorted_columns(a, inside, previous)
    size = jnp.sum(inside, axis=1, keepdims=True).astype(a.dtype)
    shift = size * jnp.finfo(a.dtype).eps  # the largest entry of A is of order one here
    image += jnp.where(inside, shift, 1)[:, :, None] * ordered
    vectors, along = core.batch_factorisation(_orthonormal, tpu=panel_qr)(image)
    return _basis(vectors, values, permutation, along)


def _orthonormal(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q of ``matrix = QR``, and the diagonal of R."""
    vectors, triangle = jnp.linalg.qr(matrix)
    return vectors, jnp.diagonal(triangle)


def _sorted_columns(
    a: jax.Array, inside: jax.Array, basis: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What sorts the columns by ``diag(Q^T A Q)``, Q and AQ so sorted, and these estimates."""
    image = product(a, basis)
    estimate = jnp.sum(basis * image, axis=1)
    keys = jnp.where(inside, -estimate, jnp.inf)  # the padding last, and equal ones as they were
    permutation = jnp.argsort(keys, axis=1, stable=True).astype(jnp.int32)
    along = permutation[:, None, :]
    ordered, image = (jnp.take_along_axis(x, along, axis=2) for x in (basis, image))
    values = jnp.take_along_axis(estimate, permutation, axis=1)
    return permutation, ordered, image, jnp.where(inside, values, 0)


def _basis(
    vectors: jax.Array, values: jax.Array, permutation: jax.Array, along: jax.Array
) -> Eigenbasis:
    signs = jnp.where(along < 0, -1, 1).astype(vectors.dtype)
    product_with_itself = product(jnp.swapaxes(vectors, 1, 2), vectors)
    good = distance_to_identity(product_with_itself) < _ORTHONORMAL  # false for NaN
    return Eigenbasis(vectors * signs[:, None, :], values, permutation, good)


def _guarded(found: Eigenbasis, finite: jax.Array, previous: jax.Array | None) -> Eigenbasis:
    ok = found.ok & finite
    kept = jnp.eye(found.basis.shape[-1], dtype=found.basis.dtype) if previous is None else previous
    return Eigenbasis(
        basis=jnp.where(ok[:, None, None], found.basis, kept),
        eigenvalues=jnp.where(ok[:, None], found.eigenvalues, 0),
        permutation=jnp.where(ok[:, None], found.permutation, _no_change(found.basis)),
        ok=ok,
    )


def _no_change(matrices: jax.Array) -> jax.Array:
    """The permutation that moves nothing, int32 ``[k, b]``."""
    k, b = matrices.shape[:2]
    return jnp.broadcast_to(jnp.arange(b, dtype=jnp.int32), (k, b))
