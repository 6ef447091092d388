"""DiLoCo against torchft, with four workers: AdamW inside, Nesterov's momentum outside.

Rows of the harness's arrays are dealt to the workers, a quarter each, as parameters of their own:
workers part between synchronisations, and the harness compares all of them. Where each starts is
another place; both sides keep outer parameters for each, so that this is the same to both.
"""

import functools
import types
from typing import Any

import jax
import optax

from benchmarks.parity import _fleet
from benchmarks.parity.compare import (
    EPS,
    LEARNING_RATE,
    Case,
    Departure,
    Method,
    difference_of_updates,
)
from jaxopt_suite.optimizers import diloco, nesterov, scale_by_grams, streaming_diloco

WORKERS = 4
_RATE, _MOMENTUM = 0.7, 0.9
_FRAGMENT = {"square": 0, "tall": 1, "wide": 0, "vector": 1}


def _inner(weight_decay: float) -> optax.GradientTransformation:
    # Adam with an exact bias correction: optax's is off by 1e-5 in the second step.
    return optax.chain(
        scale_by_grams(eps=EPS, kappa=1.0),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(LEARNING_RATE),
    )


def _in_rows(one: optax.GradientTransformationExtraArgs) -> optax.GradientTransformation:
    """A fleet whose workers' parameters are the rows of the parameters it is given."""
    deal = lambda tree: jax.tree.map(lambda x: x.reshape(WORKERS, -1, *x.shape[1:]), tree)

    def init(params: Any) -> Any:
        return jax.vmap(one.init, axis_name=_fleet.AXIS)(deal(params))

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        run = jax.vmap(lambda g, s, p: one.update(g, s, p), axis_name=_fleet.AXIS)
        updates, state = run(deal(grads), state, deal(params))
        return jax.tree.map(lambda u, g: u.reshape(g.shape), updates, grads), state

    return optax.GradientTransformation(init, update)


def _ours(every: int, weight_decay: float) -> optax.GradientTransformation:
    outer = nesterov(_fleet.AXIS, _RATE, _MOMENTUM)
    one = diloco(_inner(weight_decay), outer, sync_every=every, axis_name=_fleet.AXIS)
    return _in_rows(one)


def _ours_streaming(
    every: int, delay: int, mixing: float, weight_decay: float
) -> optax.GradientTransformation:
    return _in_rows(
        streaming_diloco(
            _inner(weight_decay),
            nesterov(_fleet.AXIS, _RATE, _MOMENTUM),
            sync_every=every,
            axis_name=_fleet.AXIS,
            fragments=_FRAGMENT,
            delay=delay,
            mixing=mixing,
        )
    )


class _Manager:
    """What torchft's loop asks of its manager, where nobody ever fails."""

    _use_async_quorum = False

    def __init__(self, distributed: _fleet.Distributed) -> None:
        self._distributed, self._step = distributed, 0

    def current_step(self) -> int:
        return self._step

    def allreduce(self, tensor: Any, should_quantize: bool) -> Any:
        del should_quantize
        self._distributed.all_reduce(tensor)
        tensor /= WORKERS
        return types.SimpleNamespace(wait=lambda: None)

    def should_commit(self) -> bool:
        self._step += 1
        return True

    def start_quorum(self) -> None: ...

    def allow_state_dict_read(self) -> None: ...

    def disallow_state_dict_read(self) -> None: ...

    def register_state_dict_fn(self, key: str, load: Any, save: Any) -> None: ...


class _Ranks:
    """The official side: a model, an inner optimizer and a loop on every rank."""

    def __init__(
        self,
        official: Any,
        fragments: int,
        settings: dict[str, Any],
        params: dict[str, Any],
        weight_decay: float,
    ) -> None:
        self._torch, self._params = official.torch, params
        self._distributed = _fleet.Distributed(WORKERS)
        make = functools.partial(self._rank, official, fragments, settings, weight_decay)
        self._ranks = [make(rank) for rank in range(WORKERS)]

    def _rows(self, x: Any, rank: int) -> Any:
        return x.reshape(WORKERS, -1, *x.shape[1:])[rank]

    def _rank(
        self,
        official: Any,
        fragments: int,
        settings: dict[str, Any],
        weight_decay: float,
        rank: int,
    ) -> tuple[dict[str, Any], Any]:
        torch = self._torch
        own = {
            name: torch.nn.Parameter(self._rows(p.detach(), rank).clone())
            for name, p in self._params.items()
        }
        parts = [torch.nn.Module() for _ in range(fragments)]
        for name, p in own.items():
            parts[_FRAGMENT[name] % fragments].register_parameter(name, p)
        inner = torch.optim.AdamW(own.values(), LEARNING_RATE, eps=EPS, weight_decay=weight_decay)
        outer = [
            torch.optim.SGD(part.parameters(), _RATE, _MOMENTUM, nesterov=True) for part in parts
        ]
        manager = _Manager(self._distributed)
        loop = official.DiLoCo(manager, parts, inner, outer, **settings)
        # It sends so much earlier that what was sent arrives when we send.
        loop._local_step = -settings.get("fragment_sync_delay", 0)
        loop.__enter__()
        return own, inner

    def step(self) -> None:
        """A step of every rank by its rows of the common gradient, from its rows of the common."""
        for rank, (own, _) in enumerate(self._ranks):
            for name, p in own.items():
                p.data.copy_(self._rows(self._params[name].data, rank))
                p.grad = self._rows(self._params[name].grad, rank).clone()
        self._distributed.run(lambda rank: self._ranks[rank][1].step())
        for rank, (own, _) in enumerate(self._ranks):
            for name, p in own.items():
                self._rows(self._params[name].data, rank).copy_(p.data)


def _case(official: Any, every: int) -> Case:
    return Case(
        name=f"{WORKERS} workers, every {every} steps",
        settings=_settings(every),
        ours=functools.partial(_ours, every),
        official=functools.partial(_Ranks, official, 1, {"sync_every": every}),
        transposed=False,  # so that both sides deal the same rows
        weight_decay=0.1,
    )


def _streaming(official: Any, every: int, delay: int, mixing: float) -> Case:
    given = {
        "sync_every": every,
        "fragment_sync_delay": delay,
        "fragment_update_alpha": mixing,
    }
    return Case(
        name=f"two fragments, every {every} steps, delay {delay}, mixing {mixing:g}",
        settings=_settings(every) | {"fragments": 2, "delay": delay, "mixing": mixing},
        ours=functools.partial(_ours_streaming, every, delay, mixing),
        official=functools.partial(_Ranks, official, 2, given),
        transposed=False,
        weight_decay=0.1,
    )


def _settings(every: int) -> dict[str, Any]:
    return {
        "workers": WORKERS,
        "inner": f"AdamW({LEARNING_RATE})",
        "outer": f"SGD({_RATE}, momentum={_MOMENTUM}, nesterov=True)",
        "sync_every": every,
    }


def _build(official: Any) -> tuple[list[Case], list[Departure]]:
    cases = [_case(official, every) for every in (1, 4)]
    cases += [_streaming(official, 4, 0, 0.0), _streaming(official, 6, 2, 0.5)]

    def changed(outer: optax.GradientTransformation) -> float:
        one = diloco(_inner(0.0), outer, sync_every=4, axis_name=_fleet.AXIS)
        return difference_of_updates(cases[1], _in_rows(one)).value

    return cases, [
        Departure(
            "A fragment is sent at its offset and applied after the delay, as in the paper; the "
            "official code sends it so much earlier and applies it at the offset. The case with a "
            "delay starts its count of steps that much lower."
        ),
        Departure(
            "The outer optimizer has a default, with rate 0.7; the official code has none (figure: "
            "0.3, which is MaxText's rate).",
            lambda: changed(nesterov(_fleet.AXIS, 0.3, _MOMENTUM)),
        ),
        Departure(
            "The period need not be a multiple of the number of fragments, nor the delay be below "
            "their spacing."
        ),
        Departure(
            "A worker whose contribution is missing goes on from the outer parameters; after a "
            "failed commit all workers of the official code do, and the step is lost."
        ),
    ]


METHOD = Method(
    name="diloco",
    repository="pytorch/torchft",
    marks=("torchft/local_sgd.py", "torchft/manager.py"),
    packages=("torch",),
    module="torchft/local_sgd.py",
    build=_build,
    stand_ins={"torchft": (), "torchft.manager": ("Manager",)},
)
