"""The checker itself: a sound transformation passes, each broken one fails exactly its points.

A broken transformation is the sound one with one thing wrong. The set beside it is everything that
fails: a wrong thing that shows in several points (a state that changes its form breaks lax.cond in
MultiSteps too) has several.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_suite import core, testing


class MomentumState(NamedTuple):
    count: jax.Array  # int32 []
    mu: Any  # float32, shapes of the parameters


def _zeros(p: jax.Array) -> jax.Array:
    return jnp.zeros(p.shape, jnp.float32)


def momentum(
    decay: float = 0.9,
    *,
    zeros: Callable[[Any], Any] = _zeros,
    count: Callable[[Any], Any] = optax.safe_increment,
    mean: Callable[[Any, Any], Any] | None = None,
    out: Callable[[Any, Any], Any] = lambda m, g: m.astype(g.dtype),
) -> optax.GradientTransformation:
    """The sound rule; the hooks are where a broken one differs, leaf by leaf."""
    mean = mean or (lambda m, g: decay * m + (1 - decay) * g.astype(m.dtype))

    def init(params: Any) -> MomentumState:
        core.check_real_floating(params, "momentum")
        return MomentumState(jnp.zeros([], jnp.int32), jax.tree.map(zeros, params))

    def update(updates: Any, state: MomentumState, params: Any = None) -> Any:
        del params
        mu = jax.tree.map(mean, state.mu, updates)
        return jax.tree.map(out, mu, updates), MomentumState(count(state.count), mu)

    return optax.GradientTransformation(init, update)


def recipe(learning_rate: Any, rule: optax.GradientTransformation) -> Any:
    core.check_learning_rate(learning_rate)
    return optax.chain(rule, optax.scale_by_learning_rate(learning_rate))


def around(inner: Any, update: Callable[..., Any], init: Any = None) -> Any:
    """The transformation ``inner`` with another update: ``update(inner, grads, state, params)``."""
    # MultiSteps passes params by name.
    new = lambda updates, state, params=None: update(inner, updates, state, params)
    return optax.GradientTransformation(init or inner.init, new)


def sound(
    learning_rate: optax.ScalarOrSchedule,
    decay: float = 0.9,
    weight_decay: float = 0.0,
    mask: Any = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    core.check_number("decay", decay, low=0.0, high=1.0)
    core.check_learning_rate(learning_rate)
    zeros = lambda p: jnp.zeros(p.shape, mu_dtype or jnp.float32)
    return optax.chain(
        momentum(decay, zeros=zeros),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


# --- trees, shapes, dtypes


def returns_a_pair(learning_rate: float) -> Any:
    return tuple(sound(learning_rate))


def crashes_on_scalars(learning_rate: float) -> Any:
    return recipe(learning_rate, momentum(out=lambda m, g: (m / m.shape[0]).astype(g.dtype)))


def breaks_under_masked(learning_rate: float) -> Any:
    def update(inner: Any, grads: Any, state: Any, params: Any) -> Any:
        is_masked = lambda x: isinstance(x, optax.MaskedNode)
        shapes = jax.tree.map(lambda g: g.shape, grads, is_leaf=is_masked)
        del shapes
        return inner.update(grads, state, params)

    return around(sound(learning_rate), update)


def divides_by_zero_on_scalars(learning_rate: float) -> Any:
    return recipe(learning_rate, momentum(out=lambda m, g: (m / (m.size - 1)).astype(g.dtype)))


def loses_none_leaves(learning_rate: float) -> Any:
    def update(inner: Any, grads: Any, state: Any, params: Any) -> Any:
        updates, state = inner.update(grads, state, params)
        if isinstance(updates, dict):
            updates = {name: u for name, u in updates.items() if u is not None}
        return updates, state

    return around(sound(learning_rate), update)


def flattens_tensors(learning_rate: float) -> Any:
    out = lambda m, g: (m.reshape(-1) if m.ndim > 2 else m).astype(g.dtype)
    return recipe(learning_rate, momentum(out=out))


def promotes_dtypes(learning_rate: float) -> Any:
    return recipe(learning_rate, momentum(out=lambda m, g: m))


def keeps_a_python_float(learning_rate: float) -> Any:
    tx = sound(learning_rate)
    init = lambda params: (0.5, tx.init(params))

    def update(inner: Any, grads: Any, state: Any, params: Any) -> Any:
        updates, new = inner.update(grads, state[1], params)
        return updates, (state[0], new)

    return around(tx, update, init)


def drifts_in_dtype(learning_rate: float) -> Any:
    zeros = lambda p: jnp.zeros(p.shape, jnp.float16)
    mean = lambda m, g: 0.9 * m.astype(jnp.float32) + 0.1 * g
    return recipe(learning_rate, momentum(zeros=zeros, mean=mean))


def keeps_moments_in_bfloat16(learning_rate: float) -> Any:
    return recipe(learning_rate, momentum(zeros=lambda p: jnp.zeros(p.shape, jnp.bfloat16)))


def ignores_mu_dtype(learning_rate: float, mu_dtype: Any = None) -> Any:
    del mu_dtype
    return sound(learning_rate)


def reads_values_in_init(learning_rate: float) -> Any:
    tx = sound(learning_rate)

    def init(params: Any) -> Any:
        if any(float(jnp.sum(p)) > 1e9 for p in jax.tree.leaves(params)):
            raise ValueError("parameters too large")
        return tx.init(params)

    return optax.GradientTransformation(init, tx.update)


def factorises_leaf_by_leaf(learning_rate: float) -> Any:
    def out(m: Any, g: Any) -> Any:
        if m.ndim != 2 or m.size == 0:
            return m.astype(g.dtype)
        u, s, vt = jnp.linalg.svd(m, full_matrices=False)
        return (u @ jnp.diag(s) @ vt).astype(g.dtype)

    return recipe(learning_rate, momentum(out=out))


# --- numbers


def acts_differently_when_traced(learning_rate: float) -> Any:
    factor = lambda g: 1.0 if isinstance(g, jax.core.Tracer) else 1.5
    return recipe(learning_rate, momentum(out=lambda m, g: (factor(g) * m).astype(g.dtype)))


def counts_calls_outside_the_state(learning_rate: float) -> Any:
    calls = []

    def update(inner: Any, grads: Any, state: Any, params: Any) -> Any:
        calls.append(1)
        updates, state = inner.update(grads, state, params)
        return jax.tree.map(lambda u: u * (1.0 + len(calls)), updates), state

    return around(sound(learning_rate), update)


def writes_into_its_argument(learning_rate: float) -> Any:
    tx = sound(learning_rate)

    def update(inner: Any, grads: Any, state: Any, params: Any) -> Any:
        updates, state["inner"] = inner.update(grads, state["inner"], params)
        return updates, state

    return around(tx, update, lambda params: {"inner": tx.init(params)})


@functools.partial(jax.tree_util.register_dataclass, data_fields=["inner"], meta_fields=["steps"])
class StaticCount:
    def __init__(self, inner: Any, steps: int) -> None:
        self.inner, self.steps = inner, steps


def recompiles_every_step(learning_rate: float) -> Any:
    tx = sound(learning_rate)

    def update(inner: Any, grads: Any, state: Any, params: Any) -> Any:
        updates, new = inner.update(grads, state.inner, params)
        return updates, StaticCount(new, state.steps + 1)

    return around(tx, update, lambda params: StaticCount(tx.init(params), 0))


def keeps_one_array_twice(learning_rate: float) -> Any:
    tx = sound(learning_rate)

    def init(params: Any) -> Any:
        zero = jnp.zeros([], jnp.float32)
        return tx.init(params), zero, zero

    def update(inner: Any, grads: Any, state: Any, params: Any) -> Any:
        updates, new = inner.update(grads, state[0], params)
        return updates, (new, state[1] + 1.0, state[2] + 2.0)

    return around(tx, update, init)


def overflows_its_count(learning_rate: float) -> Any:
    return recipe(learning_rate, momentum(count=lambda n: n + 1))


def divides_by_the_norm(learning_rate: float) -> Any:
    def out(m: Any, g: Any) -> Any:
        largest = jnp.max(jnp.abs(m), initial=0.0)
        return jnp.where(m.size > 0, m / largest, m).astype(g.dtype)

    return recipe(learning_rate, momentum(out=out))


def squares_without_care(learning_rate: float) -> Any:
    return recipe(learning_rate, momentum(out=lambda m, g: (m * m / (m + 1e-9)).astype(g.dtype)))


def normalises_with_a_naive_guard(learning_rate: float) -> Any:
    def out(m: Any, g: Any) -> Any:
        unit = m / jnp.sqrt(jnp.mean(m * m))  # the square of 1e-30 is zero, as no guard below sees
        return jnp.where(jnp.any(m != 0), unit, m).astype(g.dtype)

    return recipe(learning_rate, momentum(out=out))


def scales_up_in_float16(learning_rate: float) -> Any:
    return recipe(learning_rate, momentum(out=lambda m, g: (1e5 * m).astype(g.dtype)))


def normalises_over_the_batch(learning_rate: float) -> Any:
    @jax.custom_batching.custom_vmap
    def normalised(m: Any) -> Any:
        return m / (1.0 + jnp.linalg.norm(m))

    @normalised.def_vmap
    def _(axis_size: int, in_batched: Any, m: Any) -> Any:
        del axis_size
        return m / (1.0 + jnp.linalg.norm(m)), in_batched[0]

    return recipe(learning_rate, momentum(out=lambda m, g: normalised(m).astype(g.dtype)))


def has_an_infinite_slope(learning_rate: float) -> Any:
    out = lambda m, g: (m + jnp.sqrt(jnp.abs(g - jax.lax.stop_gradient(g)))).astype(g.dtype)
    return recipe(learning_rate, momentum(out=out))


def points_uphill(learning_rate: float) -> Any:
    return recipe(learning_rate, momentum(out=lambda m, g: -m.astype(g.dtype)))


# --- wrappers


def asks_python_about_the_rate(learning_rate: float) -> Any:
    if not learning_rate >= 0:
        raise ValueError(f"learning_rate must not be negative, got {learning_rate}")
    return sound(learning_rate)


def freezes_the_rate(learning_rate: float, other: float = 1.0) -> Any:
    del other
    core.check_learning_rate(learning_rate)
    return sound(1e-2)


def mixes_leaves(learning_rate: float) -> Any:
    def update(inner: Any, grads: Any, state: Any, params: Any) -> Any:
        leaves = jax.tree.leaves(grads, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
        scaled = jax.tree.map(lambda g: g / max(len(leaves), 1), grads)
        return inner.update(scaled, state, params)

    return around(sound(learning_rate), update)


def flattens_its_state(learning_rate: float) -> Any:
    def init(params: Any) -> Any:
        core.check_real_floating(params, "flattens_its_state")
        return [jnp.zeros(p.shape, jnp.float32) for p in jax.tree.leaves(params)]

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        del params
        leaves, treedef = jax.tree.flatten(grads)
        new = [0.9 * m + 0.1 * g for m, g in zip(state, leaves, strict=True)]
        updates = [m.astype(g.dtype) for m, g in zip(new, leaves, strict=True)]
        return treedef.unflatten(updates), new

    return recipe(learning_rate, optax.GradientTransformation(init, update))


def knows_one_extra_argument(learning_rate: float) -> Any:
    tx = sound(learning_rate)
    update = lambda updates, state, params=None, *, value=None: tx.update(updates, state, params)
    return optax.GradientTransformationExtraArgs(tx.init, update)


# --- arguments


def ignores_its_schedule(learning_rate: optax.ScalarOrSchedule) -> Any:
    return sound(learning_rate(0) if callable(learning_rate) else learning_rate)


def couples_weight_decay(learning_rate: float, weight_decay: float = 0.0, mask: Any = None) -> Any:
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), sound(learning_rate))


def takes_any_rate(learning_rate: float) -> Any:
    return optax.chain(momentum(), optax.scale(-1.0 * learning_rate))


def takes_any_decay(learning_rate: float, decay: float = 0.9) -> Any:
    return recipe(learning_rate, momentum(decay))


def crashes_without_params(learning_rate: float) -> Any:
    def update(inner: Any, grads: Any, state: Any, params: Any) -> Any:
        return inner.update(jax.tree.map(lambda g, p: g + 0 * p, grads, params), state, params)

    return around(sound(learning_rate), update)


def moves_integers(learning_rate: float) -> Any:
    core.check_learning_rate(learning_rate)
    return optax.sgd(learning_rate)


BROKEN: dict[Callable[..., Any], set[str]] = {
    returns_a_pair: {"returns_transformation"},
    crashes_on_scalars: {"runs_on_every_tree"},
    breaks_under_masked: {"runs_on_every_tree", "masked", "partition"},
    divides_by_zero_on_scalars: {"finite_on_every_shape"},
    loses_none_leaves: {"keeps_tree"},
    flattens_tensors: {"keeps_shapes"},
    promotes_dtypes: {"keeps_dtypes"},
    keeps_a_python_float: {"state_is_arrays"},
    drifts_in_dtype: {
        *("state_keeps_its_form", "moments_in_float32", "compiles_once"),
        *("multi_steps", "apply_if_finite"),
    },
    keeps_moments_in_bfloat16: {"moments_in_float32"},
    ignores_mu_dtype: {"follows_mu_dtype"},
    reads_values_in_init: {
        *("runs_on_every_tree", "accepts_abstract_params", "jit_equals_eager", "vmap_equals_loop"),
    },
    factorises_leaf_by_leaf: {"factorisations_are_batched", "products_are_batched"},
    acts_differently_when_traced: {"jit_equals_eager"},
    counts_calls_outside_the_state: {
        *("pure", "jit_equals_eager", "vmap_equals_loop", "inject_hyperparams", "multi_steps"),
        *("masked", "partition", "apply_if_finite", "extra_args"),
    },
    writes_into_its_argument: {"pure", "jit_equals_eager", "multi_steps", "apply_if_finite"},
    recompiles_every_step: {
        *("state_keeps_its_form", "compiles_once", "multi_steps", "apply_if_finite"),
    },
    keeps_one_array_twice: {"state_can_be_donated"},
    overflows_its_count: {"counters_saturate"},
    divides_by_the_norm: {"finite_on_zero_gradients"},
    squares_without_care: {"survives_huge_gradients"},
    normalises_with_a_naive_guard: {"survives_tiny_gradients"},
    scales_up_in_float16: {"survives_float16_extremes"},
    normalises_over_the_batch: {"vmap_equals_loop"},
    has_an_infinite_slope: {"differentiable"},
    points_uphill: {"points_downhill"},
    asks_python_about_the_rate: {"inject_hyperparams", "injected_rate_is_used"},
    freezes_the_rate: {"injected_rate_is_used"},
    mixes_leaves: {"masked", "partition"},
    flattens_its_state: {"map_params"},
    knows_one_extra_argument: {"extra_args"},
    ignores_its_schedule: {"follows_schedules"},
    couples_weight_decay: {"weight_decay_is_decoupled"},
    takes_any_rate: {"refuses_bad_learning_rate"},
    takes_any_decay: {"refuses_bad_arguments"},
    crashes_without_params: {"names_missing_params"},
    moves_integers: {"refuses_integer_leaves"},
}


def _check(make_tx: Callable[..., Any], **options: Any) -> testing.ContractReport:
    return testing.check_transformation(make_tx, checks=testing.contract_points(), **options)


def test_a_sound_transformation_passes_every_point() -> None:
    report = _check(sound, bad_arguments=[{"decay": 1.5}, {"decay": -0.1}])
    report.raise_if_failed()
    assert report.ok
    assert set(report.not_applicable) == {"factorisations_are_batched", "products_are_batched"}


@pytest.mark.parametrize("make_tx", BROKEN, ids=lambda make_tx: make_tx.__name__)
def test_each_broken_transformation_fails_exactly_its_points(make_tx: Callable[..., Any]) -> None:
    bad = [{"decay": 1.5}] if make_tx is takes_any_decay else []
    report = _check(make_tx, bad_arguments=bad)
    assert set(report.failed) == BROKEN[make_tx], str(report)
    with pytest.raises(AssertionError, match=f"{make_tx.__name__} breaks"):
        report.raise_if_failed()


def test_every_point_is_failed_by_some_broken_transformation() -> None:
    assert set().union(*BROKEN.values()) == set(testing.contract_points())


def test_adamw_fails_what_optax_decided_otherwise() -> None:
    report = _check(optax.adamw)
    assert set(report.failed) == {
        "moments_in_float32",  # moments take the parameters' dtype
        "finite_on_zero_gradients",  # eps=1e-8 is zero in float16: 0 / 0
        "survives_float16_extremes",  # the same
        "refuses_bad_learning_rate",  # nothing is checked at construction
        "refuses_integer_leaves",  # nothing is checked at init
    }


def test_a_failure_names_the_smallest_case_and_what_was_found() -> None:
    report = testing.check_transformation(promotes_dtypes, checks=["keeps_dtypes"])
    failure = report["keeps_dtypes"].failure
    assert failure is not None
    assert (failure.case, failure.tree) == ("scalar, bfloat16", "bfloat16[]")
    assert (failure.expected, failure.found) == ("updates(the leaf) of dtype bfloat16", "float32")
    assert "FAILED  keeps_dtypes" in str(report)
    assert failure.tree in str(report)


def test_a_failure_on_a_tree_is_shrunk_to_one_leaf() -> None:
    report = testing.check_transformation(points_uphill, checks=["points_downhill"])
    failure = report["points_downhill"].failure
    assert failure is not None
    assert failure.tree == "{'leaf': float32[4]}"


def test_only_the_points_asked_for_run_and_unknown_ones_are_refused() -> None:
    report = testing.check_transformation(sound, checks=["masked"])
    assert [result.name for result in report.results] == ["returns_transformation", "masked"]
    with pytest.raises(ValueError, match=r"unknown checks maskd; legal are .*masked"):
        testing.check_transformation(sound, checks=["maskd"])
    with pytest.raises(TypeError, match="make_tx must be a callable"):
        testing.check_transformation(sound(1e-2))  # type: ignore[arg-type]


def test_optional_points_run_only_by_name() -> None:
    left_out = set(testing.contract_points()) - {
        result.name for result in testing.check_transformation(returns_a_pair).results
    }
    assert left_out == {"refuses_integer_leaves", "products_are_batched"}


def test_a_factory_that_raises_gives_a_report_in_which_nothing_else_applies() -> None:
    def explodes(learning_rate: float) -> Any:
        raise RuntimeError(f"no rule for {learning_rate}\nsecond line")

    report = _check(explodes)
    failure = report["returns_transformation"].failure
    assert failure is not None
    assert failure.found == "RuntimeError: no rule for 0.01"
    assert len(report.not_applicable) == len(report.results) - 1


def test_raw_rules_need_no_learning_rate_and_extra_arguments_are_passed() -> None:
    checks = ["compiles_once", "points_downhill", "refuses_bad_learning_rate", "multi_steps"]
    report = testing.check_transformation(optax.scale_by_adam, checks=checks)
    assert set(report.not_applicable) == {"points_downhill", "refuses_bad_learning_rate"}
    assert report.ok
    needy = testing.check_transformation(
        optax.polyak_sgd, extra_args={"value": 1.0}, checks=["compiles_once", "masked"]
    )
    needy.raise_if_failed()


def test_signatures_tell_schedules_and_static_arguments_apart() -> None:
    from jaxopt_suite.testing.subject import Subject

    def factory(
        learning_rate: optax.ScalarOrSchedule,
        rank: int = 2,
        period: int | None = None,
        mode: str = "a",
        fast: bool = False,
        fn: Callable[[Any], Any] = np.abs,
        decay: "float" = 0.9,
        weight_decay: "optax.ScalarOrSchedule" = 0.0,
    ) -> Any: ...

    subject = Subject(
        factory, learning_rate=1.0, static_args=(), bad_arguments=(), extra_args={}, rtol=0.0
    )
    assert subject.static_args == {"rank", "period", "mode", "fast", "fn"}
