"""How much of their time workers compute when a slow link joins them: the closed form.

A step is a forward pass and a backward pass through ``layers`` equal layers. At the end of certain
steps a worker sends some layers to a mean over all workers, and ``delay`` steps later it does not
go on before that mean has arrived. The link carries one layer after another. One schedule says it
for every method::

    method                    sync_every  fragments  delay   sends in the backward pass
    data parallel                 1           1        0     yes
    DiLoCo, local SGD             H           1        0     no
    streaming DiLoCo              H           P        tau   no
    eager updates, CO2            H           1        H     no

``event_simulation`` computes the same from a queue of events, and shares no code with this file.

References: Douillard et al., Streaming DiLoCo with overlapping communication, arXiv:2501.18512,
2025 (table 4); Charles et al., Communication-Efficient Language Model Training Scales Reliably and
Robustly, arXiv:2503.09799, 2025 (simulated compute utilisation). ``benchmarks.communication`` holds
their figures beside ours.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxopt_suite.core.checks import check_int, check_number
from jaxopt_suite.core.figures import GREY, PALETTE, dress

_GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Job:
    """What one worker computes, and how much it has to agree on.

    Attributes:
      step_seconds: of one inner step of computation alone.
      parameters: of the model; what a mean is taken of.
      layers: equal pieces that the parameters consist of, and the backward pass goes through.
      backward_share: of a step's time; its other part is the forward pass.
      workers: in the mean. Under the ring model each sends 2 (workers - 1) / workers of the values.

    Raises:
      TypeError, ValueError: naming the attribute, its value and what is legal.
    """

    step_seconds: float
    parameters: float
    layers: int
    backward_share: float = 2 / 3
    workers: int = 2

    def __post_init__(self) -> None:
        check_number("step_seconds", self.step_seconds, low=0.0, low_open=True)
        check_number("parameters", self.parameters, low=0.0, low_open=True)
        check_int("layers", self.layers)
        check_number("backward_share", self.backward_share, low=0.0, high=1.0)
        check_int("workers", self.workers, low=2)

    @property
    def layer_backward(self) -> float:
        """Seconds of the backward pass through one layer."""
        return self.backward_share * self.step_seconds / self.layers


@dataclasses.dataclass(frozen=True)
class Link:
    """What joins the workers.

    Attributes:
      gbits_per_second: that one worker sends, in 1e9 bits; as much may arrive at the same time.
      latency_seconds: from the last bit of a mean sent until the mean is there.
    """

    gbits_per_second: float
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        check_number("gbits_per_second", self.gbits_per_second, low=0.0, low_open=True)
        check_number("latency_seconds", self.latency_seconds, low=0.0)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which layers are sent when, and when their mean is waited for.

    Fragment ``p`` (from 0) holds the layers ``p, p + fragments, ...``. Of every ``sync_every``
    steps, it is sent at the end of step ``(p + 1) * sync_every // fragments``.

    Attributes:
      sync_every: steps between two means of the same parameter.
      fragments: parts that the model is sent in.
      delay: steps between sending a fragment and waiting for its mean.
      bits: that one value has on the wire.
      in_backward: a layer is sent as soon as the backward pass has left it behind. That is how
        gradients travel. An outer gradient is known only when the step has been taken; the papers'
        simulation sends it in the backward pass all the same.
    """

    sync_every: int = 1
    fragments: int = 1
    delay: int = 0
    bits: float = 32.0
    in_backward: bool = False

    def __post_init__(self) -> None:
        check_int("sync_every", self.sync_every)
        check_int("fragments", self.fragments)
        check_int("delay", self.delay, low=0)
        check_number("bits", self.bits, low=0.0, low_open=True)
        if self.fragments > self.sync_every:
            raise ValueError(
                f"fragments must be at most sync_every={self.sync_every}, got {self.fragments}"
            )
        if self.delay > self.sync_every:
            raise ValueError(
                f"delay must be at most sync_every={self.sync_every}, got {self.delay}: a fragment "
                "would be sent again before its last mean is used"
            )

    @classmethod
    def data_parallel(cls, *, bits: float = 32.0) -> "Schedule":
        """A mean of gradients in every step, which begins in its backward pass."""
        return cls(bits=bits, in_backward=True)

    @classmethod
    def diloco(cls, sync_every: int, *, bits: float = 32.0) -> "Schedule":
        """All workers wait for the outer gradient after every ``sync_every`` steps."""
        return cls(sync_every, bits=bits)

    @classmethod
    def streaming(
        cls, sync_every: int, fragments: int, *, delay: int = 0, bits: float = 32.0
    ) -> "Schedule":
        """One fragment after another, each of which has ``delay`` steps to arrive."""
        return cls(sync_every, fragments, delay, bits)

    @classmethod
    def overlapped(cls, sync_every: int, *, bits: float = 32.0) -> "Schedule":
        """Eager and delayed updates, and CO2: the mean has the whole next round to arrive."""
        return cls(sync_every, delay=sync_every, bits=bits)

    @property
    def spacing(self) -> int:
        """The least number of steps between two fragments."""
        return self.sync_every // self.fragments

    def layers_of(self, fragment: int, layers: int) -> range:
        """The layers of a fragment, counted from the input.

        Raises:
          ValueError: if there are fewer layers than fragments.
        """
        if self.fragments > layers:
            raise ValueError(f"fragments must be at most layers={layers}, got {self.fragments}")
        return range(fragment, layers, self.fragments)


def bits_sent(job: Job, schedule: Schedule) -> float:
    """Bits that a worker sends for one mean of all parameters, under the ring model."""
    return 2 * (job.workers - 1) / job.workers * job.parameters * schedule.bits


def compute_utilisation(job: Job, link: Link, schedule: Schedule) -> float:
    r"""Share of the time in which a worker computes, in the long run.

    Let a step take $T$, the link $c_p$ for all of fragment $p$, and let the mean of fragment $p$ be
    there $e_p$ after the end of the step that sends it if the link is free: $e_p = c_p + latency$
    if nothing is sent in the backward pass, else what is left of that when the pass is over. With
    fragments sent every $s$ steps (``spacing``) and waited for $\tau < s$ steps later (``delay``),
    no two wait for each other, and a round of $H$ steps takes

    $$H T + \sum_p \max(0, e_p - \tau T).$$

    With $\tau \ge s$ several are under way, and the slowest of three circles is what a fragment
    takes: computing, the link, and a mean that is awaited $m = \lfloor \tau / s \rfloor + 1$ sends
    later,

    $$\max\left(s T,\; c,\; \frac{e + (m s - \tau) T}{m}\right).$$

    Args:
      job: the computation.
      link: its speed.
      schedule: the method.

    Returns:
      Between 0 and 1.

    Raises:
      ValueError: if there are more fragments than layers; or, with ``delay`` not below the spacing,
        if fragments differ (their number does not divide both ``sync_every`` and ``layers``, or
        several are sent in the backward pass): ``event_simulation.simulate`` has no such limits.
    """
    seconds = bits_sent(job, schedule) / _GIGA / link.gbits_per_second
    return _utilisation(job, schedule, seconds, link.latency_seconds)


def _utilisation(job: Job, schedule: Schedule, seconds: float, latency: float) -> float:
    """The same for a link that is busy for ``seconds`` with all parameters."""
    step = job.step_seconds
    late = [
        latency + _busy_after_step(job, schedule, p, seconds / job.layers)
        for p in range(schedule.fragments)
    ]
    spacing, delay = schedule.spacing, schedule.delay
    if delay < spacing:
        waits = math.fsum(max(0.0, e - delay * step) for e in late)
        return schedule.sync_every * step / (schedule.sync_every * step + waits)
    _check_alike(job, schedule)
    ahead = delay // spacing + 1
    circle = (late[0] + (ahead * spacing - delay) * step) / ahead
    return spacing * step / max(spacing * step, seconds / schedule.fragments, circle)


def _busy_after_step(job: Job, schedule: Schedule, fragment: int, layer_seconds: float) -> float:
    """How long after a step the link carries the fragment sent with it; negative: done before."""
    layers = schedule.layers_of(fragment, job.layers)
    if not schedule.in_backward:
        return len(layers) * layer_seconds
    # From the last layer that the link had to wait for, it was busy to the end. The time is linear
    # in the number of that layer, and the last layer of the model is sent first: so it was the
    # first that was sent, or the last.
    return max(
        len(layers) * layer_seconds - layers[-1] * job.layer_backward,
        layer_seconds - layers[0] * job.layer_backward,
    )


def _check_alike(job: Job, schedule: Schedule) -> None:
    """Raises unless all fragments are of one size, equally spaced and sent alike."""
    fragments = schedule.fragments
    if schedule.sync_every % fragments or job.layers % fragments:
        raise ValueError(
            f"with delay={schedule.delay} not below the spacing {schedule.spacing}, fragments must "
            f"divide sync_every={schedule.sync_every} and layers={job.layers}, got {fragments}; "
            "simulate such a schedule"
        )
    if schedule.in_backward and fragments > 1:
        raise ValueError(
            f"with delay={schedule.delay} not below the spacing {schedule.spacing}, only a single "
            f"fragment can be sent in the backward pass, got {fragments=}; simulate such a schedule"
        )


def bandwidth_for(
    utilisation: float, job: Job, schedule: Schedule, *, latency_seconds: float = 0.0
) -> float:
    """The slowest link with which workers compute for that share of the time.

    Args:
      utilisation: wanted, between 0 and 1, both excluded.
      job: the computation.
      schedule: the method.
      latency_seconds: as of ``Link``.

    Returns:
      Gbit/s.

    Raises:
      ValueError: if latency alone costs more, or as ``compute_utilisation`` does.
    """
    check_number("utilisation", utilisation, low=0.0, high=1.0, low_open=True, high_open=True)
    check_number("latency_seconds", latency_seconds, low=0.0)
    limit = _utilisation(job, schedule, 0.0, latency_seconds)
    if limit <= utilisation:
        raise ValueError(
            f"utilisation must be below {limit:.6g}, which a latency of {latency_seconds:g} s "
            f"leaves on the fastest link, got {utilisation!r}"
        )
    enough = lambda seconds: _utilisation(job, schedule, seconds, latency_seconds) >= utilisation
    fast, slow = 0.0, job.step_seconds
    while enough(slow):
        fast, slow = slow, 2 * slow
    while (middle := (fast + slow) / 2) not in (fast, slow):
        fast, slow = (middle, slow) if enough(middle) else (fast, middle)
    return bits_sent(job, schedule) / _GIGA / fast


def draw(
    axes: Any,
    job: Job,
    schedules: Mapping[str, Schedule],
    gbits_per_second: Sequence[float],
    *,
    latency_seconds: float = 0.0,
    ink: str = "black",
) -> None:
    """Compute utilisation against bandwidth, a curve for each schedule, the first one dashed grey.

    Args:
      axes: of matplotlib.
      job: the computation.
      schedules: by the name that the legend gives them.
      gbits_per_second: where to compute the curves, ascending.
      latency_seconds: as of ``Link``.
      ink: colour of text and axes.
    """
    for i, (name, schedule) in enumerate(schedules.items()):
        links = [Link(speed, latency_seconds) for speed in gbits_per_second]
        values = [compute_utilisation(job, link, schedule) for link in links]
        colour, style = (PALETTE[(i - 1) % len(PALETTE)], "-") if i else (GREY, "--")
        axes.plot(gbits_per_second, values, style, label=name, color=colour, linewidth=1.8)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    dress(axes, "bandwidth between workers (Gbit/s)", "compute utilisation", ink=ink)
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3}
    axes.legend(frameon=False, fontsize=9, labelcolor=ink, **above)
