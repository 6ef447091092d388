"""Runs and random parameters for every law: where a planted law can be told from its data.

A design is the inputs of the runs and a range for each parameter: for a coefficient that says what
powers it multiplies, of its term in the middle of the runs, spread evenly in the logarithm. Where a
published study has the grid that makes a form identifiable, that grid is used.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxopt_suite.scaling_laws import coordinates, laws
from jaxopt_suite.scaling_laws.law import Law

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Design:
    """How one law is planted.

    Attributes:
      law: to plant and fit.
      inputs: of the runs, ``[n]`` each.
      ranges: of the parameters.
      starts: of each fit.
      held: parameters that the study with noise holds at the truth, as its runs leave them
        undetermined.
    """

    law: Law
    inputs: Mapping[str, np.ndarray]
    ranges: Mapping[str, Range]
    starts: int = 8
    held: tuple[str, ...] = ()

    def plant(self, count: int, seed: int = 0) -> dict[str, np.ndarray]:
        """Parameters of random laws, ``[count, 1]`` each."""
        rng = np.random.default_rng(seed)
        columns = []
        for parameter in self.law.parameters:
            low, high = self.ranges[parameter.name]
            scale = np.log if parameter.positive else np.asarray
            columns.append(rng.uniform(scale(low), scale(high), count))
        centring = coordinates.centring(self.law, self.inputs)
        theta = np.stack(columns, axis=1) @ np.linalg.inv(centring).T
        return {k: v[:, None] for k, v in coordinates.from_theta(self.law, theta).items()}


def _grid(**axes: Any) -> dict[str, np.ndarray]:
    """Every combination of the values of some columns."""
    points = np.array(list(itertools.product(*axes.values())), np.float64)
    return dict(zip(axes, points.T, strict=True))


def _runs() -> dict[str, np.ndarray]:
    """100 runs of 20 million to 20 billion parameters at 1 to 1000 tokens per parameter."""
    runs = _grid(N=np.geomspace(2e7, 2e10, 10), ratio=np.geomspace(1, 1000, 10))
    return {"N": runs["N"], "D": runs["N"] * runs["ratio"]}


def _line(name: str, low: float, high: float, count: int = 60) -> dict[str, np.ndarray]:
    return {name: np.geomspace(low, high, count)}


_TERM, _POWER, _FLOOR = (0.1, 2.0), (0.2, 0.8), (0.5, 2.5)
_EXPERTS = (1, 2, 4, 8, 16, 32)
_REPLICAS = (1, 2, 4, 8)


def _fine_tuning() -> dict[str, np.ndarray]:
    """No samples and 200 to 1,638,400 of them, as in the paper, three times each."""
    sizes = np.concatenate([[0.0], 200 * 2.0 ** np.arange(14)])
    return {"D": np.tile(sizes, 3)}


def _repeated() -> dict[str, np.ndarray]:
    runs = _grid(
        N=np.geomspace(1e7, 1e10, 8), U=np.geomspace(1e8, 1e10, 4), passes=(1, 2, 4, 10, 30, 100)
    )
    return {"N": runs["N"], "U": runs["U"], "D": runs["U"] * runs["passes"]}


def _pools() -> dict[str, np.ndarray]:
    """Three pools, from a hundredth of a pass to ten passes."""
    runs = _grid(
        pool=(3.2e6, 12.8e6, 51.2e6),
        passes=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 10),
    )
    return {"pool": runs["pool"], "samples": runs["pool"] * runs["passes"]}


def _mixtures() -> dict[str, np.ndarray]:
    runs = _grid(
        N=np.geomspace(1e8, 5e9, 5), ratio=np.geomspace(2, 400, 5), experts=np.array(_EXPERTS)
    )
    return {"N": runs["N"], "D": runs["N"] * runs["ratio"], "experts": runs["experts"]}


def _fleets() -> dict[str, np.ndarray]:
    """The seven sizes and four numbers of replicas of the paper."""
    return _grid(N=np.array([35e6, 90e6, 180e6, 335e6, 550e6, 1.3e9, 2.4e9]), M=_REPLICAS)


def _power(law: Law, inputs: Mapping[str, np.ndarray], term: Range, **powers: Range) -> Design:
    coefficient = next(p.name for p in law.parameters if p.positive)
    return Design(law, inputs, {coefficient: term, **powers})


def _filtering(law: Law) -> Design:
    ranges = {"a": (0.05, 0.2), "b": (-0.4, -0.15), "d": (0.05, 0.15), "tau": (2.0, 8.0)}
    return Design(law, _pools(), ranges, starts=16)


def designs() -> dict[str, Design]:
    """One design for every law of the registry, by the law's name."""
    found = [
        Design(
            laws.Chinchilla,
            _runs(),
            {"A": _TERM, "B": _TERM, "E": _FLOOR, "alpha": _POWER, "beta": _POWER},
        ),
        Design(
            laws.KaplanSize, _line("N", 1e6, 1e10), {"N_c": (1e12, 1e15), "alpha_N": (0.05, 0.2)}
        ),
        Design(
            laws.KaplanData, _line("D", 1e7, 1e11), {"D_c": (1e12, 1e15), "alpha_D": (0.05, 0.2)}
        ),
        Design(
            laws.KaplanCompute,
            _line("C", 1e15, 1e22),
            {"C_c": (1e25, 1e29), "alpha_C": (0.03, 0.1)},
        ),
        Design(
            laws.Kaplan,
            _runs(),
            {
                "N_c": (3e13, 3e14),
                "D_c": (1e13, 1e14),
                "alpha_N": (0.06, 0.08),
                "alpha_D": (0.09, 0.12),
            },
        ),
        Design(
            laws.KaplanSteps,
            _grid(N=np.geomspace(1e6, 1e9, 10), S_min=np.geomspace(500, 2e5, 10)),
            {
                "N_c": (1e13, 1e15),
                "S_c": (5e2, 1e4),
                "alpha_N": (0.05, 0.12),
                "alpha_S": (0.5, 1.0),
            },
        ),
        Design(
            laws.KaplanCriticalBatch,
            _line("loss", 2, 6),
            {"B_star": (1e7, 1e9), "alpha_B": (0.15, 0.4)},
        ),
        Design(
            laws.DataConstrained,
            _repeated(),
            {
                "A": (0.3, 2.0),
                "B": (0.3, 2.0),
                "E": _FLOOR,
                "alpha": (0.25, 0.5),
                "beta": (0.25, 0.5),
                "R_D": (5.0, 30.0),
                "R_N": (3.0, 15.0),
            },
            starts=16,  # min(N, N_opt) has a kink, and local minima beside it: with 8, 1 in 200
        ),
        Design(
            laws.OverTraining,
            _runs(),
            {"a": (0.3, 2.0), "b": (0.3, 2.0), "E": _FLOOR, "kappa": (0.2, 0.6)},
        ),
        Design(
            laws.DownstreamError,
            {"loss": np.linspace(1.0, 6.0, 100)},
            {"epsilon": (0.6, 0.9), "k": (0.5, 0.9), "gamma": (0.5, 1.2)},
        ),
        Design(
            laws.JointMoE,
            _mixtures(),
            {
                "a": (0.3, 1.5),
                "alpha": (-0.3, -0.15),
                "delta": (-0.3, -0.1),
                "gamma": (0.005, 0.02),
                "b": (0.3, 1.5),
                "beta": (-0.3, -0.15),
                "omega": (0.3, 0.6),
                "zeta": (-0.03, -0.01),
                "E_start": (1.5, 3.0),
                "E_max": (150.0, 500.0),
                "c": (1.0, 2.0),
            },
            held=("E_start", "E_max"),
        ),
        Design(
            laws.Rectified,
            _fine_tuning(),
            {"K": (1e2, 5e3), "D_l": (1e2, 1e3), "beta": (0.5, 0.9), "E": (0.5, 2.0)},
            starts=48,
        ),
        _filtering(laws.DataFiltering),
        _filtering(laws.DataFilteringAsReleased),
        Design(
            laws.StepsToTarget,
            {"batch": np.tile(64 * 2.0 ** np.arange(9), 3)},
            {"S_min": (1e3, 1e4), "E_min": (2e6, 2e7)},
        ),
        _power(laws.CriticalBatchBySize, _line("N", 8e7, 1e10, 30), (1e2, 1e4), p=(0.2, 0.7)),
        _power(laws.CriticalBatchByData, _line("D", 1e9, 1e12, 30), (1e2, 1e4), p=(0.2, 0.7)),
        _power(laws.StepLawRate, _runs(), (1e-4, 1e-2), p=(-0.8, -0.3), q=(0.1, 0.5)),
        _power(laws.StepLawBatch, _line("D", 2e9, 1e12, 30), (1e5, 1e7), r=(0.3, 0.7)),
        _power(laws.DiLoCoLossAlone, _line("N", 3e7, 3e9, 28), (2.0, 4.0), alpha=(-0.15, -0.05)),
        _power(laws.DiLoCoRateAlone, _line("N", 3e7, 3e9, 28), (1e-4, 1e-2), alpha=(-1.1, -0.4)),
        _power(laws.DiLoCoBatchAlone, _line("N", 3e7, 3e9, 28), (1e5, 1e6), alpha=(0.2, 0.6)),
        _power(laws.DiLoCoLoss, _fleets(), (2.0, 4.0), alpha=(-0.15, -0.05), beta=(0.005, 0.05)),
        _power(laws.DiLoCoRate, _fleets(), (1e-4, 1e-2), alpha=(-1.1, -0.4), beta=(0.1, 0.5)),
        _power(laws.DiLoCoBatch, _fleets(), (1e5, 1e6), alpha=(0.2, 0.6), beta=(0.1, 0.5)),
        Design(
            laws.DiLoCoLossFloor,
            _fleets(),
            {"A": (0.5, 2.0), "alpha": (-0.6, -0.25), "beta": (0.02, 0.1), "E": (0.5, 2.0)},
        ),
        Design(
            laws.LocalSteps,
            _grid(N=np.geomspace(3e7, 3e9, 14), local=np.array([0.0, 1.0])),
            {"A": (2.0, 4.0), "alpha": (-0.15, -0.05), "shift": (0.05, 0.3), "slope": (0.01, 0.05)},
        ),
        Design(
            laws.Saturating,
            _line("C", 1e15, 1e22, 100),
            {"A": (0.3, 2.0), "gamma": (0.1, 0.4), "E": _FLOOR},
        ),
        Design(
            laws.ComputeOnly,
            _line("C", 1e19, 1e25),
            {"intercept": (2.3, 2.9), "slope": (-0.035, -0.025)},
        ),
        Design(
            laws.ShapeAdaptive,
            _line("C", 1e14, 1e20, 200),
            {"a": (0.1, 0.5), "b": (0.3, 0.6), "c": (0.1, 0.3), "d": (1e15, 1e16)},
            starts=16,
        ),
    ]
    return {design.law.name: design for design in found}
