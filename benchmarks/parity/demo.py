"""DeMo against bloc97/DeMo, with one worker and with four.

The gradients of the harness are made different for every worker, so that workers send different
coefficients, some of them in common. The learning rate falls, as it enters in two places. Before
the sign the means of both sides are compared as numbers; after it, an entry within rounding of zero
would count as a difference of 2.
"""

import concurrent.futures
import contextlib
import itertools
import threading
import types
import unittest.mock
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.parity.compare import (
    LEARNING_RATE,
    STEPS,
    Case,
    Departure,
    Method,
    difference_of_updates,
)
from jaxopt_suite.optimizers.demo import demo

_AXIS = "worker"
# k is less than the vector's chunk: what is left of one that is sent whole is rounding alone, whose
# sign would be compared wherever the gradient is zero.
_SETTINGS = {
    "chunks of 64": {"decay": 0.999, "side": 64, "k": 16},
    "chunks of 8": {"decay": 0.9, "side": 8, "k": 4},
    "chunks of at most 12": {"decay": 0.99, "side": 12, "k": 6},
}
# What the official code does where it is not our default.
_OFFICIAL = {"pad": False, "rate_in_momentum": True, "dense": lambda path, leaf: False}

# (worker, common gradient, roll of an array along the output axis) -> the worker's own gradient.
_GradientOf = Callable[[Any, Any, Callable[..., Any]], Any]


def _rate(count: Any) -> Any:
    return LEARNING_RATE * (1.0 - 0.8 * count / STEPS)


def _mixed(worker: Any, gradient: Any, roll: Callable[..., Any]) -> Any:
    """What workers have in common, and something of their own."""
    return gradient + 0.5 * worker * roll(gradient, worker + 1)


def _first_only(worker: Any, gradient: Any, roll: Callable[..., Any]) -> Any:
    """Nothing but zeros on all workers but the first."""
    del roll
    return gradient * (worker == 0)


def _ours(
    workers: int, gradient_of: _GradientOf, weight_decay: float, **settings: Any
) -> optax.GradientTransformation:
    """Our side: a simulated fleet behind one transformation of the common gradient."""
    one = demo(_rate, weight_decay=weight_decay, axis_name=_AXIS, **{**_OFFICIAL, **settings})

    def init(params: Any) -> Any:
        stack = lambda x: jnp.broadcast_to(x, (workers, *x.shape))
        return jax.tree.map(stack, one.init(params))

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        # Ours are turned: the official output axis is the last one.
        roll = lambda x, by: jnp.roll(x, by, -1)

        def of_one(worker: jax.Array, state: Any) -> Any:
            own = jax.tree.map(lambda g: gradient_of(worker, g, roll), grads)
            return one.update(own, state, params)

        updates, state = jax.vmap(of_one, axis_name=_AXIS)(jnp.arange(workers), state)
        return jax.tree.map(lambda x: x[0], updates), state

    return optax.GradientTransformation(init, update)


class _Group:
    """One member of a process group whose processes are threads of this one."""

    def __init__(self, rank: int, barrier: threading.Barrier, sent: list[Any]) -> None:
        self._rank, self._barrier, self._sent = rank, barrier, sent

    def size(self) -> int:
        return len(self._sent)

    def all_gather(self, received: list[Any], tensor: Any) -> None:
        self._sent[self._rank] = tensor
        self._barrier.wait()
        for place, source in zip(received, self._sent, strict=True):
            place.copy_(source)
        self._barrier.wait()


def _all_gather(received: list[Any], tensor: Any, *, group: _Group, async_op: bool) -> Any:
    """In the place of ``torch.distributed.all_gather``: done when it returns."""
    del async_op
    group.all_gather(received, tensor)
    return types.SimpleNamespace(wait=lambda: None)


class _Fleet:
    """The official side: one official optimizer a worker, each with parameters of its own."""

    def __init__(
        self,
        official: Any,
        params: dict[str, Any],
        weight_decay: float,
        *,
        workers: int,
        gradient_of: _GradientOf,
        signed: bool,
        settings: dict[str, Any],
    ) -> None:
        self._official, self._signed, self._gradient_of = official, signed, gradient_of
        self._params, self._steps = list(params.values()), 0
        barrier, sent = threading.Barrier(workers, timeout=60), [None] * workers
        self._copies = [[p.detach().clone() for p in self._params] for _ in range(workers)]
        self._optimizers = [
            official.DeMo(
                [p.requires_grad_() for p in copies],
                lr=LEARNING_RATE,
                compression_decay=settings["decay"],
                compression_topk=settings["k"],
                compression_chunk=settings["side"],
                weight_decay=weight_decay,
                process_group=_Group(rank, barrier, sent),
            )
            for rank, copies in enumerate(self._copies)
        ]

    def step(self) -> None:
        torch = self._official.torch
        roll = lambda x, by: np.roll(x, int(by), 0)
        for worker, copies in enumerate(self._copies):
            for own, common in zip(copies, self._params, strict=True):
                own.data.copy_(common.data)
                gradient = self._gradient_of(np.float32(worker), common.grad.numpy(), roll)
                own.grad = torch.tensor(gradient)
        distributed = types.SimpleNamespace(all_gather=_all_gather)
        with contextlib.ExitStack() as stack:
            stack.enter_context(unittest.mock.patch.object(self._official, "dist", distributed))
            if not self._signed:
                keep = unittest.mock.patch.object(torch.Tensor, "sign_", lambda x: x)
                stack.enter_context(keep)
            with concurrent.futures.ThreadPoolExecutor(len(self._optimizers)) as threads:
                list(threads.map(self._step_of_one, self._optimizers))
        for common, *copies in zip(self._params, *self._copies, strict=True):
            if not all(torch.equal(copies[0], copy) for copy in copies):
                raise RuntimeError("the official workers' parameters have come apart")
            common.data.copy_(copies[0].data)
        self._steps += 1

    def _step_of_one(self, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = _rate(self._steps)
        optimizer.step()


def _case(
    official: Any, name: str, workers: int, *, signed: bool, gradient_of: _GradientOf = _mixed
) -> Case:
    settings = _SETTINGS[name]
    phi = "sign" if signed else "identity"

    def theirs(params: dict[str, Any], weight_decay: float) -> Any:
        return _Fleet(
            official,
            params,
            weight_decay,
            workers=workers,
            gradient_of=gradient_of,
            signed=signed,
            settings=settings,
        )

    count = "1 worker" if workers == 1 else f"{workers} workers"
    return Case(
        f"{count}, {name}{'' if signed else ', before the sign'}",
        {**settings, "workers": workers, "phi": phi, "pad": False, "rate_in_momentum": True},
        lambda weight_decay: _ours(workers, gradient_of, weight_decay, phi=phi, **settings),
        theirs,
        weight_decay=0.1,
    )


def _departures(official: Any) -> list[Departure]:
    signed = _case(official, "chunks of 8", 4, signed=True)
    uneven = _case(official, "chunks of at most 12", 4, signed=True)
    alone = _case(official, "chunks of 8", 4, signed=False, gradient_of=_first_only)

    def changed(case: Case, **settings: Any) -> float:
        given = {name: case.settings[name] for name in ("decay", "side", "k", "phi")}
        ours = _ours(4, _mixed, 0.0, **{**given, **settings})
        return difference_of_updates(case, ours).value

    return [
        Departure(
            "The momentum is a mean of gradients by default; the official code weighs them with "
            "the learning rate, so that a rate that falls makes older ones count more "
            "(rate_in_momentum=True). After the sign the figure is 2 where one entry differs.",
            lambda: changed(signed, rate_in_momentum=False),
        ),
        Departure(
            "Axes are padded to a multiple of the chunk's side by default; the official code takes "
            "their largest divisor instead (pad=False; figure: side 12).",
            lambda: changed(uneven, pad=True),
        ),
        Departure(
            "Small leaves and vectors are sent dense by default, as if k were the size of the "
            "chunk; the official code compresses them (a dense that is never true).",
            lambda: changed(signed, dense=None),
        ),
        Departure(
            "A leaf that is sent dense leaves an exact zero behind; the official code, where k is "
            "the size of the chunk, leaves the rounding errors of two transforms, and its sign "
            "makes full steps of them where the gradient is zero."
        ),
        Departure(
            "A zero is not a value sent. Where a chunk has fewer than k coefficients that are not "
            "zero, the official code sends zeros at arbitrary indices and divides what others "
            "sent there by one more (figure: all workers but one have no gradient).",
            lambda: difference_of_updates(alone).value,
        ),
        Departure(
            "The momentum is float32 and so is the transform; the official code has both in the "
            "parameters' dtype."
        ),
        Departure(
            "Scalars are vectors of one entry, and of leaves with more than two axes the last two "
            "are transformed; the official code fails on both."
        ),
        Departure(
            "Indices travel in 8, 12, 16 or 32 bits, all leaves in one all-gather; the official "
            "code sends int64 in two all-gathers a leaf."
        ),
    ]


def _build(official: Any) -> tuple[list[Case], list[Departure]]:
    cases = [
        _case(official, name, workers, signed=signed)
        for name, workers in itertools.product(_SETTINGS, (1, 4))
        for signed in (True, False)
    ]
    return cases, _departures(official)


METHOD = Method(
    name="demo",
    repository="bloc97/DeMo",
    marks=("demo.py", "0001-DeMo.patch"),
    packages=("torch", "einops"),
    module="demo.py",
    build=_build,
)
