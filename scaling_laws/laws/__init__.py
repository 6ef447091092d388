"""Published laws, ready to fit. One family a file, each with the helpers that its paper has."""

from jaxopt_suite.scaling_laws.law import Law
from jaxopt_suite.scaling_laws.laws import (
    communication,
    critical_batch,
    data_constrained,
    filtering,
    kaplan,
    moe,
    moe_budgets,
    overtraining,
    rectified,
    shape_adaptive,
    step_law,
)
from jaxopt_suite.scaling_laws.laws.chinchilla import Chinchilla
from jaxopt_suite.scaling_laws.laws.compute import ComputeOnly, Saturating
from jaxopt_suite.scaling_laws.laws.critical_batch import (
    CriticalBatchByData,
    CriticalBatchBySize,
    StepsToTarget,
)
from jaxopt_suite.scaling_laws.laws.data_constrained import DataConstrained
from jaxopt_suite.scaling_laws.laws.diloco import (
    DiLoCoBatch,
    DiLoCoBatchAlone,
    DiLoCoLoss,
    DiLoCoLossAlone,
    DiLoCoLossFloor,
    DiLoCoRate,
    DiLoCoRateAlone,
    LocalSteps,
)
from jaxopt_suite.scaling_laws.laws.filtering import DataFiltering, DataFilteringAsReleased
from jaxopt_suite.scaling_laws.laws.kaplan import (
    Kaplan,
    KaplanCompute,
    KaplanCriticalBatch,
    KaplanData,
    KaplanSize,
    KaplanSteps,
)
from jaxopt_suite.scaling_laws.laws.moe import JointMoE
from jaxopt_suite.scaling_laws.laws.overtraining import DownstreamError, OverTraining
from jaxopt_suite.scaling_laws.laws.rectified import Rectified
from jaxopt_suite.scaling_laws.laws.shape_adaptive import ShapeAdaptive
from jaxopt_suite.scaling_laws.laws.step_law import StepLawBatch, StepLawRate

_LAWS = (
    Chinchilla,
    KaplanSize,
    KaplanData,
    KaplanCompute,
    Kaplan,
    KaplanSteps,
    KaplanCriticalBatch,
    DataConstrained,
    OverTraining,
    DownstreamError,
    JointMoE,
    Rectified,
    DataFiltering,
    DataFilteringAsReleased,
    StepsToTarget,
    CriticalBatchBySize,
    CriticalBatchByData,
    StepLawRate,
    StepLawBatch,
    DiLoCoLossAlone,
    DiLoCoRateAlone,
    DiLoCoBatchAlone,
    DiLoCoLoss,
    DiLoCoRate,
    DiLoCoBatch,
    DiLoCoLossFloor,
    LocalSteps,
    Saturating,
    ComputeOnly,
    ShapeAdaptive,
)

__all__ = [
    "Chinchilla",
    "ComputeOnly",
    "CriticalBatchByData",
    "CriticalBatchBySize",
    "DataConstrained",
    "DataFiltering",
    "DataFilteringAsReleased",
    "DiLoCoBatch",
    "DiLoCoBatchAlone",
    "DiLoCoLoss",
    "DiLoCoLossAlone",
    "DiLoCoLossFloor",
    "DiLoCoRate",
    "DiLoCoRateAlone",
    "DownstreamError",
    "JointMoE",
    "Kaplan",
    "KaplanCompute",
    "KaplanCriticalBatch",
    "KaplanData",
    "KaplanSize",
    "KaplanSteps",
    "LocalSteps",
    "OverTraining",
    "Rectified",
    "Saturating",
    "ShapeAdaptive",
    "StepLawBatch",
    "StepLawRate",
    "StepsToTarget",
    "communication",
    "critical_batch",
    "data_constrained",
    "filtering",
    "kaplan",
    "moe",
    "moe_budgets",
    "overtraining",
    "rectified",
    "registry",
    "shape_adaptive",
    "step_law",
]


def registry() -> dict[str, Law]:
    """Every law here by its name."""
    return {law.name: law for law in _LAWS}
