"""Pallas kernels, each beside its definition in plain JAX; ``impl=`` says which of them runs."""

from jaxopt_suite.kernels.adam8 import (
    Moments8,
    adam8_decode,
    adam8_numbers,
    adam8_update,
    adam8_zeros,
    check_adam8,
)
from jaxopt_suite.kernels.gram import gram_update
from jaxopt_suite.kernels.implementations import IMPLS, Impl, resolve
from jaxopt_suite.kernels.int8 import Encoded, int8_encode, int8_mean

__all__ = [
    "IMPLS",
    "Encoded",
    "Impl",
    "Moments8",
    "adam8_decode",
    "adam8_numbers",
    "adam8_update",
    "adam8_zeros",
    "check_adam8",
    "gram_update",
    "int8_encode",
    "int8_mean",
    "resolve",
]
