"""Runs two implementations on the same gradients and measures how far apart they come out.

The measure, for one array: the largest absolute difference over the largest magnitude of the
official result. It is taken twice, and the larger number counts:

- *Updates*: every step starts from parameters that are zero, so that the new parameters are the
  update itself and no digits are lost to subtraction. The largest over all leaves and steps.
- *Parameters*: the ordinary trajectory from parameters of order one, after the last step, with
  weight decay where both sides define it alike. The largest over all leaves.

Everything is float32, as the official code would run, unless a case has gradients in float64.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 25
LEARNING_RATE = 0.01
LIMIT = 1e-5  # float32 rounding over 25 steps, with a margin of about ten
EPS = 1e-6  # of both official repositories
RANK = 4
# Layout (out, in), as in PyTorch. Sizes at which the official divisor rule and ours agree.
SHAPES = {"square": (32, 32), "tall": (64, 16), "wide": (16, 64), "vector": (32,)}

Arrays = dict[str, np.ndarray]


def gradients(shapes: Mapping[str, tuple[int, ...]] = SHAPES, *, seed: int = 0) -> list[Arrays]:
    """Gradients whose signs change from step to step, and whose scale does too.

    A matrix has ``RANK`` well separated singular values and small noise, so that its leading
    singular vectors are defined in float32 up to sign; a vector is normal. Each fifth step has
    exact zeros.
    """
    rng = np.random.default_rng(seed)

    def one(shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:
            return rng.standard_normal(shape)
        left, right = (np.linalg.qr(rng.standard_normal((n, RANK)))[0] for n in shape)
        strong = (left * np.linspace(16.0, 8.0, RANK)) @ right.T
        return strong + 0.1 * rng.standard_normal(shape)

    steps = []
    for step in range(STEPS):
        scale = 10.0 ** rng.uniform(-1.0, 1.0)
        grads = {name: scale * one(shape) for name, shape in shapes.items()}
        if step % 5 == 4:
            for g in grads.values():
                g[: len(g) // 8] = 0.0
        steps.append({name: g.astype(np.float32) for name, g in grads.items()})
    return steps


def full_rank_gradients(
    shapes: Mapping[str, tuple[int, ...]], *, steps: int, dtype: str = "float32", seed: int = 0
) -> list[Arrays]:
    """Normal gradients whose scale changes from step to step: every mode's statistic has full rank.

    For methods that take roots or eigenvectors of it, which in a null space rounding makes up.
    """
    rng = np.random.default_rng(seed)
    draw = lambda shape, scale: (scale * rng.standard_normal(shape)).astype(dtype)
    scales = 10.0 ** rng.uniform(-1.0, 1.0, steps)
    return [{name: draw(shape, scale) for name, shape in shapes.items()} for scale in scales]


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of a method, set up on both sides.

    Attributes:
      name: what is special about it.
      settings: what both sides were given, for the row.
      ours: weight decay -> transformation.
      official: (parameters by name, weight decay) -> ``torch.optim.Optimizer``.
      transposed: whether ours gets each matrix in Flax's layout (in, out) rather than (out, in).
      weight_decay: for the comparison of parameters.
      gradients: makes one dict for each step, in the official layout; float64 ones make both sides
        compute in float64.
      limit: on the relative difference; above ``LIMIT`` only for a reason that its file gives,
        and below it where both sides compute in float64.
      feed: our state after a step -> context in which the official side takes the same step; lets
        it use our random draws.
    """

    name: str
    settings: Mapping[str, Any]
    ours: Callable[[float], optax.GradientTransformation]
    official: Callable[[dict[str, Any], float], Any]
    transposed: bool = True
    weight_decay: float = 0.0
    gradients: Callable[[], list[Arrays]] = gradients
    limit: float = LIMIT
    feed: Callable[[Any], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclasses.dataclass(frozen=True)
class Departure:
    """Where our default is not what the official code does.

    Attributes:
      sentence: what differs.
      measure: how far that takes the results apart, by the measure above; ``None`` where there is
        nothing to run.
    """

    sentence: str
    measure: Callable[[], float] | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A method and its official implementation.

    Attributes:
      name: as on the command line and in the row.
      repository: ``owner/name`` on GitHub.
      marks: files that a clone of it has, relative to its root.
      packages: distributions the official code needs, PyTorch included.
      build: the imported official code -> cases and departures; see ``reference.load``.
      module: the file to import, relative to the root.
      stand_ins: modules that the file imports and that need not run, with the names it takes from
        each: empty ones are put in their places while it is imported.
    """

    name: str
    repository: str
    marks: tuple[str, ...]
    packages: tuple[str, ...]
    module: str
    build: Callable[[Any], tuple[list[Case], list[Departure]]]
    stand_ins: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest relative difference found, and where; ``step`` counts from 1."""

    value: float
    leaf: str
    step: int


def relative_difference(ours: np.ndarray, official: np.ndarray) -> float:
    """Largest absolute difference over the largest magnitude of ``official``.

    Infinite if either holds a value that is not finite, or if only ``official`` is all zeros.

    Raises:
      ValueError: if the shapes differ.
    """
    if ours.shape != official.shape:
        raise ValueError(f"shapes differ: ours {ours.shape}, official {official.shape}")
    ours, official = ours.astype(np.float64), official.astype(np.float64)
    if not (np.isfinite(ours).all() and np.isfinite(official).all()):
        return float("inf")
    difference = float(np.max(np.abs(ours - official), initial=0.0))
    scale = float(np.max(np.abs(official), initial=0.0))
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale


def largest_difference(ours: list[Arrays], official: list[Arrays]) -> Difference:
    """The largest ``relative_difference`` over steps and leaves."""
    found = [
        Difference(relative_difference(mine[name], theirs[name]), name, step)
        for step, (mine, theirs) in enumerate(zip(ours, official, strict=True), start=1)
        for name in theirs
    ]
    return max(found, key=lambda difference: difference.value)


def run(
    case: Case,
    grads: list[Arrays],
    *,
    from_zero: bool,
    weight_decay: float = 0.0,
    ours: optax.GradientTransformation | None = None,
) -> tuple[list[Arrays], list[Arrays]]:
    """Both sides' parameters after each step, ours in the official layout.

    Args:
      case: the configuration.
      grads: one dict for each step, in the official layout (out, in).
      from_zero: whether parameters are set to zero before each step.
      weight_decay: for both sides.
      ours: another transformation in place of the case's own.
    """
    rng = np.random.default_rng(1)
    start = {name: rng.standard_normal(g.shape).astype(g.dtype) for name, g in grads[0].items()}
    pairs = []
    with _precision(next(iter(start.values())).dtype):
        official = _Official(case, start, weight_decay)
        mine = _Ours(case, start, ours or case.ours(weight_decay))
        for g in grads:
            here = mine.step(g, from_zero)
            with case.feed(mine.state):
                pairs.append((here, official.step(g, from_zero)))
    return [a for a, _ in pairs], [b for _, b in pairs]


@contextlib.contextmanager
def _precision(dtype: np.dtype) -> Iterator[None]:
    """Both sides may compute in this dtype; official states are often made in PyTorch's default."""
    import torch  # the reference's own dependency, none of ours

    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype.name))
    try:
        with jax.enable_x64(dtype == np.float64):
            yield
    finally:
        torch.set_default_dtype(before)


def difference_of_updates(
    case: Case,
    ours: optax.GradientTransformation | None = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Difference:
    """Updates of both sides, each step from zero; see the module's text."""
    grads = case.gradients() if shapes is None else gradients(shapes)
    return largest_difference(*run(case, grads, from_zero=True, ours=ours))


def difference_of_parameters(case: Case, *, weight_decay: float) -> Difference:
    """Parameters of both sides after the last step; see the module's text."""
    ours, official = run(case, case.gradients(), from_zero=False, weight_decay=weight_decay)
    last = largest_difference(ours[-1:], official[-1:])
    return dataclasses.replace(last, step=len(ours))


class _Ours:
    """Our side of a run."""

    def __init__(self, case: Case, start: Arrays, tx: optax.GradientTransformation) -> None:
        self._case = case
        self._params = self._turned(start)
        self.state = tx.init(self._params)
        self._update = jax.jit(tx.update)

    def _turned(self, arrays: Arrays) -> dict[str, jax.Array]:
        turn = lambda x: x.T if self._case.transposed else x
        return {name: jnp.asarray(turn(x)) for name, x in arrays.items()}

    def step(self, grads: Arrays, from_zero: bool) -> Arrays:
        if from_zero:
            self._params = jax.tree.map(jnp.zeros_like, self._params)
        updates, self.state = self._update(self._turned(grads), self.state, self._params)
        self._params = optax.apply_updates(self._params, updates)
        turn = lambda x: np.asarray(x).T if self._case.transposed else np.asarray(x)
        return {name: turn(x) for name, x in self._params.items()}


class _Official:
    """The official side of a run."""

    def __init__(self, case: Case, start: Arrays, weight_decay: float) -> None:
        import torch  # the reference's own dependency, none of ours

        self._torch = torch
        self._params = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
        self._optimizer = case.official(self._params, weight_decay)

    def step(self, grads: Arrays, from_zero: bool) -> Arrays:
        for name, param in self._params.items():
            if from_zero:
                param.data.zero_()
            param.grad = self._torch.tensor(grads[name])
        self._optimizer.step()
        return {name: param.detach().numpy().copy() for name, param in self._params.items()}
