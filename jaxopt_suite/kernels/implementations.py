"""Which implementation of a kernel runs, and what every Pallas call of ours has in common."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
from jax.experimental.pallas import tpu as pltpu

from jaxopt_suite import core

Impl = Literal["auto", "xla", "pallas", "interpret"]
IMPLS = ("auto", "xla", "pallas", "interpret")

# What "auto" takes. A kernel stands here once its time on hardware has been measured and committed
# to benchmarks/results, and has beaten the compiler's. None has been run on hardware yet.
AUTO: Mapping[str, Literal["xla", "pallas"]] = {
    "dct_top_k": "xla",
    "gram_update": "xla",
    "int8_encode": "xla",
    "int8_mean": "xla",
    "sign_encode": "xla",
    "sign_mean": "xla",
}


def resolve(kernel: str, impl: Impl) -> Literal["xla", "pallas", "interpret"]:
    """The implementation that ``impl`` stands for.

    Args:
      kernel: the name of its public function.
      impl: ``"xla"``: the definition, left to the compiler. ``"pallas"``: the kernel, on the
        hardware it is written for. ``"interpret"``: the kernel, interpreted on a CPU: for tests.
        ``"auto"``: the faster one of the first two by the table of this file.

    Raises:
      ValueError: if ``impl`` is none of these.
    """
    core.check_choice("impl", impl, IMPLS)
    return AUTO[kernel] if impl == "auto" else impl


def interpreter(impl: str) -> Any:
    """The argument ``interpret`` of a ``pallas_call``.

    The interpreter simulates a TPU: memory that was not written is NaN, reads beyond an array are
    errors, and it runs inside ``shard_map``, where ``interpret=True`` does not.
    """
    return pltpu.InterpretParams() if impl == "interpret" else False


def tpu_parameters(impl: str, *semantics: Any, **others: Any) -> pltpu.CompilerParams | None:
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


def alike_varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, all varying over the mesh axes that any of them varies over.

    Inside a ``shard_map`` the operands of a ``pallas_call`` must agree in this.
    """
    axes = frozenset[str]().union(*map(core.varying_axes, arrays))
    return core.vary(arrays, sorted(axes))


def struct_like(shape: Iterable[int], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """An output of a ``pallas_call`` that varies over the mesh axes that ``like`` varies over."""
    varying = jax.sharding.ManualAxisType(varying=core.varying_axes(like))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=varying)
