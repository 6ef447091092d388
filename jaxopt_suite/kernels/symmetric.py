"""Products of symmetric matrices that commute, by one triangle."""

import functools

import jax
import jax.numpy as jnp

from jaxopt_suite.kernels import triangles
from jaxopt_suite.kernels.implementations import Impl, alike_varying, by_kernel, resolve


def symmetric_product(a: jax.Array, b: jax.Array, *, impl: Impl = "auto") -> jax.Array:
    """The products of two stacks of symmetric matrices that commute: these are symmetric too.

    Polynomials of one matrix commute, and those are what the iterations for matrix roots multiply.

    **The kernel**, for TPUs, computes the tiles of 256 by 256 on and below the diagonal and writes
    each of the others as the transpose of one: of 1024 rows ten tiles of sixteen, of 256 rows all
    there is. What it gives is symmetric to the last bit, also where rounding has made the factors
    commute no longer: it is the lower triangle that counts. Of b it reads rows for columns. Time
    on hardware: unmeasured. What the compiler says of it: ``docs/guides/kernels.md``.

    Sums and products are in float32 with ``Precision.HIGHEST``, as ``optimizers.roots.products``
    says why.

    Args:
      a: float32 ``[k, n, n]``; the definition takes float64 too.
      b: likewise.
      impl: see ``kernels.resolve``.

    Returns:
      ab, as a.

    Raises:
      ValueError, TypeError: for shapes that are not stacks of like squares, or dtypes that the
        kernel does not take.
      NotImplementedError: see ``kernels.resolve``.
    """
    if a.ndim != 3 or a.shape[1] != a.shape[2] or a.shape != b.shape:
        raise ValueError(f"a and b must be stacks [k, n, n] alike, got {a.shape} and {b.shape}")
    chosen = resolve("symmetric_product", impl)
    if chosen == "xla" or a.size == 0:
        return symmetric_product_definition(a, b)
    for name, x in (("a", a), ("b", b)):
        if x.dtype != jnp.float32:
            raise TypeError(
                f"the kernel takes {name} of float32, got {x.dtype}; impl='xla' takes others"
            )
    kernel = functools.partial(triangles.symmetric, "symmetric_product", contracted=2, impl=chosen)
    return by_kernel("symmetric_product", kernel, chosen, *alike_varying(a, b))


def symmetric_product_definition(a: jax.Array, b: jax.Array) -> jax.Array:
    """What ``symmetric_product`` means, in plain JAX."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
