"""Products of symmetric matrices that commute, by one triangle."""

import jax
import jax.numpy as jnp

from jaxopt_suite.kernels.implementations import Impl, alike_varying, by_kernel, resolve


def symmetric_product(a: jax.Array, b: jax.Array, *, impl: Impl = "auto") -> jax.Array:
    """The products of two stacks of symmetric matrices that commute: these are symmetric too.

    Polynomials of one matrix commute, and those are what the iterations for matrix roots multiply.

    **The kernels**, for TPUs and for NVIDIA's Hopper GPUs, compute the tiles on and below the
    diagonal and write each of the others as the transpose of one. On TPUs a tile is 256 by 256: of
    1024 rows ten tiles of sixteen, of 256 rows all there is. On GPUs it is 128 by 128: thirty-six
    of sixty-four, and three of four. What they give is symmetric to the last bit, also where
    rounding has made the factors commute no longer: it is the lower triangle that counts. Of b they
    read rows for columns. Time on hardware: unmeasured. What the compilers say of them:
    ``docs/guides/kernels.md``.

    Sums and products are in float32 with ``Precision.HIGHEST``, as ``optimizers.roots.products``
    says why, or as accurate (``triangles_gpu``).

    Args:
      a: float32 ``[k, n, n]``; the definition takes float64 too.
      b: likewise.
      impl: see ``kernels.resolve``.

    Returns:
      ab, as a.

    Raises:
      ValueError, TypeError: for shapes that are not stacks of like squares, or dtypes that the
        kernels do not take.
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

    def on_tpu(a: jax.Array, b: jax.Array) -> jax.Array:
        from jaxopt_suite.kernels import triangles_tpu  # slow to import

        return triangles_tpu.symmetric("symmetric_product", a, b, contracted=2, impl=chosen)

    def on_gpu(a: jax.Array, b: jax.Array) -> jax.Array:
        from jaxopt_suite.kernels import triangles_gpu  # slow to import

        return triangles_gpu.symmetric("symmetric_product", a, b, contracted=2)

    return by_kernel("symmetric_product", on_tpu, chosen, *alike_varying(a, b), cuda=on_gpu)


def symmetric_product_definition(a: jax.Array, b: jax.Array) -> jax.Array:
    """What ``symmetric_product`` means, in plain JAX."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
