"""Argument checks: what passes, and what the messages say."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_suite import core


@pytest.mark.parametrize("value", [0.5, 0, np.float32(0.5), jnp.asarray(0.5), np.asarray(0.5)])
def test_numbers_of_every_kind_pass(value):
    core.check_number("x", value, low=0.0, high=1.0)


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], np.ones(2), 1j])
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match="x must be a number, got"):
        core.check_number("x", value)


@pytest.mark.parametrize(
    ("bounds", "value", "interval"),
    [
        ({"low": 0.0, "high": 1.0}, 1.5, "[0, 1]"),
        ({"low": 0.0, "low_open": True}, 0.0, "(0, inf)"),
        ({"high": 1.0, "high_open": True}, 1.0, "(-inf, 1)"),
        ({}, float("inf"), "(-inf, inf)"),
        ({"low": 0.0}, float("nan"), "[0, inf)"),
    ],
)
def test_the_message_has_name_interval_and_value(bounds, value, interval):
    message = f"x must be in {interval}, got {value!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        core.check_number("x", value, **bounds)


def test_traced_values_pass():
    @jax.jit
    def f(x):
        core.check_number("x", x, low=10.0)
        return x

    assert f(1.0) == 1.0


def test_integers_refuse_bools_floats_and_arrays():
    core.check_int("k", np.int64(3))
    for value in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match="k must be an int, got"):
            core.check_int("k", value)
    with pytest.raises(TypeError, match=r"list 'k' in static_args of optax\.inject_hyperparams"):
        core.check_int("k", jnp.asarray(2))
    with pytest.raises(ValueError, match="k must be an int of at least 1, got 0"):
        core.check_int("k", 0)


def test_a_schedule_is_a_learning_rate_and_a_negative_number_is_not():
    core.check_learning_rate(lambda count: -count)
    with pytest.raises(ValueError, match="learning_rate must be in"):
        core.check_learning_rate(-1e-3)


def test_leaves_that_are_not_real_floats_are_named():
    core.check_real_floating({"a": jnp.ones(2, jnp.bfloat16), "b": None}, "rule")
    for leaf in (jnp.ones(2, jnp.int32), jnp.ones(2, jnp.complex64)):
        with pytest.raises(TypeError, match=rf"rule works on .* got {leaf.dtype} at \['a'\]\[1\]"):
            core.check_real_floating({"a": [jnp.ones(2), leaf]}, "rule")
