"""Pallas kernels, each beside its definition in plain JAX; ``impl=`` says which of them runs."""

from jaxopt_suite.kernels.dct import Largest, dct_top_k, dct_top_k_takes
from jaxopt_suite.kernels.gram import gram_update
from jaxopt_suite.kernels.implementations import IMPLS, Impl, resolve
from jaxopt_suite.kernels.int8 import Encoded, int8_encode, int8_mean
from jaxopt_suite.kernels.signs import Signs, sign_encode, sign_mean, signs_take

__all__ = [
    "IMPLS",
    "Encoded",
    "Impl",
    "Largest",
    "Signs",
    "dct_top_k",
    "dct_top_k_takes",
    "gram_update",
    "int8_encode",
    "int8_mean",
    "resolve",
    "sign_encode",
    "sign_mean",
    "signs_take",
]
