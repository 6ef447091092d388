"""Pallas kernels, each beside its definition in plain JAX; ``impl=`` says which of them runs."""

from jaxopt_suite.kernels.adam8 import (
    Moments8,
    adam8_decode,
    adam8_numbers,
    adam8_update,
    adam8_zeros,
    check_adam8,
)
from jaxopt_suite.kernels.dct import Largest, dct_top_k, dct_top_k_takes
from jaxopt_suite.kernels.gram import gram_update
from jaxopt_suite.kernels.implementations import IMPLS, Impl, resolve
from jaxopt_suite.kernels.int8 import Encoded, int8_encode, int8_mean
from jaxopt_suite.kernels.signs import Signs, sign_encode, sign_mean, signs_take
from jaxopt_suite.kernels.symmetric import symmetric_product

__all__ = [
    "IMPLS",
    "Encoded",
    "Impl",
    "Largest",
    "Moments8",
    "Signs",
    "adam8_decode",
    "adam8_numbers",
    "adam8_update",
    "adam8_zeros",
    "check_adam8",
    "dct_top_k",
    "dct_top_k_takes",
    "gram_update",
    "int8_encode",
    "int8_mean",
    "resolve",
    "sign_encode",
    "sign_mean",
    "signs_take",
    "symmetric_product",
]
