"""Points about trees, shapes and dtypes. Most are traced only, so that many trees cost little."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_suite.testing import arguments, compare
from jaxopt_suite.testing.cases import Case, describe
from jaxopt_suite.testing.subject import Crashed, Subject

# Each costs a launch and compiles slowly: wanted is one batch per shape, not one call per leaf.
_PRODUCTS = frozenset({"dot_general"})
_FACTORISATIONS = frozenset(
    {"cholesky", "eig", "eigh", "geqrf", "householder_product", "lu", "qr", "schur", "svd"}
)


def returns_transformation(subject: Subject, case: Case) -> None:
    """The factory returns an optax.GradientTransformation."""
    del case  # nothing is initialised yet
    kind = type(subject.tx).__name__
    found = isinstance(subject.tx, optax.GradientTransformation)
    compare.require(found, "an optax.GradientTransformation", kind)


def runs_on_every_tree(subject: Subject, case: Case) -> None:
    """init and update trace on every kind of tree in float32, bfloat16 and float16."""
    subject.trace(case)


def finite_on_every_shape(subject: Subject, case: Case) -> None:
    """Ordinary gradients give finite updates on leaves of every shape."""
    traced = {name: like for name, like in case.like.items() if _traces(subject, name, like)}
    if not traced:
        raise Crashed("does not trace on any tree: see runs_on_every_tree")
    case = Case(case.name, traced)
    for updates, _ in subject.run(case, [case.grads(0), case.grads(1)]):
        compare.require_finite(updates, "updates")


def _traces(subject: Subject, name: str, like: Any) -> bool:
    try:
        subject.abstract(Case(name, like))
    except Crashed:
        return False
    return True


def keeps_tree(subject: Subject, case: Case) -> None:
    """Updates have the gradients' tree structure: containers, None and MaskedNode included."""
    compare.require_same_tree(subject.abstract(case).updates1, case.like, "updates")


def keeps_shapes(subject: Subject, case: Case) -> None:
    """Updates have the gradients' shapes."""
    updates = _updates_in_tree(subject, case)
    compare.require_same_shapes(updates, case.like, "updates")


def keeps_dtypes(subject: Subject, case: Case) -> None:
    """Updates have the gradients' dtypes."""
    updates = _updates_in_tree(subject, case)
    compare.require_same_dtypes(updates, case.like, "updates")


def _updates_in_tree(subject: Subject, case: Case) -> Any:
    updates = subject.abstract(case).updates1
    if jax.tree.structure(updates) != jax.tree.structure(case.like):
        raise compare.NotApplicable("the updates are of another tree (see keeps_tree)")
    return updates


def state_is_arrays(subject: Subject, case: Case) -> None:
    """The state is a pytree of arrays only: no Python number, string or function in it."""
    subject.abstract(case)
    for path, leaf in compare.paths_and_leaves(subject.tx.init(case.params())):
        found = f"{type(leaf).__name__} {leaf!r}"
        is_array = isinstance(leaf, jax.Array | np.ndarray)
        compare.require(is_array, f"an array at state{path}", found)


def state_keeps_its_form(subject: Subject, case: Case) -> None:
    """update returns a state of the structure, shapes and dtypes it was given."""
    traced = subject.abstract(case)
    for before, after in itertools.pairwise([traced.state0, traced.state1, traced.state2]):
        compare.require_same_tree(after, before, "state")
        compare.require_same_shapes(after, before, "state")
        compare.require_same_dtypes(after, before, "state")


def accepts_abstract_params(subject: Subject, case: Case) -> None:
    """jax.eval_shape(tx.init, shapes) gives the form of the real state."""
    abstract = jax.eval_shape(subject.tx.init, case.like)
    real = subject.tx.init(case.params())
    compare.require_same_tree(abstract, real, "abstract state")
    for (path, a), r in zip(compare.paths_and_leaves(abstract), jax.tree.leaves(real), strict=True):
        found, expected = (a.shape, a.dtype), (jnp.shape(r), jnp.result_type(r))
        compare.require(found == expected, f"abstract state{path} {expected}", str(found))


def moments_in_float32(subject: Subject, case: Case) -> None:
    """Moments are at least float32 unless an argument *_dtype asks for less."""
    chosen = arguments.chosen_dtypes(subject.signature)
    for path, leaf in compare.paths_and_leaves(subject.abstract(case).state0):
        moment = compare.is_floating(leaf) and len(leaf.shape) > 0
        if moment and leaf.dtype.itemsize < 4:
            compare.require(leaf.dtype in chosen, f"state{path} in float32", str(leaf.dtype))


def follows_mu_dtype(subject: Subject, case: Case) -> None:
    """mu_dtype is the dtype of a moment, and stays it."""
    if "mu_dtype" not in subject.signature.parameters:
        raise compare.NotApplicable("no argument named mu_dtype")
    try:
        tx = subject.make(mu_dtype=jnp.bfloat16)
    except ValueError as error:
        if "mu_dtype" not in str(error):
            raise
        raise compare.NotApplicable(f"refused with a reason: {error}") from error
    state = jax.eval_shape(tx.init, case.like)
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(state)}
    compare.require("bfloat16" in dtypes, "a bfloat16 moment with mu_dtype=bfloat16", str(dtypes))
    updates, after = jax.eval_shape(
        lambda g, s, p: subject.update(tx, g, s, p), case.like, state, case.like
    )
    compare.require_same_dtypes(after, state, "state with mu_dtype=bfloat16")
    compare.require_same_dtypes(updates, case.like, "updates with mu_dtype=bfloat16")


def factorisations_are_batched(subject: Subject, case: Case) -> None:
    """Matrix factorisations grow with the number of shapes, not of leaves."""
    _require_batched(subject, case, _FACTORISATIONS)


def products_are_batched(subject: Subject, case: Case) -> None:
    """Matrix products grow with the number of shapes, not of leaves.

    Optional: it pays for iterated products, such as those of an orthogonalisation; for a single
    product per leaf and step, stacking copies more than it saves.
    """
    _require_batched(subject, case, _PRODUCTS)


def _require_batched(subject: Subject, case: Case, primitives: frozenset[str]) -> None:
    subject.abstract(case)
    leaf = max(jax.tree.leaves(case.like), key=lambda x: (len(x.shape), math.prod(x.shape)))
    few, many = (
        _matrix_calls(subject, {f"w{i}": leaf for i in range(n)}, primitives) for n in (2, 5)
    )
    if few == 0:
        raise compare.NotApplicable("none in the traced update")
    text = f"{few} for 5 leaves of {describe(leaf)}, as for 2"
    compare.require(many <= few, text, str(many))


def _matrix_calls(subject: Subject, like: Any, primitives: frozenset[str]) -> int:
    state = jax.eval_shape(subject.tx.init, like)
    update = lambda g, s, p: subject.update(subject.tx, g, s, p)
    return sum(
        eqn.primitive.name in primitives and all(v.aval.ndim >= 2 for v in eqn.invars)
        for eqn in _equations(jax.make_jaxpr(update)(like, state, like).jaxpr)
    )


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a traced program, those inside loops and branches included.

    Of what is written for several platforms the default is the program: a CPU may take what an
    accelerator has as one batch in calls of their own.
    """
    for eqn in jaxpr.eqns:
        yield eqn
        params = dict(eqn.params)
        platforms = params.get("branches_platforms")
        if platforms is not None and None in platforms:
            params["branches"] = params["branches"][platforms.index(None)]
        for value in jax.tree.leaves(list(params.values()), is_leaf=_is_program):
            if _is_program(value):
                yield from _equations(getattr(value, "jaxpr", value))


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
