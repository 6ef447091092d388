"""Workers on both sides of a comparison: ours simulated, the official ones threads with Gloo.

The gradients of the harness are made different for every worker; what workers have in common and
what each has of its own are of one size.
"""

import concurrent.futures
import contextlib
import datetime
import threading
import types
import unittest.mock
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

AXIS = "worker"

_MINUTE = datetime.timedelta(seconds=60)

# (worker, common gradient, roll along the official output axis) -> the worker's own gradient.
GradientOf = Callable[[Any, Any, Callable[..., Any]], Any]


def own_gradient(worker: Any, gradient: Any, roll: Callable[..., Any]) -> Any:
    """A worker's gradient, of the common one; ``roll`` rolls along the official output axis."""
    return gradient + 0.2 * worker * roll(gradient, worker + 1)


def ours(
    one: optax.GradientTransformationExtraArgs,
    workers: int,
    *,
    output_axis: int,
    gradient_of: GradientOf = own_gradient,
) -> optax.GradientTransformation:
    """A simulated fleet as one transformation of the common gradient.

    Args:
      one: written for one worker of ``AXIS``.
      workers: how many there are.
      output_axis: the official output axis in our layout: -1 if ours is turned, else 0.
      gradient_of: a worker's gradient.
    """

    def init(params: Any) -> Any:
        stack = lambda x: jnp.broadcast_to(x, (workers, *x.shape))
        return jax.tree.map(stack, one.init(params))

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        roll = lambda x, by: jnp.roll(x, by, output_axis)

        def of_one(worker: jax.Array, state: Any) -> Any:
            own = jax.tree.map(lambda g: gradient_of(worker, g, roll), grads)
            return one.update(own, state, params)

        updates, state = jax.vmap(of_one, axis_name=AXIS)(jnp.arange(workers), state)
        return jax.tree.map(lambda x: x[0], updates), state

    return optax.GradientTransformation(init, update)


class Distributed:
    """As much of ``torch.distributed`` as official code uses, for ranks that are threads.

    Each has a Gloo process group of its own.
    """

    def __init__(self, workers: int) -> None:
        import torch  # the reference's own dependency, none of ours

        self._workers = workers
        self._own = threading.local()
        store = torch.distributed.HashStore()
        gloo = torch.distributed.ProcessGroupGloo
        with concurrent.futures.ThreadPoolExecutor(workers) as threads:
            join = lambda rank: gloo(store, rank, workers, _MINUTE)
            self._groups = list(threads.map(join, range(workers)))

    def run(self, fn: Callable[[int], Any]) -> list[Any]:
        """``fn(rank)`` on every rank at once."""

        def as_rank(rank: int) -> Any:
            self._own.rank = rank
            return fn(rank)

        with concurrent.futures.ThreadPoolExecutor(self._workers) as threads:
            return list(threads.map(as_rank, range(self._workers)))

    @contextlib.contextmanager
    def in_place_of(self, module: Any, *names: str) -> Iterator[None]:
        """While this lasts, these functions of a module are those of this class."""
        with contextlib.ExitStack() as stack:
            for name in names:
                mine = getattr(self, name)
                stack.enter_context(unittest.mock.patch.object(module, name, mine))
            yield

    def is_initialized(self) -> bool:
        return True

    def new_group(self, ranks: Sequence[int]) -> None:
        del ranks  # there is but one

    def get_world_size(self, group: Any = None) -> int:
        del group
        return self._workers

    def get_rank(self, group: Any = None) -> int:
        del group
        return self._own.rank

    def all_reduce(self, tensor: Any, async_op: bool = False) -> Any:
        work = self._groups[self._own.rank].allreduce([tensor])
        return work if async_op else work.wait()

    def all_gather(
        self, received: list[Any], tensor: Any, group: Any = None, async_op: bool = False
    ) -> Any:
        del group, async_op  # done when it returns
        flat = [place.reshape(-1) for place in received]
        self._groups[self._own.rank].allgather([flat], [tensor.reshape(-1)]).wait()
        for place, x in zip(received, flat, strict=True):
            place.copy_(x.reshape(place.shape))
        return types.SimpleNamespace(wait=lambda: None)

    def all_to_all_single(self, received: Any, sent: Any, group: Any = None) -> None:
        del group
        self._groups[self._own.rank].alltoall_base(received, sent, [], []).wait()


class Fleet:
    """The official side: one official optimizer a rank, each with parameters of its own."""

    def __init__(
        self,
        params: dict[str, Any],
        workers: int,
        make: Callable[[Distributed, list[Any]], Callable[[], None]],
        *,
        around: Callable[[Distributed], contextlib.AbstractContextManager[Any]],
        gradient_of: GradientOf = own_gradient,
    ) -> None:
        """Starts the ranks.

        Args:
          params: the common parameters.
          workers: how many ranks.
          make: called on every rank: (distributed, its parameters) -> a function that steps them by
            their gradients.
          around: the context in which ``make`` and the steps run.
          gradient_of: a rank's gradient.
        """
        self._params = list(params.values())
        self._distributed = Distributed(workers)
        self._around = around
        self._gradient_of = gradient_of
        self._copies = [[p.detach().clone() for p in self._params] for _ in range(workers)]
        for copies in self._copies:
            for p in copies:
                p.requires_grad_()
        with around(self._distributed):
            self._steps = self._distributed.run(
                lambda rank: make(self._distributed, self._copies[rank])
            )

    def step(self) -> None:
        """Takes a step from the common parameters with each rank's own gradients."""
        import torch

        roll = lambda x, by: np.roll(x, int(by), 0)
        for worker, copies in enumerate(self._copies):
            for own, common in zip(copies, self._params, strict=True):
                own.data.copy_(common.data)
                gradient = self._gradient_of(np.float32(worker), common.grad.numpy(), roll)
                own.grad = torch.tensor(gradient)
        with self._around(self._distributed):
            self._distributed.run(lambda rank: self._steps[rank]())
        for common, *copies in zip(self._params, *self._copies, strict=True):
            # TorchScript compiles while it runs, and may round otherwise on another thread.
            if not all(torch.allclose(copies[0], copy, 1e-4, 1e-6) for copy in copies):
                raise RuntimeError("the official workers' parameters have come apart")
            common.data.copy_(copies[0].data)
