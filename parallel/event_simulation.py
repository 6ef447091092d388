"""The same share of computing as ``utilisation``, from a queue of events instead of a formula.

One worker stands for all: they compute alike and wait for one another. It runs through its passes;
layers that are ready queue for the link, which carries one at a time; the mean of a fragment is
there when its last layer has been carried and the latency has passed. Nothing here is a formula for
a round, so fragments may differ and several may be under way.
"""

import collections
import heapq
from collections.abc import Callable

from jaxopt_suite.core.checks import check_int
from jaxopt_suite.parallel.utilisation import Job, Link, Schedule, bits_sent


def simulate(
    job: Job, link: Link, schedule: Schedule, *, rounds: int = 10, warm_up: int = 2
) -> float:
    """Share of the time in which a worker computes.

    Args:
      job: the computation.
      link: its speed.
      schedule: the method.
      rounds: of ``sync_every`` steps, over which it is measured.
      warm_up: rounds before them, in which the first means are still on their way.

    Returns:
      Between 0 and 1.

    Raises:
      ValueError: if there are more fragments than layers, or ``rounds`` or ``warm_up`` is too low.
    """
    check_int("rounds", rounds)
    check_int("warm_up", warm_up, low=0)
    starts = _Worker(job, link, schedule).run((warm_up + rounds) * schedule.sync_every)
    elapsed = starts[-1] - starts[warm_up * schedule.sync_every]
    return rounds * schedule.sync_every * job.step_seconds / elapsed


class _Worker:
    """A worker, its link, and what will happen to them when.

    A fragment on its way is named by the step that sent it. Of the worker itself one event is in
    the queue at a time, and none while it waits.
    """

    def __init__(self, job: Job, link: Link, schedule: Schedule) -> None:
        self.job, self.schedule, self.latency = job, schedule, link.latency_seconds
        self.layer_seconds = bits_sent(job, schedule) / job.layers / (1e9 * link.gbits_per_second)
        parts = range(schedule.fragments)
        self.fragment_of = {(p + 1) * schedule.sync_every // len(parts): p for p in parts}
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.scheduled = 0
        self.queued: collections.deque[tuple[int, bool]] = collections.deque()
        self.carrying = False
        self.arrived: set[int] = set()
        self.starts: list[float] = []
        self.in_step = False

    def run(self, steps: int) -> list[float]:
        """The times at which steps 1 to ``steps + 1`` begin."""
        self._begin_step()
        while len(self.starts) <= steps:
            self.now, _, happen = heapq.heappop(self.events)
            happen()
        return self.starts

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        self.scheduled += 1  # of two events at one time, the one scheduled first comes first
        heapq.heappush(self.events, (self.now + seconds, self.scheduled, happen))

    def _leaves_with(self, step: int) -> range:
        """The layers sent with a step; the first step is 1."""
        within = (step - 1) % self.schedule.sync_every + 1
        if step < 1 or within not in self.fragment_of:
            return range(0)
        return self.schedule.layers_of(self.fragment_of[within], self.job.layers)

    def _begin_step(self) -> None:
        self.starts.append(self.now)
        self.in_step = True
        forward = (1 - self.job.backward_share) * self.job.step_seconds
        self._after(forward, lambda: self._backward(self.job.layers - 1))

    def _backward(self, layer: int) -> None:
        self._after(self.job.layer_backward, lambda: self._passed(layer))

    def _passed(self, layer: int) -> None:
        """The backward pass has left a layer behind."""
        sent = self._leaves_with(len(self.starts))
        if self.schedule.in_backward and layer in sent:
            self._send(last=layer == sent[0])
        if layer > 0:
            self._backward(layer - 1)
            return
        if not self.schedule.in_backward:
            for each in sent:
                self._send(last=each == sent[-1])
        self.in_step = False
        self._go_on()

    def _send(self, *, last: bool) -> None:
        """Queues one layer, the ``last`` of its fragment or not."""
        self.queued.append((len(self.starts), last))
        self._carry()

    def _carry(self) -> None:
        if self.queued and not self.carrying:
            step, last = self.queued.popleft()
            self.carrying = True
            self._after(self.layer_seconds, lambda: self._carried(step, last))

    def _carried(self, step: int, last: bool) -> None:
        self.carrying = False
        if last:
            self._after(self.latency, lambda: self._arrives(step))
        self._carry()

    def _arrives(self, step: int) -> None:
        self.arrived.add(step)
        if not self.in_step:
            self._go_on()

    def _go_on(self) -> None:
        """Begins the next step, unless a mean is due that has not arrived."""
        due = len(self.starts) - self.schedule.delay
        if self._leaves_with(due) and due not in self.arrived:
            return
        self.arrived.discard(due)
        self._begin_step()
