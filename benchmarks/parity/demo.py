"""DeMo against bloc97/DeMo, with one worker and with four.

Workers' gradients differ, so that they send different coefficients, some of them in common. The
learning rate falls, as it enters in two places. Before the sign the means of both sides are
compared as numbers; after it, an entry within rounding of zero would count as a difference of 2.
"""

import contextlib
import itertools
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import optax

from benchmarks.parity import _fleet
from benchmarks.parity.compare import (
    LEARNING_RATE,
    STEPS,
    Case,
    Departure,
    Method,
    difference_of_updates,
)
from jaxopt_suite.optimizers.demo import demo

# k is less than the vector's chunk: what is left of one that is sent whole is rounding alone, whose
# sign would be compared wherever the gradient is zero.
_SETTINGS = {
    "chunks of 64": {"decay": 0.999, "side": 64, "k": 16},
    "chunks of 8": {"decay": 0.9, "side": 8, "k": 4},
    "chunks of at most 12": {"decay": 0.99, "side": 12, "k": 6},
}
# What the official code does where it is not our default.
_OFFICIAL = {"pad": False, "rate_in_momentum": True, "dense": lambda path, leaf: False}


def _rate(count: Any) -> Any:
    return LEARNING_RATE * (1.0 - 0.8 * count / STEPS)


def _first_only(worker: Any, gradient: Any, roll: Callable[..., Any]) -> Any:
    """Nothing but zeros on all workers but the first."""
    del roll
    return gradient * (worker == 0)


def _ours(
    workers: int, gradient_of: _fleet.GradientOf, weight_decay: float, **settings: Any
) -> optax.GradientTransformation:
    """Our side; the official output axis is the last one of ours."""
    one = demo(_rate, weight_decay=weight_decay, axis_name=_fleet.AXIS, **{**_OFFICIAL, **settings})
    return _fleet.ours(one, workers, output_axis=-1, gradient_of=gradient_of)


def _theirs(
    official: Any,
    params: dict[str, Any],
    weight_decay: float,
    *,
    workers: int,
    gradient_of: _fleet.GradientOf,
    signed: bool,
    settings: dict[str, Any],
) -> _fleet.Fleet:
    """The official side, if wanted without its last operation, the sign."""

    def member(distributed: _fleet.Distributed, own: list[Any]) -> Callable[[], None]:
        del distributed
        optimizer = official.DeMo(
            own,
            lr=LEARNING_RATE,
            compression_decay=settings["decay"],
            compression_topk=settings["k"],
            compression_chunk=settings["side"],
            weight_decay=weight_decay,
        )
        counts = itertools.count()

        def step() -> None:
            rate = _rate(next(counts))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

        return step

    @contextlib.contextmanager
    def around(distributed: _fleet.Distributed) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                distributed.in_place_of(official.dist, "all_gather", "get_world_size")
            )
            if not signed:
                keep = unittest.mock.patch.object(official.torch.Tensor, "sign_", lambda x: x)
                stack.enter_context(keep)
            yield

    return _fleet.Fleet(params, workers, member, around=around, gradient_of=gradient_of)


def _case(
    official: Any,
    name: str,
    workers: int,
    *,
    signed: bool,
    gradient_of: _fleet.GradientOf = _fleet.own_gradient,
) -> Case:
    settings = _SETTINGS[name]
    phi = "sign" if signed else "identity"

    def theirs(params: dict[str, Any], weight_decay: float) -> Any:
        return _theirs(
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
        ours = _ours(4, _fleet.own_gradient, 0.0, **{**given, **settings})
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
