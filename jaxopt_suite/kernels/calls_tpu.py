"""What every Pallas call for TPUs has in common."""

from typing import Any

from jax.experimental.pallas import tpu as pltpu


def interpreter(impl: str) -> Any:
    """The argument ``interpret`` of a ``pallas_call``.

    The interpreter simulates a TPU: memory that was not written is NaN, reads beyond an array are
    errors, and it runs inside ``shard_map``, where ``interpret=True`` does not.
    """
    return pltpu.InterpretParams() if impl == "interpret" else False


def parameters(impl: str, *semantics: Any, **others: Any) -> pltpu.CompilerParams | None:
    """The argument ``compiler_params``; of the interpreter, which has no use for them, none.

    Under ``vmap`` a grid has one dimension more, and the interpreter of JAX 0.10.2 expects none.

    Args:
      impl: as ``resolve`` gives it.
      *semantics: ``"parallel"`` or ``"arbitrary"`` for each dimension of the grid.
      **others: of ``CompilerParams``.
    """
    if impl == "interpret":
        return None
    return pltpu.CompilerParams(dimension_semantics=semantics, **others)
