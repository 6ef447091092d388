"""``check_transformation``: every point of the transformation contract, on any transformation."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import optax

from jaxopt_suite.testing import cases as cases_lib
from jaxopt_suite.testing import compare
from jaxopt_suite.testing import points_arguments as on_arguments
from jaxopt_suite.testing import points_numbers as on_numbers
from jaxopt_suite.testing import points_trees as on_trees
from jaxopt_suite.testing import points_wrappers as on_wrappers
from jaxopt_suite.testing.cases import Case
from jaxopt_suite.testing.report import ContractReport, Failure, PointResult, Status
from jaxopt_suite.testing.subject import Crashed, Subject
from jaxopt_suite.testing.workers import as_only_worker


@dataclasses.dataclass(frozen=True)
class Point:
    """One demand of the contract.

    Attributes:
      check: raises ``Violation`` (or anything) where the demand is not met, ``NotApplicable`` where
        it makes no sense. Its name and the first line of its docstring are the point's.
      cases: what it is tried on, smallest first.
      optional: whether it runs only when asked for by name.
    """

    check: Callable[[Subject, Case], None]
    cases: tuple[Case, ...]
    optional: bool = False

    @property
    def name(self) -> str:
        """What ``checks`` calls it."""
        return self.check.__name__

    @property
    def statement(self) -> str:
        """What it demands, in one line."""
        return (self.check.__doc__ or "").splitlines()[0]


@functools.cache
def _points() -> tuple[Point, ...]:
    """The contract, in the order it is checked."""
    trees = cases_lib.tree_cases()
    every = cases_lib.in_every_dtype(*trees)
    plain = cases_lib.in_every_dtype(cases_lib.plain_case())
    f32, wide, f16 = plain[:1], plain[:2], plain[2:]
    shapes = cases_lib.in_every_dtype(cases_lib.every_shape())
    construction = (Case("construction", None),)
    integer = (cases_lib.integer_case(),)
    return (
        Point(on_trees.returns_transformation, construction),
        Point(on_trees.runs_on_every_tree, every),
        Point(on_trees.finite_on_every_shape, shapes),
        Point(on_trees.keeps_tree, every),
        Point(on_trees.keeps_shapes, every),
        Point(on_trees.keeps_dtypes, every),
        Point(on_trees.state_is_arrays, every[: len(trees)]),
        Point(on_trees.state_keeps_its_form, every),
        Point(on_trees.moments_in_float32, every),
        Point(on_trees.follows_mu_dtype, f32),
        Point(on_trees.accepts_abstract_params, f32),
        Point(on_trees.factorisations_are_batched, f32),
        Point(on_trees.products_are_batched, f32, optional=True),
        Point(on_numbers.jit_equals_eager, f32),
        Point(on_numbers.pure, f32),
        Point(on_numbers.compiles_once, f32),
        Point(on_numbers.state_can_be_donated, f32),
        Point(on_numbers.counters_saturate, f32),
        Point(on_numbers.finite_on_zero_gradients, plain),
        Point(on_numbers.survives_huge_gradients, wide),
        Point(on_numbers.survives_tiny_gradients, wide),
        Point(on_numbers.survives_float16_extremes, f16),
        Point(on_numbers.vmap_equals_loop, f32),
        Point(on_numbers.differentiable, f32),
        Point(on_numbers.points_downhill, f32),
        Point(on_wrappers.inject_hyperparams, f32),
        Point(on_wrappers.injected_rate_is_used, f32),
        Point(on_wrappers.multi_steps, f32),
        Point(on_wrappers.masked, f32),
        Point(on_wrappers.partition, f32),
        Point(on_wrappers.apply_if_finite, f32),
        Point(on_wrappers.map_params, f32),
        Point(on_wrappers.extra_args, f32),
        Point(on_arguments.follows_schedules, f32),
        Point(on_arguments.weight_decay_is_decoupled, f32),
        Point(on_arguments.refuses_bad_learning_rate, construction),
        Point(on_arguments.refuses_bad_arguments, construction),
        Point(on_arguments.names_missing_params, f32),
        Point(on_arguments.refuses_integer_leaves, integer, optional=True),
    )


def contract_points() -> dict[str, str]:
    """Name and one-line statement of every point, those that run only by name included."""
    return {point.name: point.statement for point in _points()}


def check_transformation(
    make_tx: Callable[..., optax.GradientTransformation],
    *,
    learning_rate: float = 1e-2,
    static_args: Iterable[str] = (),
    bad_arguments: Iterable[Mapping[str, Any]] = (),
    extra_args: Mapping[str, Any] | None = None,
    axis_name: str | None = None,
    checks: Iterable[str] | None = None,
    rtol: float = 1e-5,
) -> ContractReport:
    """Checks a gradient transformation against every point of the contract.

    Whatever the transformation does, the answer is a report: a crash inside a point is that point's
    failure. A failed point shows the smallest tree found: cases go from small to large, and what
    fails on several leaves is tried again on each leaf alone.

    Args:
      make_tx: a factory such as ``optax.adamw``. The argument ``learning_rate``, or else the first
        one without a default, gets the learning rate; a factory without either is a raw rule. Bind
        other arguments with ``functools.partial``.
      learning_rate: the value to build with.
      static_args: arguments ``optax.inject_hyperparams`` must leave alone, beside those that the
        signature shows to be an int, a str, a bool or a callable.
      bad_arguments: keyword arguments the factory must refuse, such as ``[{"b1": 1.5}]``.
      extra_args: keyword arguments that every ``update`` needs, such as ``{"value": 1.0}``.
      axis_name: the axis over which the transformation communicates, if it does: it is then run as
        the only worker. The factory gets its own axis name, if it wants one, like any argument.
      checks: names of the points to check; ``None`` means all that are not optional.
      rtol: tolerance of float32 comparisons, relative to each leaf's largest magnitude. Methods
        that amplify rounding (SVD, then Adam) need more than the default.

    Returns:
      A ``ContractReport``; ``raise_if_failed()`` makes it a test.

    Raises:
      ValueError: if ``checks`` names an unknown point; the message lists the known ones.
      TypeError: if ``make_tx`` is not callable.
    """
    if not callable(make_tx):
        raise TypeError(f"make_tx must be a callable such as optax.adamw, got {make_tx!r}")
    points = _chosen(checks)
    subject = Subject(
        make_tx if axis_name is None else as_only_worker(make_tx, axis_name),
        learning_rate=learning_rate,
        static_args=static_args,
        bad_arguments=bad_arguments,
        extra_args=extra_args or {},
        rtol=rtol,
    )
    first, *rest = points
    results = [_result(first, subject)]
    built = results[0].status is Status.PASSED
    skip = compare.NotApplicable(f"there is no transformation to check (see {first.name})")
    results += [_result(point, subject) if built else _skipped(point, skip) for point in rest]
    return ContractReport(_name(make_tx), tuple(results))


def _chosen(checks: Iterable[str] | None) -> list[Point]:
    """The points to check; the first, that there is a transformation, always."""
    points = _points()
    if checks is None:
        return [point for point in points if not point.optional]
    wanted, known = set(checks), {point.name for point in points}
    if wanted - known:
        unknown, legal = ", ".join(sorted(wanted - known)), ", ".join(sorted(known))
        raise ValueError(f"unknown checks {unknown}; legal are {legal}")
    return [points[0], *(point for point in points[1:] if point.name in wanted)]


def _name(make_tx: Callable[..., Any]) -> str:
    while isinstance(make_tx, functools.partial):
        make_tx = make_tx.func
    return getattr(make_tx, "__name__", type(make_tx).__name__)


def _skipped(point: Point, reason: Exception) -> PointResult:
    return PointResult(point.name, point.statement, Status.NOT_APPLICABLE, 0.0, reason=str(reason))


def _result(point: Point, subject: Subject) -> PointResult:
    """Runs a point on its cases, up to the first that fails."""
    start, held, reason = time.perf_counter(), False, Exception("no case")
    for case in point.cases:
        error = _attempt(point, subject, case)
        if isinstance(error, compare.NotApplicable | Crashed):
            reason = error
        elif error is not None:
            failure = _shrunk(point, subject, case, error)
            seconds = time.perf_counter() - start
            return PointResult(point.name, point.statement, Status.FAILED, seconds, failure)
        else:
            held = True
    if not held:
        return _skipped(point, reason)
    return PointResult(point.name, point.statement, Status.PASSED, time.perf_counter() - start)


def _attempt(point: Point, subject: Subject, case: Case) -> Exception | None:
    try:
        point.check(subject, case)
    except Exception as error:  # the user's code may raise anything: all of it is a finding
        return error
    return None


def _shrunk(point: Point, subject: Subject, case: Case, error: Exception) -> Failure:
    """The failure on the smallest single leaf that fails likewise, else on the whole case."""
    for smaller in case.leaves_alone():
        again = _attempt(point, subject, smaller)
        if type(again) is type(error):
            case, error = smaller, again
            break
    tree = "" if case.like is None else str(case)
    if isinstance(error, compare.Violation):
        return Failure(case.name, tree, error.expected, error.found)
    return Failure(case.name, tree, "no exception", compare.one_line(error))
