"""Just One Byte: zeroth-order gradients, a byte for each sample of each worker."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_suite import core
from jaxopt_suite.core.collectives import bound_axis_size, gather_equal
from jaxopt_suite.optimizers import _common

# A byte is 127 for zero, 127 ± (64 + e) for ± exp(e / 8) with e in -63..63, or 255 for no sample.
_STEPS = 8  # to a factor of e: neighbours are 13% apart
_LARGEST = 63
_ZERO = 127
_ABSENT = 255


class ScaleByOneByteState(NamedTuple):
    """State of ``scale_by_one_byte``: a counter, equal on all workers."""

    count: jax.Array  # type: ignore[assignment]  # int32 []: updates so far


def scale_by_one_byte(
    *,
    axis_name: str,
    samples: int = 1,
    perturbation: jax.typing.ArrayLike = 1e-3,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Estimates the gradient of the workers' mean loss from differences of losses.

    Written for one worker $w$ with loss $L_w$ on its own data. Parameters $x$ are equal on all
    workers. For each of its samples $i$ it draws a direction $z_{w,i}$ of normal numbers and
    evaluates its loss twice; what it finds, rounded to a byte by $Q$, goes to all:

    $$\rho_{w,i} = Q\!\left(\frac{L_w(x + \epsilon z_{w,i}) - L_w(x - \epsilon z_{w,i})}
    {2\epsilon}\right), \quad u = \frac1N \sum_{w,i} \rho_{w,i} z_{w,i}.$$

    A direction follows from the seed, the count of updates, the worker, the sample and the leaf's
    path, so that every worker makes every other's again and none travels. $N$ counts the samples
    that are there. The gradients given to ``update`` are not read: hand in any tree like the
    parameters, the parameters themselves for instance.

    **The byte.** $Q$ keeps the sign and the logarithm, in steps of 1/8: magnitudes from 3.8e-4 to
    2.6e3 have an error of at most 6.5%, larger ones become 2.6e3, and those below half of the
    smallest become zero. That is 255 codes; the last one says that there is no sample.

    **Coming and going.** ``active=`` (a bool or number, this worker's own) says whether the worker
    takes part in this step. One that does not sends the code for no sample, so that all workers
    drop it from the same means, without having to agree on a list first. It still gets the others'
    bytes and stays equal to them; one that was really away starts again from another's parameters
    and state, which is the count alone. A difference of losses that is not finite is no sample
    either. If there is none at all the update is zero.

    **Wire.** One all-gather of ``samples`` bytes: (n - 1) ``samples`` from each of n workers. For a
    TPU XLA makes an all-reduce of whole words of it: 960 bytes each for 16 workers of 4 samples.

    Cost a step: 2 ``samples`` losses, no backward pass, and n ``samples`` directions, made by every
    worker. The variance of the estimate grows with the number of parameters: this is for
    fine-tuning with small steps.

    Memory: nothing but a counter; while it runs one direction and the sum in float32, 8mn bytes
    for an m-by-n matrix.

    Departures from the paper and its code (ezelikman/justonebyte): the byte is really sent (there
    it is computed, but the full number travels, and its 510 codes would not fit); $x \pm \epsilon
    z$ is computed from $x$ each time, so that nothing drifts and no steps are replayed; the sum is
    divided by N, not by its root. Streams of random numbers are JAX's and may change with its
    version: all workers must run the same one.

    Args:
      axis_name: the workers' axis, of ``parallel.run_workers``.
      samples: directions a worker tries each step.
      perturbation: ε, above 0.
      seed: of the directions.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs ``params`` and the extra
      argument ``value_fn``, from parameters (float32 or wider: ε z would be lost in bfloat16) to
      this worker's loss, a scalar without randomness of its own; ``active`` is optional. Updates
      have the dtypes of the tree handed in.

    Raises:
      ValueError, TypeError: for an argument out of range; at ``init``, for a leaf that is not real
        floating point; at ``update``, without ``params``, for a loss that is not a scalar, or if
        ``axis_name`` is not bound.

    References:
      Zelikman, Huang, Liang, Haber, Goodman, "Just One Byte (per gradient): A Note on Low-Bandwidth
      Decentralized Language Model Finetuning Using Shared Randomness", 2023, arXiv:2306.10015.
    """
    core.check_int("samples", samples)
    core.check_number("perturbation", perturbation, low=0.0, low_open=True)
    core.check_int("seed", seed, low=0)
    link = _Link(axis_name, samples, perturbation, seed)
    return optax.GradientTransformationExtraArgs(link.init, link.update)  # type: ignore[arg-type]


def encode(projections: jax.Array, active: jax.typing.ArrayLike = True) -> jax.Array:
    """Numbers as bytes of sign and logarithm; see ``scale_by_one_byte``.

    Args:
      projections: float32, any shape.
      active: whether there are any; false makes all of them absent, as those that are not finite.

    Returns:
      uint8, same shape.
    """
    magnitude = jnp.abs(projections)
    exponent = jnp.round(_STEPS * jnp.log(magnitude))
    steps = jnp.clip(exponent, -_LARGEST, _LARGEST).astype(jnp.int32) + _LARGEST + 1
    signed = jnp.where(projections < 0, -steps, steps)
    codes = _ZERO + jnp.where(magnitude < 0.5 * np.exp(-_LARGEST / _STEPS), 0, signed)
    there = jnp.isfinite(projections) & jnp.asarray(active, bool)
    return jnp.where(there, codes, _ABSENT).astype(jnp.uint8)


def decode(codes: jax.Array) -> jax.Array:
    """The numbers that bytes stand for, float32; 0 for one that is absent.

    From a table, so that no two machines' exponentials can differ.
    """
    return jnp.asarray(_numbers())[codes.astype(jnp.int32)]


@functools.cache
def _numbers() -> np.ndarray:
    steps = np.arange(256) - _ZERO
    numbers = np.sign(steps) * np.exp((np.abs(steps) - _LARGEST - 1) / _STEPS)
    numbers[_ABSENT] = 0.0
    return numbers.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Link:
    """What ``scale_by_one_byte`` was called with, checked."""

    axis_name: str
    samples: int
    perturbation: jax.typing.ArrayLike
    seed: int

    def init(self, params: optax.Params) -> ScaleByOneByteState:
        core.check_real_floating(params, "one_byte")
        return ScaleByOneByteState(jnp.zeros((), jnp.int32))

    def update(
        self,
        updates: optax.Updates,
        state: ScaleByOneByteState,
        params: optax.Params | None = None,
        *,
        value_fn: Callable[[Any], jax.Array],
        active: jax.typing.ArrayLike = True,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByOneByteState]:
        del extra_args
        workers = bound_axis_size(self.axis_name, "one_byte")
        if params is None:
            raise ValueError("one_byte evaluates losses near the parameters: give params to update")
        directions = functools.partial(self._directions, params, state.count)
        projections = self._projections(params, value_fn, directions)
        codes = gather_equal(encode(projections, active), self.axis_name)
        total = self._sum(codes.reshape(-1), workers, params, directions)
        present = jnp.maximum(jnp.sum(codes != _ABSENT), 1).astype(jnp.float32)
        mean = jax.tree.map(lambda u, x: (x / present).astype(u.dtype), updates, total)
        return mean, ScaleByOneByteState(optax.safe_increment(state.count))

    def _directions(
        self, params: optax.Params, count: jax.Array, worker: jax.Array, sample: jax.Array
    ) -> optax.Params:
        """One direction: float32, shapes of params."""
        with_paths, structure = jax.tree_util.tree_flatten_with_path(params)
        keys = core.leaf_keys(self.seed, [path for path, _ in with_paths], count, worker, sample)
        return structure.unflatten(
            [
                jax.random.normal(key, jnp.shape(x), jnp.float32)
                for key, (_, x) in zip(keys, with_paths, strict=True)
            ]
        )

    def _projections(
        self,
        params: optax.Params,
        value_fn: Callable[[Any], jax.Array],
        directions: Callable[..., optax.Params],
    ) -> jax.Array:
        """This worker's differences of losses, float32 ``[samples]``."""
        worker = jax.lax.axis_index(self.axis_name)

        def of_one(sample: jax.Array) -> jax.Array:
            direction = directions(worker, sample)

            def loss(epsilon: jax.Array) -> jax.Array:
                move = lambda x, z: x.astype(core.accumulator_dtype(x)) + epsilon * z
                value = jnp.asarray(value_fn(jax.tree.map(move, params, direction)))
                if value.shape:
                    raise ValueError(f"value_fn must return a scalar, got shape {value.shape}")
                return value.astype(core.accumulator_dtype(value))

            epsilon = jnp.asarray(self.perturbation, jnp.float32)
            return ((loss(epsilon) - loss(-epsilon)) / (2 * epsilon)).astype(jnp.float32)

        return jax.lax.map(of_one, jnp.arange(self.samples))

    def _sum(
        self,
        codes: jax.Array,
        workers: int,
        params: optax.Params,
        directions: Callable[..., optax.Params],
    ) -> optax.Params:
        """The sum of all workers' samples, in their order: float32, shapes of params."""

        def add(total: optax.Params, sample: Sequence[jax.Array]) -> tuple[optax.Params, None]:
            code, worker, index = sample
            rho = decode(code)

            def present() -> optax.Params:
                return jax.tree.map(lambda t, z: t + rho * z, total, directions(worker, index))

            return jax.lax.cond(code != _ABSENT, present, lambda: total), None

        which = jnp.repeat(jnp.arange(workers), self.samples)
        index = jnp.tile(jnp.arange(self.samples), workers)
        zeros = jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), params)
        return jax.lax.scan(add, zeros, (codes, which, index))[0]


def one_byte(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _common.Mask = None,
    *,
    axis_name: str,
    samples: int = 1,
    perturbation: jax.typing.ArrayLike = 1e-3,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Descent along estimates of a byte each: ``scale_by_one_byte``, decay, learning rate.

    Its ``update`` needs the extra argument ``value_fn`` and reads no gradients, so it is no recipe
    for a train step that differentiates; call it under ``parallel.run_workers``.

    Args:
      learning_rate: step size, at least 0, or a schedule of the step count.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: tree of bools, or a function of the parameters returning one: which leaves decay.
      axis_name: see ``scale_by_one_byte``, as the following.
      samples: see ``scale_by_one_byte``.
      perturbation: see ``scale_by_one_byte``.
      seed: see ``scale_by_one_byte``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_suite import parallel
      >>> from jaxopt_suite.optimizers.one_byte import one_byte
      >>> tx = one_byte(0.03, axis_name="worker", samples=4)
      >>> def worker(x, target):
      ...     loss = lambda x: jnp.sum((x - target) ** 2)
      ...     def step(carry, _):
      ...         x, state = carry
      ...         updates, state = tx.update(x, state, x, value_fn=loss)
      ...         return (optax.apply_updates(x, updates), state), None
      ...     return jax.lax.scan(step, (x, tx.init(x)), length=200)[0][0]
      >>> targets = jnp.arange(8.0).reshape(4, 2)
      >>> x = parallel.run_workers(worker, axis_name="worker", in_axes=(None, 0))(
      ...     jnp.zeros(2), targets)
      >>> bool(jnp.all(jnp.abs(x - targets.mean(0)) < 0.5))
      True

    References:
      Zelikman et al., "Just One Byte (per gradient)", 2023, arXiv:2306.10015; Malladi et al.,
      "Fine-Tuning Language Models with Just Forward Passes", 2023, arXiv:2305.17333.
    """
    rule = scale_by_one_byte(
        axis_name=axis_name, samples=samples, perturbation=perturbation, seed=seed
    )
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)
