"""The compressors by name: ``compressors.int8()``, ``compressors.top_k(fraction=0.01)``, ..."""

from jaxopt_suite.optimizers.compression.compressor import Compressor, identity
from jaxopt_suite.optimizers.compression.dct import dct_top_k
from jaxopt_suite.optimizers.compression.low_rank import low_rank
from jaxopt_suite.optimizers.compression.quantize import fp8, int4, int8
from jaxopt_suite.optimizers.compression.signs import sign, ternary
from jaxopt_suite.optimizers.compression.sparse import random_k, top_k

__all__ = [
    "Compressor",
    "dct_top_k",
    "fp8",
    "identity",
    "int4",
    "int8",
    "low_rank",
    "random_k",
    "sign",
    "ternary",
    "top_k",
]
