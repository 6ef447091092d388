"""Shampoo on stacks of blocks."""

from jaxopt_suite.optimizers.shampoo.rule import ScaleByShampooState
from jaxopt_suite.optimizers.shampoo.shampoo import scale_by_shampoo, shampoo

__all__ = ["ScaleByShampooState", "scale_by_shampoo", "shampoo"]
