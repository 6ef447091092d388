"""Kernels timed on the hardware they were written for, each beside XLA's program of the same.

Calls follow each other without waiting, so that what is least is the time that a call takes to be
sent to the device, some tens of microseconds: of smaller sizes the times say that and no more.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import _results
from jaxopt_suite import kernels
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.parallel.chips import CHIPS, Chip

WORKERS = 8  # whose messages are averaged
SIDE = 1024  # of the blocks whose Gram matrices are added up
SIZES = tuple(2**power for power in range(16, 29, 2))
CALLS, ROUNDS = 20, 7

# What JAX calls a chip. Those of NVIDIA have their memory in the name too: "NVIDIA H100 80GB HBM3".
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


class Timed(NamedTuple):
    """A kernel at one size."""

    kernel: str  # name of the public function
    entries: int  # of one message, or of all blocks
    call: Callable[..., Any]  # takes the arrays, and ``impl``
    arguments: tuple[Any, ...]  # shapes and dtypes
    again: bool  # whether what it gives takes the place of its first argument, and the memory


def measure(
    names: Sequence[str] = (),
    *,
    sizes: Sequence[int] = SIZES,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, Any]]:
    """A row for every kernel and size; where a kernel is missing, with ``None`` in its place.

    Args:
      names: of kernels; none: all.
      sizes: entries of a message, or of all blocks together.
      clock: seconds.

    Raises:
      UserError: on a CPU, on a chip that ``parallel.chips`` has not, for a kernel there is not.
    """
    known = list(dict.fromkeys(case.kernel for case in _cases(SIZES)))
    _results.check_names("kernel to time", names, known)
    chip = _chip(jax.devices()[0])
    for case in _cases(sizes):
        if not names or case.kernel in names:
            programs = {impl: _program(case, impl) for impl in ("xla", "pallas")}
            there = {impl: program for impl, program in programs.items() if program is not None}
            seconds = {impl: _seconds(case, program, clock) for impl, program in there.items()}
            row = _row(case, chip, seconds)
            row["difference"] = _difference(case, programs) if "pallas" in there else None
            print(_line(row), flush=True)
            yield row


def _cases(sizes: Sequence[int]) -> Iterator[Timed]:
    for n in sizes:
        yield from _messages(n)
        yield _adam8(n)
        if n >= SIDE**2:
            blocks = _array(n // SIDE**2, SIDE, SIDE)
            gram = functools.partial(kernels.gram_update, decay=0.95, weight=0.05)
            yield Timed("gram_update", n, gram, (blocks, blocks), True)
            yield Timed("symmetric_product", n, kernels.symmetric_product, (blocks, blocks), True)


def _messages(n: int) -> Iterator[Timed]:
    """What is sent of n entries, and what is made of the messages of all workers."""
    shape = n // SIDE, SIDE
    scales = _array(WORKERS, n // 256)
    yield Timed("int8_encode", n, kernels.int8_encode, (_array(*shape),), False)
    mean = functools.partial(kernels.int8_mean, shape=shape)
    yield Timed("int8_mean", n, mean, (_array(WORKERS, n, dtype=jnp.int8), scales), False)
    yield Timed("sign_encode", n, kernels.sign_encode, (_array(*shape),), False)
    mean = functools.partial(kernels.sign_mean, shape=shape)
    bits = _array(WORKERS, n // 8, dtype=jnp.uint8)
    yield Timed("sign_mean", n, mean, (bits, scales), False)
    largest = functools.partial(kernels.dct_top_k, k=32, sides=(64, 64))
    yield Timed("dct_top_k", n, largest, (_array(*shape),), False)


def _adam8(n: int) -> Timed:
    """A step; what it gives takes the place of all that it was given."""

    def update(old: tuple[jax.Array, ...], *, impl: Any) -> tuple[jax.Array, ...]:
        numbers = kernels.adam8_numbers(0.9, 0.999, 1e-8, (0.1, 0.001))
        direction, new = kernels.adam8_update(
            old[0], kernels.Moments8(*old[1:]), numbers, impl=impl
        )
        return direction, *new

    shape = n // SIDE, SIDE
    codes, scales = _array(*shape, dtype=jnp.uint8), _array(shape[0], SIDE // 256)
    return Timed("adam8_update", n, update, ((_array(*shape), codes, scales, codes, scales),), True)


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _chip(device: Any) -> Chip:
    if device.platform == "cpu":
        raise UserError("kernels are timed on a TPU or a GPU, and JAX has only 'cpu' here")
    kind = device.device_kind
    name = _KINDS.get(kind) or _KINDS.get(" ".join(kind.split()[:2]))
    if name is None:
        raise UserError(f"{kind!r} is none of the chips that can be timed: {', '.join(_KINDS)}")
    return CHIPS[name]


def _program(case: Timed, impl: Any) -> Any:
    """Compiled; none where there is no such kernel."""
    call = functools.partial(case.call, impl=impl)
    try:
        lowered = jax.jit(call, donate_argnums=(0,) * case.again).lower(*case.arguments)
    except NotImplementedError:
        return None
    return lowered.compile()


def _seconds(case: Timed, program: Any, clock: Callable[[], float]) -> float:
    """Of one call among many that follow each other."""
    arguments = _filled(case)

    def calls() -> None:
        for _ in range(CALLS):
            found = program(*arguments)
            if case.again:
                arguments[0] = found
        jax.block_until_ready(found)

    calls()  # not counted: the first ones find nothing warm
    return _of_one(calls, clock) / CALLS


def _of_one(run: Callable[[], None], clock: Callable[[], float]) -> float:
    """The median time of a few runs."""
    times = []
    for _ in range(ROUNDS):
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times)


def _difference(case: Timed, programs: dict[str, Any]) -> float:
    """The largest between the two programs' results, over the largest magnitude of one of them."""
    run = lambda program: jax.tree.leaves(program(*_filled(case)))
    found, expected = run(programs["pallas"]), run(programs["xla"])
    relative = lambda a, b: jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))
    pairs = zip(found, expected, strict=True)
    return max(float(relative(a.astype("float32"), b.astype("float32"))) for a, b in pairs)


def _filled(case: Timed) -> list[Any]:
    """Any numbers will do; these take no memory to draw."""

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        dtype = jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
        places = jax.lax.broadcasted_iota(dtype, x.shape, len(x.shape) - 1)
        return jnp.sin(places).astype(x.dtype) if dtype == jnp.float32 else places

    return [jax.tree.map(fill, x) for x in case.arguments]


def _row(case: Timed, chip: Chip, seconds: dict[str, float]) -> dict[str, Any]:
    """Times, and the fraction of the chip's memory bandwidth that is reached.

    Of the bytes only those count that any program moves: each argument read and each result written
    once.
    """
    results = jax.eval_shape(functools.partial(case.call, impl="xla"), *case.arguments)
    arrays = jax.tree.leaves((case.arguments, results))
    least = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    bandwidth = chip.hbm_bandwidth / chip.devices
    row = {"kernel": case.kernel, "entries": case.entries, "chip": chip.name, "least_bytes": least}
    figures = lambda s: {"us": 1e6 * s, "of_bandwidth": least / s / bandwidth}
    return row | {"pallas": None} | {impl: figures(s) for impl, s in seconds.items()}


def _line(row: dict[str, Any]) -> str:
    parts = [f"{row['chip']} {row['kernel']:12s} {row['entries']:10d} entries"]
    for impl in ("xla", "pallas"):
        found = row[impl]
        figures = found and f"{found['us']:9.1f} us, {found['of_bandwidth']:4.0%} of bandwidth"
        parts.append(f"{impl}: {figures or 'none'}")
    return "  ".join(parts)
