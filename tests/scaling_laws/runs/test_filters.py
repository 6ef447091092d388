"""Expressions over columns."""

import numpy as np
import pytest

from jaxopt_suite.scaling_laws.runs.filters import mask_of

COLUMNS = {
    "N": np.array([1.0, 2.0, 3.0]),
    "seed": np.array([0.0, np.nan, 2.0]),
    "optimizer": np.array(["adamw", "muon", ""], object),
}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("N > 1", [False, True, True]),
        ("1 < N <= 2", [False, True, False]),
        ("N == 1 or N == 3", [True, False, True]),
        ("not N == 1", [False, True, True]),
        ("optimizer == 'adamw'", [True, False, False]),
        ("optimizer in ['adamw', 'muon'] and N != 2", [True, False, False]),
        ("optimizer not in ('adamw',)", [False, True, True]),
        ("seed >= 0", [True, False, True]),
        ("N ** 2 / 2 - 1 > -N + 4", [False, False, True]),
        ("N * 2 < 1 + 3", [True, False, False]),
        ("1 < 2", [True, True, True]),
    ],
)
def test_expressions_mean_what_they_say(text, kept):
    assert list(mask_of(text, COLUMNS)) == kept


def test_a_function_gets_all_columns():
    assert list(mask_of(lambda c: c["N"] == c["N"].max(), COLUMNS)) == [False, False, True]


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        ("tokens > 1", "names 'tokens', which is not one of N, seed, optimizer"),
        ("N >", "must be an expression"),
        ("N + 1", "one truth value for each of 3 rows"),
        ("__import__('os')", "cannot have"),
        ("N.size > 1", "cannot have 'N.size'"),
        ("optimizer > 3", "cannot be compared"),
        (lambda c: [True], "one truth value for each of 3 rows"),
    ],
)
def test_what_is_no_such_expression_is_refused(keep, told):
    with pytest.raises(ValueError, match=told):
        mask_of(keep, COLUMNS)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="keep must be text, a function or None, got list"):
        mask_of([True], COLUMNS)
