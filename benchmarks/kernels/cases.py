"""What is compiled: each kernel at sizes at which it would be used."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jaxopt_suite import kernels
from jaxopt_suite.optimizers.compression import compressors


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
    yield from _symmetric_products()
    yield from _int8_messages()
    yield from _adam8_updates()
    yield from _coefficients()
    yield from _signs()


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


def _symmetric_products() -> Iterator[Case]:
    """What an iteration for the roots of eight statistics multiplies."""
    for size in (1024, 2048):
        stack = _array(8, size, size)
        what = f"8 pairs of {size} by {size}"
        yield Case("symmetric_product", what, kernels.symmetric_product, (stack, stack), ())


def _int8_messages() -> Iterator[Case]:
    """A matrix with error feedback, and eight workers' messages of it."""
    shape, workers = (2048, 8192), 8
    size = shape[0] * shape[1]
    yield _with_residual("int8_encode", compressors.int8, shape)
    yield Case(
        "int8_mean",
        f"{workers} messages of {shape[0]} by {shape[1]}; of XLA's loop one round counted",
        functools.partial(kernels.int8_mean, shape=shape),
        (_array(workers, size, dtype="int8"), _array(workers, size // 256)),
        (),
    )


def _adam8_updates() -> Iterator[Case]:
    """Adam's step for one matrix with moments of 8 bits; a width of whole blocks, and another."""

    def update(g: jax.Array, *moments: jax.Array, impl: Any) -> Any:
        numbers = kernels.adam8_numbers(0.9, 0.999, 1e-8, (0.1, 0.001))
        return kernels.adam8_update(g, kernels.Moments8(*moments), numbers, impl=impl)

    for shape, dtype in (
        ((2048, 8192), "float32"),
        ((2048, 8192), "bfloat16"),
        ((1000, 1376), "float32"),
    ):
        codes, scales = _array(*shape, dtype="uint8"), _array(shape[0], -(-shape[1] // 256))
        yield Case(
            "adam8_update",
            f"{shape[0]} by {shape[1]}, {dtype} gradient",
            update,
            (_array(*shape, dtype=dtype), codes, scales, codes, scales),
            tuple(range(5)),
        )


def _coefficients() -> Iterator[Case]:
    """A matrix with what DeMo or error feedback keeps of it, and 32 coefficients a chunk."""
    yield _with_residual("dct_top_k", compressors.dct_top_k, (2048, 8192))


def _signs() -> Iterator[Case]:
    """The same of signs in blocks, as of codes of 8 bits."""
    shape, workers = (2048, 8192), 8
    size = shape[0] * shape[1]
    make = functools.partial(compressors.sign, block=256)
    yield _with_residual("sign_encode", make, shape)
    yield Case(
        "sign_mean",
        f"{workers} messages of {shape[0]} by {shape[1]}; of XLA's loop one round counted",
        functools.partial(kernels.sign_mean, shape=shape),
        (_array(workers, size // 8, dtype="uint8"), _array(workers, size // 256)),
        (),
    )


def _with_residual(kernel: str, make: Callable[..., Any], shape: tuple[int, int]) -> Case:
    """A matrix and its residual encoded, and the new residual."""

    def encode(x: jax.Array, residual: jax.Array, impl: str) -> Any:
        codec, message = make(impl=impl), x + residual
        if codec.encode_decoded is None:
            payload = codec.encode(message, None)
            return payload, message - codec.decode(payload, message)
        payload, decoded = codec.encode_decoded(message, None)
        return payload, message - decoded

    what = f"{shape[0]} by {shape[1]} and its residual"
    return Case(kernel, what, encode, (_array(*shape), _array(*shape)), (1,))


def _array(*shape: int, dtype: Any = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def compiled(case: Case, impl: str, place: Sharding) -> Any:
    """The program of a case on the device of ``place``, which need not be here."""
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in case.arguments]
    call = functools.partial(case.call, impl=impl)
    return jax.jit(call, donate_argnums=case.donated).lower(*arguments).compile()
