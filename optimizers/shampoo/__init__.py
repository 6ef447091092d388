"""Shampoo and SOAP, on stacks of blocks."""

from jaxopt_suite.optimizers.shampoo.rule import ScaleByShampooState
from jaxopt_suite.optimizers.shampoo.shampoo import scale_by_shampoo, shampoo
from jaxopt_suite.optimizers.shampoo.soap import ScaleBySoapState, scale_by_soap, soap

__all__ = [
    "ScaleByShampooState",
    "ScaleBySoapState",
    "scale_by_shampoo",
    "scale_by_soap",
    "shampoo",
    "soap",
]
