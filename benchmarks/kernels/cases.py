"""What is compiled: each kernel at sizes at which it would be used."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxopt_suite import kernels


class Case(NamedTuple):
    """A function of arrays, to be compiled with and without its kernel."""

    kernel: str  # name of the public function
    what: str  # in words
    call: Callable[..., Any]  # takes the arrays, and ``impl``
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    donated: tuple[int, ...]


def all_cases() -> Iterator[Case]:
    """Every kernel's cases."""
    yield from _gram_updates()


def _gram_updates() -> Iterator[Case]:
    """Statistics of eight blocks, as Shampoo and SOAP keep them, of rows and of columns."""
    for size, dtype in ((1024, "float32"), (1024, "bfloat16"), (2048, "float32"), (768, "float32")):
        for mode in (0, 1):
            yield Case(
                "gram_update",
                f"8 blocks of {size} by {size}, {dtype}, of their {('rows', 'columns')[mode]}",
                functools.partial(kernels.gram_update, decay=0.95, weight=0.05, mode=mode),
                (_array(8, size, size), _array(8, size, size, dtype=dtype)),
                (0,),
            )


def _array(*shape: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def compiled(case: Case, impl: str, place: Sharding) -> Any:
    """The program of a case on the device of ``place``, which need not be here."""
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in case.arguments]
    call = functools.partial(case.call, impl=impl)
    return jax.jit(call, donate_argnums=case.donated).lower(*arguments).compile()
