"""Points about values: the same ones compiled, batched and again, and finite ones at extremes."""

import copy
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_suite.testing import compare
from jaxopt_suite.testing.cases import Case, describe
from jaxopt_suite.testing.subject import STEPS, Subject, follow

_INT32_MAX = 2**31 - 1


def jit_equals_eager(subject: Subject, case: Case) -> None:
    """init and update compute the same with and without jax.jit."""
    params = case.params()
    initial = subject.tx.init(params)
    compare.require_equal(jax.jit(subject.tx.init)(params), initial, "state", rtol=subject.rtol)
    eager = functools.partial(subject.update, subject.tx)
    found = subject.run(case, [case.grads(0), case.grads(1)])
    expected = follow(subject.tx, eager, params, [case.grads(0), case.grads(1)])
    # XLA fuses and so reorders sums: equal to rounding, not to the bit.
    compare.require_equal(found, expected, "[step][updates, state]", rtol=subject.rtol)


def pure(subject: Subject, case: Case) -> None:
    """The same call twice gives the same bits, and arguments are left as they were."""
    tx, params, grads = subject.tx, case.params(), case.grads(0)
    state = tx.init(params)
    compare.require_equal(tx.init(params), state, "a second init: state")
    before = copy.deepcopy(jax.device_get((grads, _keys_as_data(state), params)))
    first = subject.update(tx, grads, state, params)
    second = subject.update(tx, grads, state, params)
    compare.require_equal(second, first, "a second update: [updates, state]")
    after = (grads, _keys_as_data(state), params)
    compare.require_equal(after, before, "the arguments [grads, state, params]")


def _keys_as_data(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if compare.is_key(x) else x, tree)


def compiles_once(subject: Subject, case: Case) -> None:
    """Step after step, one compiled program serves."""
    traces = []

    def counted(grads: Any, state: Any, params: Any) -> Any:
        traces.append(describe(state, limit=60))
        return subject.update(subject.tx, grads, state, params)

    follow(subject.tx, jax.jit(counted), case.params(), [case.grads(i) for i in range(STEPS)])
    found = f"{len(traces)}; the states: {'; '.join(traces)}"
    compare.require(len(traces) == 1, f"1 trace in {STEPS} steps", found)


def state_can_be_donated(subject: Subject, case: Case) -> None:
    """A fresh state and the parameters can both be donated: no array stands in them twice."""

    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = subject.update(subject.tx, grads, state, params)
        return optax.apply_updates(params, updates), state

    params = case.params()
    state = subject.tx.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a buffer that no output fits is no fault
        jax.block_until_ready(jax.jit(step, donate_argnums=(1, 2))(case.grads(0), state, params))


def counters_saturate(subject: Subject, case: Case) -> None:
    """Step counts are int32, stay at the largest int32 and do not turn negative."""
    state0, (_, state) = subject.tx.init(case.params()), subject.trajectory(case)[-1]
    counters = _counters(state0, state)
    if not counters:
        raise compare.NotApplicable("no integer scalar of the state changes over the steps")
    full = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full_like(x, _INT32_MAX) if path in counters else x, state
    )
    updates, after = subject.step(case.grads(0), full, case.params())
    for path, leaf in jax.tree_util.tree_leaves_with_path(after):
        if path in counters:
            where = f"state{jax.tree_util.keystr(path)}"
            compare.require(leaf.dtype == jnp.int32, f"{where} of dtype int32", str(leaf.dtype))
            compare.require(int(leaf) >= 0, f"{where} >= 0 after {_INT32_MAX} steps", str(leaf))
    compare.require_finite(updates, f"updates after {_INT32_MAX} steps: ")


def _counters(before: Any, after: Any) -> set[Any]:
    """Paths of the integer scalars that steps changed."""
    old, new = (jax.tree_util.tree_leaves_with_path(tree) for tree in (before, after))
    return {
        path
        for (path, x), (_, y) in zip(old, new, strict=True)
        if jnp.ndim(x) == 0 and jnp.issubdtype(jnp.result_type(x), jnp.integer) and x != y
    }


def finite_on_zero_gradients(subject: Subject, case: Case) -> None:
    """Gradients that are all zero, from the first step on, give finite updates."""
    zeros = jax.tree.map(jnp.zeros_like, case.params())
    for updates, state in subject.run(case, [zeros, zeros]):
        compare.require_finite(updates, "updates")
        compare.require_no_nan(state, "state")


def survives_huge_gradients(subject: Subject, case: Case) -> None:
    """Gradients of 1e30, whose squares overflow, leave updates finite and no NaN in the state."""
    _survives(subject, case, 1e30)


def survives_tiny_gradients(subject: Subject, case: Case) -> None:
    """Gradients of 1e-30, whose squares underflow, leave updates finite and no NaN in the state."""
    _survives(subject, case, 1e-30)


def survives_float16_extremes(subject: Subject, case: Case) -> None:
    """float16 gradients of 1e4 and of 1e-7 leave updates finite and no NaN in the state."""
    _survives(subject, case, 1e4)
    _survives(subject, case, 1e-7)


def _survives(subject: Subject, case: Case, scale: float) -> None:
    """Two steps at ``scale``, then an ordinary one, as after one bad batch."""
    grads = [case.grads(0, scale=scale), case.grads(1, scale=scale), case.grads(2)]
    for step, (updates, state) in enumerate(subject.run(case, grads)):
        size = f"{scale:g}" if step < 2 else f"1, after {scale:g}"
        compare.require_finite(updates, f"step {step}, gradients of {size}: updates")
        compare.require_no_nan(state, f"step {step}, gradients of {size}: state")


def vmap_equals_loop(subject: Subject, case: Case) -> None:
    """jax.vmap over a leading axis equals a Python loop over its members."""
    members = range(3)
    stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    params = [case.params(i) for i in members]
    grads = [[case.grads(10 * step + i) for step in range(2)] for i in members]
    loop = [
        [updates for updates, _ in follow(subject.tx, subject.step, params[i], grads[i])]
        for i in members
    ]
    step = jax.jit(jax.vmap(functools.partial(subject.update, subject.tx)))
    state, found = jax.vmap(subject.tx.init)(stack(params)), []
    for i in range(2):
        updates, state = step(stack([g[i] for g in grads]), state, stack(params))
        found.append(updates)
    # Batched products may sum in another order: equal to rounding.
    compare.require_equal(found, stack(loop), "updates[step]", rtol=subject.rtol)


def differentiable(subject: Subject, case: Case) -> None:
    """The derivative of an update with respect to the gradients is finite."""
    state = subject.trajectory(case)[0][1]
    params, weights = case.params(), case.grads(7)

    def loss(grads: Any) -> jax.Array:
        updates, _ = subject.update(subject.tx, grads, state, params)
        return jnp.asarray(sum(jnp.vdot(w, u) for w, u in _pairs(weights, updates)))

    try:
        slopes = jax.jit(jax.grad(loss))(case.grads(1))
    except Exception as error:
        undefined = ("ifferentiation", "does not support reverse-mode", "JVP")
        if isinstance(error, NotImplementedError) or any(text in str(error) for text in undefined):
            # JAX itself has no reverse-mode rule for something the method needs.
            raise compare.NotApplicable(compare.one_line(error)) from error
        raise
    compare.require_finite(slopes, "derivative")


def _pairs(first: Any, second: Any) -> list[tuple[Any, Any]]:
    return list(zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


def points_downhill(subject: Subject, case: Case) -> None:
    """The first update of a recipe points against the gradient: it is added to the parameters."""
    if subject.rate_name is None:
        raise compare.NotApplicable("a raw rule, without a learning rate, may have either sign")
    updates = subject.trajectory(case)[0][0]
    products = (np.vdot(g, u) for g, u in _pairs(case.grads(0), updates))
    slope = float(sum(products))
    compare.require(slope < 0, "<updates, gradients> below 0", f"{slope:g}")
