r"""An idealised model of training time when replicas exchange now and then (arXiv:2503.09799).

An all-reduce of $b$ bits over $R$ nodes takes at least $2 b (1 - 1/R) / W + \epsilon$ seconds with
bandwidth $W$ and latency $\epsilon$, and computing takes $6 N D / (R Q)$ seconds. Data parallelism
reduces over all nodes in every step. DiLoCo reduces within each of its replicas in every step, on
the network inside, and between replicas every $H$ steps, on the one across. Nothing overlaps.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxopt_suite import core


@dataclasses.dataclass(frozen=True)
class Network:
    """A network.

    Attributes:
      bandwidth: bits per second.
      latency: seconds of one exchange.
    """

    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        core.check_number("bandwidth", self.bandwidth, low=0.0, low_open=True)
        core.check_number("latency", self.latency, low=0.0)

    def all_reduce(self, bits: Any, nodes: Any) -> Any:
        """Least seconds of an all-reduce; none for one node."""
        nodes = np.asarray(nodes, np.float64)
        return np.where(nodes > 1, 2 * bits * (1 - 1 / nodes) / self.bandwidth + self.latency, 0.0)


LOW = Network(10e9, 1e-2)
MEDIUM = Network(100e9, 1e-3)
HIGH = Network(400e9, 1e-4)
SPEED = 300e12  # FLOPs per second of one chip


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Idealised seconds of a run: computing, and communicating."""

    compute: Any
    communication: Any

    @property
    def total(self) -> Any:
        """Both."""
        return self.compute + self.communication


def training_time(
    n: Any,
    d: Any,
    batch_tokens: Any,
    chips: Any,
    *,
    replicas: int | None = None,
    every: int = 30,
    across: Network = LOW,
    inside: Network = HIGH,
    wire_bits: float = 16.0,
    speed: float = SPEED,
) -> Seconds:
    """Seconds to train ``n`` parameters on ``d`` tokens; numbers or arrays that broadcast.

    Args:
      n: parameters.
      d: tokens.
      batch_tokens: of all replicas together.
      chips: in all.
      replicas: of DiLoCo, each with an equal share of the chips; ``None`` for data parallelism,
        whose every step crosses the slow network.
      every: steps between exchanges of DiLoCo.
      across: network between replicas.
      inside: network inside a replica.
      wire_bits: bits of one parameter on the wire.
      speed: FLOPs per second of one chip.

    Raises:
      ValueError: for a number out of range.
    """
    core.check_int("every", every)
    core.check_number("wire_bits", wire_bits, low=0.0, low_open=True)
    core.check_number("speed", speed, low=0.0, low_open=True)
    bits, steps = n * wire_bits, d / batch_tokens
    compute = 6.0 * n * d / (chips * speed)
    if replicas is None:
        return Seconds(compute, steps * across.all_reduce(bits, chips))
    core.check_int("replicas", replicas)
    if np.any(np.asarray(chips) < replicas):
        raise ValueError(f"chips must be at least as many as replicas ({replicas}), got {chips}")
    within = inside.all_reduce(bits, chips / replicas)
    return Seconds(compute, steps * (within + across.all_reduce(bits, replicas) / every))
