"""What every other part stands on: argument checks, tree helpers, random keys."""

from jaxopt_suite.core.checks import (
    check_choice,
    check_int,
    check_learning_rate,
    check_number,
    check_real_floating,
)
from jaxopt_suite.core.linalg import batch_factorisation
from jaxopt_suite.core.prng import leaf_keys
from jaxopt_suite.core.rows import by_runs, update_in_runs, update_rows, where_rows
from jaxopt_suite.core.trees import accumulator_dtype, batch_by_shape, map_unzip, tree_bytes
from jaxopt_suite.core.varying import alike, vary, varying_axes

__all__ = [
    "accumulator_dtype",
    "alike",
    "batch_by_shape",
    "batch_factorisation",
    "by_runs",
    "check_choice",
    "check_int",
    "check_learning_rate",
    "check_number",
    "check_real_floating",
    "leaf_keys",
    "map_unzip",
    "tree_bytes",
    "update_in_runs",
    "update_rows",
    "vary",
    "varying_axes",
    "where_rows",
]
