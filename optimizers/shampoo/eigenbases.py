"""Eigenbases of the modes of stacked blocks, and moments carried from one basis to the next."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import kernels
from jaxopt_suite.optimizers import roots
from jaxopt_suite.optimizers.shampoo import kronecker
from jaxopt_suite.optimizers.shampoo.batches import in_batches

Method = Literal["qr", "eigh"]
Modes = tuple[jax.Array | None, ...]  # [rows, di, di] for each mode; None for one left as it is


class Rotated(NamedTuple):
    """Moments of a stack of blocks ``[rows, d1, ..., dk]``, in a basis for each mode."""

    mu: jax.Array  # mu_dtype or wide [rows, d1, ..., dk]: first moment, in the bases
    nu: jax.Array  # wide [rows, d1, ..., dk]: second moment, in the bases
    factors: Modes  # wide: statistics
    bases: Modes  # wide: orthonormal columns
    failures: jax.Array  # int32 [rows, k]: how often in a row a basis could not be made


@dataclasses.dataclass(frozen=True)
class Bases:
    """How bases are kept.

    Attributes:
      decay: of the statistics.
      one_sided: of a matrix only the shorter dimension is rotated, the last of two equal ones.
      rotate_vectors: whether blocks of one dimension are rotated.
      gram_impl: how the statistics are updated, see ``kernels.gram_update``.
    """

    decay: jax.typing.ArrayLike
    one_sided: bool
    rotate_vectors: bool
    gram_impl: kernels.Impl = "auto"

    def init(self, shape: tuple[int, ...], dtype: Any, mu_dtype: Any) -> Rotated:
        """Moments of zero, no statistics, and bases that are the identity."""
        rows, *block = shape
        rotated = self._rotated(tuple(block))
        eye = lambda d: jnp.broadcast_to(jnp.eye(d, dtype=dtype), (rows, d, d))
        chosen = lambda make: tuple(
            make(d) if of_mode else None for d, of_mode in zip(block, rotated, strict=True)
        )
        return Rotated(
            mu=jnp.zeros(shape, mu_dtype),
            nu=jnp.zeros(shape, dtype),
            factors=chosen(lambda d: jnp.zeros((rows, d, d), dtype)),
            bases=chosen(eye),
            failures=jnp.zeros((rows, len(block)), jnp.int32),
        )

    def observe(self, old: Rotated, gradients: jax.Array, active: jax.Array) -> Rotated:
        """With the statistics of these gradients, if ``active`` (bool ``[]``)."""
        decay = jnp.where(active, self.decay, 1.0)
        weight = jnp.where(active, 1.0 - self.decay, 0.0)
        new = kronecker.observe(old.factors, gradients, decay, weight, self.gram_impl)
        return old._replace(factors=new)

    def refresh(self, due: dict[str, Rotated], *, method: Method) -> dict[str, Rotated]:
        """New bases for all that are given, and their moments in them.

        First moments are rotated; second moments, which are squares of coordinates, cannot be, and
        stay with the columns that they belong to. A basis that fails stays, with its moments.
        """
        places = {
            (name, mode): (factor, basis, part.failures[:, mode])
            for name, part in due.items()
            for mode, (factor, basis) in enumerate(zip(part.factors, part.bases, strict=True))
            if factor is not None and basis is not None
        }
        fresh = in_batches(functools.partial(_new_bases, method), places)
        result = {}
        for name, part in due.items():
            modes = [fresh.get((name, mode)) for mode in range(len(part.factors))]
            field = lambda key, modes=modes: tuple(m and m[key] for m in modes)
            result[name] = Rotated(
                mu=kronecker.multiply(part.mu, field("turn")).astype(part.mu.dtype),
                nu=_permuted(part.nu, field("permutation")),
                factors=field("factor"),
                bases=field("basis"),
                failures=jnp.stack(
                    [
                        part.failures[:, mode] if m is None else m["failures"]
                        for mode, m in enumerate(modes)
                    ],
                    axis=1,
                ),
            )
        return result

    def _rotated(self, block: tuple[int, ...]) -> tuple[bool, ...]:
        """Which modes of a block are."""
        if len(block) == 1:
            return (self.rotate_vectors,)
        if self.one_sided and len(block) == 2:
            return (block[0] < block[1], block[0] >= block[1])
        return (True,) * len(block)


def _new_bases(
    method: Method,
    kind: None,
    factors: jax.Array,
    bases: jax.Array,
    failures: jax.Array,
) -> dict[str, jax.Array]:
    """For matrices ``[n, d, d]`` of one size. A statistic that is not finite begins from zero."""
    del kind
    found = roots.eigenbasis(factors, previous=bases, method=method)
    finite = jnp.all(jnp.isfinite(factors), axis=(1, 2), keepdims=True)
    return {
        "factor": jnp.where(finite, factors, 0),
        "basis": found.basis,
        "turn": kronecker.products(bases, found.basis),
        "permutation": found.permutation,
        "failures": jnp.where(found.ok, 0, optax.safe_increment(failures)),
    }


def _permuted(nu: jax.Array, permutations: tuple[jax.Array | None, ...]) -> jax.Array:
    """Along every mode, the entries of each block in a new order, int32 ``[rows, di]``."""
    for axis, order in enumerate(permutations, start=1):
        if order is not None:
            shape = [len(order)] + [1] * (nu.ndim - 1)
            shape[axis] = order.shape[1]
            nu = jnp.take_along_axis(nu, order.reshape(shape), axis=axis)
    return nu
