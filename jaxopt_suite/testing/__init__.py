"""The contract every gradient transformation keeps, as a check anybody can run on their own.

Example::

    import optax
    from jaxopt_suite import testing

    report = testing.check_transformation(optax.adamw, learning_rate=1e-3)
    print(report)              # one line a point: passed, failed with its smallest case, or n/a
    print(list(report.failed)) # e.g. moments_in_float32: bfloat16 parameters get bfloat16 moments

In a test of your own optimizer, ``testing.check_transformation(my_optimizer).raise_if_failed()``.
"""

from jaxopt_suite.testing.cases import Case
from jaxopt_suite.testing.contract import check_transformation, contract_points
from jaxopt_suite.testing.report import ContractReport, Failure, PointResult, Status

__all__ = [
    "Case",
    "ContractReport",
    "Failure",
    "PointResult",
    "Status",
    "check_transformation",
    "contract_points",
]
