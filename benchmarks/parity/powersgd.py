"""PowerSGD against the paper's code in epfml/powersgd, with four workers."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.parity import _fleet
from benchmarks.parity.compare import (
    LEARNING_RATE,
    SHAPES,
    Case,
    Departure,
    Method,
    difference_of_updates,
)
from jaxopt_suite.optimizers import powersgd

WORKERS = 4
_MOMENTUM = 0.9
# What the official code does where it is not our default.
_OFFICIAL = {"coupled_decay": True, "dense": lambda path, leaf: jnp.ndim(leaf) < 2}


def _one(rank: int, weight_decay: float, **settings: Any) -> Any:
    return powersgd(
        LEARNING_RATE,
        _MOMENTUM,
        weight_decay,
        axis_name=_fleet.AXIS,
        rank=rank,
        **{**_OFFICIAL, **settings},
    )


def _ours(rank: int, weight_decay: float, **settings: Any) -> optax.GradientTransformation:
    return _fleet.ours(_one(rank, weight_decay, **settings), WORKERS, output_axis=0)


class _Feed:
    """What our step starts from, for the official side to start from.

    Orthogonalisation enlarges rounding where columns are nearly dependent, and Q and the errors
    hand it on from step to step.

    Attributes:
      every_step: or only the first Q.
      factors: Q of every matrix, in the order in which the official side comes to them.
      errors: of every leaf, ``[workers, ...]``.
    """

    def __init__(self, rank: int, *, every_step: bool) -> None:
        self.every_step = every_step
        zeros = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
        state = _ours(rank, 0.0).init(zeros)
        self._first = self._next = self._of(state)
        self.factors, self.errors = self._first

    @staticmethod
    def _of(state: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
        (factors,), (errors,) = state[0].factors, state[0].local
        matrices = [name for name, shape in SHAPES.items() if len(shape) == 2]
        return (
            [np.array(factors[name][0]).T for name in matrices],
            [np.array(errors[name]) for name in matrices],
        )

    @contextlib.contextmanager
    def __call__(self, state: Any) -> Iterator[None]:
        """Called with our state after each step; its count tells where a run begins."""
        begins = int(np.max(state[0].count)) == 1
        self.factors, self.errors = self._first if begins else self._next
        self._next = self._of(state)
        yield


def _reducer(official: Any, distributed: _fleet.Distributed, rank: int, feed: _Feed) -> Any:
    """Their reducer, without the gigabyte of random numbers it starts with; Q is ours."""

    class Reducer(official.RankKReducer):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.n_workers = distributed.get_world_size()
            self.device, self.timer, self.rank = "cpu", _no_timer, rank
            self.p_memory = self.q_memory = None
            self.reuse_query = not feed.every_step

        def reduce(self, *args: Any) -> Any:
            self._given = iter(feed.factors)
            return super().reduce(*args)

        def set_random(self, vector: Any) -> None:
            vector.copy_(official.torch.tensor(next(self._given)))

    return Reducer()


def _no_timer(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
    del args, kwargs
    return contextlib.nullcontext()


class _Trainer:
    """The lines of their training script between the gradients and the new parameters."""

    def __init__(
        self,
        official: Any,
        rank: int,
        feed: _Feed,
        weight_decay: float,
        distributed: _fleet.Distributed,
        params: list[Any],
    ) -> None:
        self._reducer = _reducer(official, distributed, rank, feed)
        self._params, self._decay = params, weight_decay
        self._feed, self._distributed, self._torch = feed, distributed, official.torch
        zeros = lambda: [p.detach().clone().zero_() for p in params]
        self._memories, self._momenta, self._means = zeros(), zeros(), zeros()

    def __call__(self) -> None:
        if self._feed.every_step:
            self._take_our_errors()
        sent = [p.grad + e for p, e in zip(self._params, self._memories, strict=True)]
        self._reducer.reduce(sent, self._means, self._memories)
        for p, mean, momentum in zip(self._params, self._means, self._momenta, strict=True):
            mean.add_(p.detach(), alpha=self._decay)
            momentum.mul_(_MOMENTUM).add_(mean)
            p.data.add_(mean + momentum, alpha=-LEARNING_RATE)

    def _take_our_errors(self) -> None:
        """Theirs must have the mean of ours, which is all that later steps depend on."""
        worker = self._distributed.get_rank()
        matrices = [e for e in self._memories if e.ndim == 2]
        for memory, errors in zip(matrices, self._feed.errors, strict=True):
            mean, expected = memory.clone(), self._torch.tensor(errors.mean(0))
            self._distributed.all_reduce(mean)
            apart = (mean / WORKERS - expected).abs().max()
            if apart > 1e-4 * max(float(expected.abs().max()), 1e-3):
                raise RuntimeError(f"the mean of the official errors is off by {apart}")
            memory.copy_(self._torch.tensor(errors[worker]))


def _official(
    official: Any, rank: int, feed: _Feed
) -> Callable[[dict[str, Any], float], _fleet.Fleet]:
    """One trainer a rank; ``torch.distributed`` is the ranks' own while they step."""
    names = ("all_reduce", "get_world_size")

    def make(params: dict[str, Any], weight_decay: float) -> _fleet.Fleet:
        return _fleet.Fleet(
            params,
            WORKERS,
            functools.partial(_Trainer, official, rank, feed, weight_decay),
            around=lambda distributed: distributed.in_place_of(official.torch.distributed, *names),
        )

    return make


def _case(official: Any, rank: int, *, every_step: bool = True) -> Case:
    feed = _Feed(rank, every_step=every_step)
    return Case(
        name=f"{WORKERS} workers, rank {rank}",
        settings={
            "rank": rank,
            "momentum": _MOMENTUM,
            "form": "paper",
            "coupled_decay": True,
            "workers": WORKERS,
            "Q and errors": "each step of the official side starts from ours",
        },
        ours=functools.partial(_ours, rank),
        official=_official(official, rank, feed),
        transposed=False,  # so that both sides take the same axes together
        weight_decay=0.1,
        feed=feed,
    )


def _build(official: Any) -> tuple[list[Case], list[Departure]]:
    cases = [_case(official, rank) for rank in (1, 2, 4)]

    def changed(**settings: Any) -> float:
        return difference_of_updates(cases[1], _ours(2, 0.0, **settings)).value

    return cases, [
        Departure(
            "A worker's error leaves out its own message as it was sent; the official code leaves "
            "out the mean, and keeps all in which workers differ, which grows without bound. The "
            "updates are the same but for rounding."
        ),
        Departure(
            "The steps compared start from the same Q and errors, and the mean of the errors they "
            "leave is compared too: rounding grows from step to step, more so in what the official "
            "errors keep (figure: each side with its own, rank 2).",
            lambda: difference_of_updates(_case(official, 2, every_step=False)).value,
        ),
        Departure(
            "Weight decay is added to the step by default; the official code adds it to the mean "
            "gradient, before the momentum (coupled_decay=True)."
        ),
        Departure(
            "Matrices of fewer than 1024 elements, and those whose factors are more than half of "
            "them, are averaged as they are by default; the official code compresses every matrix. "
            "None of those compared is so small."
        ),
        Departure(
            'form="nesterov" is what optax calls so; the official Nesterov form adds the momentum '
            'to the gradient undamped (form="paper", our default).',
            lambda: changed(form="nesterov"),
        ),
        Departure(
            "A dependent column is left out of the basis; the official code divides it by its norm "
            "plus 1e-8, which makes a direction of rounding noise."
        ),
        Departure(
            "The package of the same repository sends one factor a step, in turns. It is not "
            "compared."
        ),
    ]


METHOD = Method(
    name="powersgd",
    repository="epfml/powersgd",
    marks=("paper-code/gradient_reducers.py", "powersgd/powersgd.py"),
    packages=("torch",),
    module="paper-code/gradient_reducers.py",
    build=_build,
)
