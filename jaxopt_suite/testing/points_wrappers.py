"""Points about optax's wrappers: inside each, the transformation does what it does alone."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite.testing import compare
from jaxopt_suite.testing.cases import Case
from jaxopt_suite.testing.subject import STEPS, Subject, follow

_OTHER_RATE = 0.5


def _updates(steps: list[tuple[Any, Any]]) -> list[Any]:
    return [updates for updates, _ in steps]


def inject_hyperparams(subject: Subject, case: Case) -> None:
    """optax.inject_hyperparams gives the updates of the plain transformation."""
    tx = _injected(subject)
    grads = [case.grads(i) for i in range(STEPS)]
    found = follow(tx, subject.compile(tx), case.params(), grads)
    expected = subject.trajectory(case)
    # Injected numbers are float32 arrays: 1 - 0.999 keeps four of its seven digits.
    tolerance = 10 * subject.rtol
    compare.require_equal(_updates(found), _updates(expected), "updates[step]", rtol=tolerance)


def injected_rate_is_used(subject: Subject, case: Case) -> None:
    """A learning rate changed in the state of optax.inject_hyperparams changes the next update."""
    if subject.rate_name is None:
        raise compare.NotApplicable("no learning rate")
    tx, params = _injected(subject), case.params()
    step, state = subject.compile(tx), tx.init(params)
    rate = state.hyperparams[subject.rate_name]
    changed = state._replace(hyperparams=state.hyperparams | {subject.rate_name: 2 * rate})
    before, after = (step(case.grads(0), s, params)[0] for s in (state, changed))
    text = f"other updates after {subject.rate_name} is doubled in the state"
    compare.require(compare.differs(after, before), text, "the same updates")


def _injected(subject: Subject) -> optax.GradientTransformation:
    parameters = subject.signature.parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise compare.NotApplicable("inject_hyperparams cannot read *args or **kwargs")
    if not any(p.name not in subject.static_args for p in parameters):
        raise compare.NotApplicable("no argument to inject")
    wrapped = optax.inject_hyperparams(subject.make_tx, static_args=subject.static_args)
    return wrapped(**subject.keywords())


def multi_steps(subject: Subject, case: Case) -> None:
    """optax.MultiSteps(every_k_schedule=2) steps on the mean gradient, every second time."""
    tx = optax.MultiSteps(subject.tx, every_k_schedule=2).gradient_transformation()
    grads = [case.grads(i) for i in range(4)]
    found = _updates(follow(tx, subject.compile(tx), case.params(), grads))
    means = [jax.tree.map(lambda a, b: a + (b - a) / 2, *grads[i : i + 2]) for i in (0, 2)]
    expected = _updates(subject.run(case, means))
    zeros = jax.tree.map(jnp.zeros_like, case.params())
    compare.require_equal(found[0::2], [zeros, zeros], "updates between steps")
    compare.require_equal(found[1::2], expected, "updates[step]", rtol=subject.rtol)


def masked(subject: Subject, case: Case) -> None:
    """Under optax.masked its part is treated as if alone, and the rest is left untouched."""
    tx = optax.masked(subject.tx, lambda _: {"in": True, "out": False})
    for step, (found, grads) in enumerate(_halves(subject, case, tx)):
        compare.require_equal(found["out"], grads["out"], f"step {step}, masked-out updates")


def partition(subject: Subject, case: Case) -> None:
    """Under optax.partition, beside another rule, its part is treated as if alone."""
    transforms = {"in": subject.tx, "out": optax.sgd(_OTHER_RATE)}
    tx = optax.partition(transforms, {"in": "in", "out": "out"})
    for step, (found, grads) in enumerate(_halves(subject, case, tx)):
        expected = jax.tree.map(lambda g: -_OTHER_RATE * g, grads["out"])
        compare.require_equal(found["out"], expected, f"step {step}, the other rule's updates")


def _halves(
    subject: Subject, case: Case, tx: optax.GradientTransformation
) -> list[tuple[Any, Any]]:
    """Checks that ``tx`` treats ``in`` as if it were alone; returns updates and gradients."""
    grads = [{"in": case.grads(i), "out": case.grads(i + 20)} for i in range(2)]
    params = {"in": case.params(), "out": case.params(1)}
    found = _updates(follow(tx, subject.compile(tx), params, grads))
    alone = [{"in": g["in"]} for g in grads]
    steps = follow(subject.tx, subject.step, {"in": case.params()}, alone)
    inside = [{"in": updates["in"]} for updates in found]
    compare.require_equal(inside, _updates(steps), "updates[step]", rtol=subject.rtol)
    return list(zip(found, grads, strict=True))


def apply_if_finite(subject: Subject, case: Case) -> None:
    """Under optax.apply_if_finite a NaN gradient changes nothing, now or later."""
    tx, params = optax.apply_if_finite(subject.tx, max_consecutive_errors=3), case.params()
    bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    steps = follow(tx, subject.compile(tx), params, [case.grads(0), bad, case.grads(1)])
    zeros = jax.tree.map(jnp.zeros_like, params)
    compare.require_equal(steps[1][0], zeros, "updates for a NaN gradient")
    inner = [state.inner_state for _, state in steps]
    compare.require_equal(inner[1], inner[0], "inner state after a NaN gradient")
    expected = _updates(subject.trajectory(case))[:2]
    found = [steps[0][0], steps[2][0]]
    compare.require_equal(found, expected, "updates[step]", rtol=subject.rtol)


def map_params(subject: Subject, case: Case) -> None:
    """optax.tree.map_params visits the state's parameter-shaped leaves and leaves scalars alone."""
    state = subject.tx.init(case.params())
    mapped = optax.tree.map_params(subject.tx, lambda _: "visited", state)
    compare.require_same_tree(mapped, state, "mapped state")
    shapes = {leaf.shape for leaf in jax.tree.leaves(case.like)} - {()}
    for (path, found), leaf in zip(
        compare.paths_and_leaves(mapped), jax.tree.leaves(state), strict=True
    ):
        visited = isinstance(found, str)
        if jnp.shape(leaf) in shapes:
            compare.require(visited, f"state{path} visited as a parameter", "not visited")
        elif not visited:
            compare.require(found is leaf, f"state{path} left as it is", repr(found))


def extra_args(subject: Subject, case: Case) -> None:
    """In optax.chain, an extra argument meant for another link is accepted and changes nothing."""
    tx, params = optax.chain(subject.tx, optax.identity()), case.params()
    step = jax.jit(lambda g, s: tx.update(g, s, params, **subject.extra_args, other_links_=1.0))
    updates, _ = step(case.grads(0), tx.init(params))
    expected = subject.trajectory(case)[0][0]
    compare.require_equal(updates, expected, "updates", rtol=subject.rtol)
