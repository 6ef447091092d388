"""Values as JSON has them."""

import json

import numpy as np

from jaxopt_suite.core.plain import plain


def test_arrays_and_what_is_not_finite_have_a_place_in_json():
    value = {"a": np.array([1.0, np.nan]), "b": (np.float32(0.5), np.int64(2)), "c": [np.inf, "x"]}
    found = plain(value)
    assert found == {"a": [1.0, None], "b": [0.5, 2], "c": [None, "x"]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
