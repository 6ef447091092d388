"""How many array elements the states of Shampoo and SOAP have: counted, nothing is made."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_suite.optimizers.shampoo import grafting
from jaxopt_suite.optimizers.shampoo.blocks import Cutting, Shape
from jaxopt_suite.optimizers.shampoo.rule import is_zero


def shampoo_elements(
    shapes: Sequence[Shape],
    *,
    b1: Any = 0.9,
    momentum: Any = 0.0,
    graft: grafting.Graft = "adam",
    block_size: int = 1024,
    merge_dims: bool = True,
    stack_multiple: int = 1,
    **_: Any,
) -> int:
    """Elements of Shampoo's state for parameters of these shapes.

    For each block: its moments; of each mode a statistic and a root, a weight and a counter of
    failures; a counter of skipped steps. The count of steps is left out.

    Args:
      shapes: of the parameters.
      b1: see ``scale_by_shampoo``, as all that follow; what else it takes is of no consequence.
      momentum: see there.
      graft: see there.
      block_size: see there.
      merge_dims: see there.
      stack_multiple: see there.
    """
    moments = (not is_zero(b1)) + (not is_zero(momentum)) + grafting.has_moment(graft)
    return sum(
        rows * (moments * math.prod(block) + 2 * sum(d * d + 1 for d in block) + 1)
        for rows, block in _stacks(shapes, Cutting(block_size, merge_dims, stack_multiple))
    )


def soap_elements(
    shapes: Sequence[Shape],
    *,
    block_size: int = 2048,
    merge_dims: bool = False,
    one_sided: bool = False,
    rotate_vectors: bool = False,
    stack_multiple: int = 1,
    **_: Any,
) -> int:
    """Elements of SOAP's state for parameters of these shapes.

    For each block: two moments; of each mode that is rotated a statistic and a basis, and of every
    mode a counter of failures; a counter of skipped steps. The count of steps is left out.

    Args:
      shapes: of the parameters.
      block_size: see ``scale_by_soap``, as all that follow; what else it takes is of no
        consequence.
      merge_dims: see there.
      one_sided: see there.
      rotate_vectors: see there.
      stack_multiple: see there.
    """

    def rotated(block: Shape) -> Shape:
        if len(block) == 1:
            return block if rotate_vectors else ()
        return (min(block),) if one_sided and len(block) == 2 else block

    return sum(
        rows * (2 * math.prod(block) + 2 * sum(d * d for d in rotated(block)) + len(block) + 1)
        for rows, block in _stacks(shapes, Cutting(block_size, merge_dims, stack_multiple))
    )


def _stacks(shapes: Sequence[Shape], cutting: Cutting) -> Iterator[tuple[int, Shape]]:
    """Rows of each stack, and the shape of a block in it."""
    blocks = cutting.blocks([jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    for name in blocks.rows:
        rows, *block = blocks.shape(name)
        yield rows, tuple(block)
