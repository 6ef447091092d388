"""Which implementation of a kernel runs, and what every Pallas call of ours has in common."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.extend.core
from jax.interpreters import batching, mlir

from jaxopt_suite import core

Impl = Literal["auto", "xla", "pallas", "interpret"]
IMPLS = ("auto", "xla", "pallas", "interpret")

# Of the kernels for GPUs: a row fills a warp, and the copy engine takes 256 entries of one at most.
GPU_BLOCKS = (128, 256)

# What "auto" takes. A kernel stands here once its time on hardware has been measured and committed
# to benchmarks/results, and has beaten the compiler's. None has been run on hardware yet.
AUTO: Mapping[str, Literal["xla", "pallas"]] = {
    "adam8_update": "xla",
    "dct_top_k": "xla",
    "gram_update": "xla",
    "int8_encode": "xla",
    "int8_mean": "xla",
    "sign_encode": "xla",
    "sign_mean": "xla",
    "symmetric_product": "xla",
}


def resolve(kernel: str, impl: Impl) -> Literal["xla", "pallas", "interpret"]:
    """The implementation that ``impl`` stands for.

    Args:
      kernel: the name of its public function.
      impl: ``"xla"``: the definition, left to the compiler. ``"pallas"``: the kernel for the
        platform that the program is compiled for; an error where there is none.
        ``"interpret"``: the kernel for TPUs, interpreted on a CPU: for tests. ``"auto"``: the
        faster one of the first two by the table of this file.

    Raises:
      ValueError: if ``impl`` is none of these.
    """
    core.check_choice("impl", impl, IMPLS)
    return AUTO[kernel] if impl == "auto" else impl


def by_platform(
    what: str,
    *operands: jax.Array,
    tpu: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> Any:
    """What the kernel gives that is written for the platform.

    Which one it is, is known when a program is compiled and not when it is traced: every kernel is
    traced, and the others are then dropped.

    Args:
      what: the kernel, and the arguments on which it depends whether there is one.
      *operands: what the kernels take.
      tpu: the kernel for TPUs.
      cuda: the kernel for NVIDIA GPUs, with results of the same types.

    Raises:
      NotImplementedError: when compiled for a platform without a kernel.
    """

    def elsewhere(first: jax.Array, *others: jax.Array) -> Any:
        return tpu(_refused.bind(first, what=what), *others)

    kernels = {"tpu": tpu} if cuda is None else {"tpu": tpu, "cuda": cuda}
    return jax.lax.platform_dependent(*operands, default=elsewhere, **kernels)


def by_kernel(
    what: str,
    kernel: Callable[..., Any],
    impl: str,
    *operands: jax.Array,
    cuda: Callable[..., Any] | None = None,
) -> Any:
    """What a kernel gives: interpreted, or ``by_platform``.

    Args:
      what: see ``by_platform``.
      kernel: for TPUs; takes the operands.
      impl: as ``resolve`` gives it, not ``"xla"``.
      *operands: what the kernels take.
      cuda: see ``by_platform``. What is slow to import is best imported in it.
    """
    if impl == "interpret":
        return kernel(*operands)
    return by_platform(what, *operands, tpu=kernel, cuda=cuda)


def _refuse(context: mlir.LoweringRuleContext, x: Any, *, what: str) -> Any:
    platforms = context.module_context.platforms
    raise NotImplementedError(
        f"there is no Pallas kernel of {what} for the platform {', '.join(platforms)!r}; "
        "impl='xla' runs on all of them"
    )


# The identity, of which no platform has a program.
_refused = jax.extend.core.Primitive("no_kernel")
_refused.def_abstract_eval(lambda x, *, what: x)
_refused.def_impl(lambda x, *, what: jax.jit(functools.partial(_refused.bind, what=what))(x))
batching.defvectorized(_refused)
mlir.register_lowering(_refused, _refuse)


def without_own(body: Callable[..., None]) -> Callable[..., None]:
    """The body of a mean with ``None`` in the place of ``own``, its fourth operand."""
    return lambda owner, messages, scales, *others: body(owner, messages, scales, None, *others)


def alike_varying(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, all varying over the mesh axes that any of them varies over.

    Inside a ``shard_map`` the operands of a ``pallas_call`` must agree in this.
    """
    return vary_as(arrays, *arrays)


def vary_as(found: Any, *arrays: jax.Array) -> Any:
    """A tree of arrays, all varying over the mesh axes that any of the others varies over."""
    axes = frozenset[str]().union(*map(core.varying_axes, arrays))
    return core.vary(found, sorted(axes))


def struct_like(shape: Iterable[int], dtype: Any, like: jax.Array) -> jax.ShapeDtypeStruct:
    """An output of a ``pallas_call`` that varies over the mesh axes that ``like`` varies over."""
    varying = jax.sharding.ManualAxisType(varying=core.varying_axes(like))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=varying)
