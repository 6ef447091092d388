"""1-bit Adam: Adam until its second moment has settled, then one bit an entry of the momentum."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxopt_suite import core
from jaxopt_suite.core.collectives import any_worker, bound_axis_size
from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers._shards import layout_of, run_on_shards
from jaxopt_suite.optimizers.compression import pieces
from jaxopt_suite.optimizers.compression.exchange import mean_of_buffer
from jaxopt_suite.optimizers.compression.mean import DenseRule, default_dense
from jaxopt_suite.optimizers.compression.packing import pack
from jaxopt_suite.optimizers.compression.signs import SignPayload, sign

_BITS = sign("l2")
_NO_KEY: Any = None  # signs draw nothing


class ScaleByOnebitAdamState(NamedTuple):
    """State of ``scale_by_onebit_adam``: for an m-by-n matrix 16mn bytes; counters and a flag.

    The errors have no arrays for leaves that are not compressed.
    """

    count: jax.Array  # type: ignore[assignment]  # int32 []: updates so far
    dense_count: jax.Array  # int32 []: of these, in the dense stage
    compressed: jax.Array  # bool []: whether the second moment is frozen and momenta are compressed
    norms: Any  # float32 [variance_interval]: norms of the last second moments; or nothing
    mu: optax.Updates  # float32, shapes of params: momentum, equal on all workers
    nu: optax.Updates  # float32, shapes of params: second moment, equal on all workers
    error: optax.Updates  # float32, shapes of params: what this worker's messages left out
    owner_error: optax.Updates  # float32, shapes of params: the same of the pieces it owns, else 0


def scale_by_onebit_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    axis_name: str,
    warmup_steps: int,
    variance_ratio: jax.typing.ArrayLike | None = None,
    variance_interval: int | None = None,
    variance_floor: jax.typing.ArrayLike = 0.0,
    bias_correction: bool = True,
    dense: DenseRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam on the mean of all workers' gradients, whose momentum is later exchanged in one bit.

    Written for one worker of $n$, with gradient $g_w$. The *dense stage* is Adam: with
    $\bar g = \frac1n\sum_w g_w$,

    $$m \leftarrow \beta_1 m + (1-\beta_1)\bar g, \quad v \leftarrow \beta_2 v +
    (1-\beta_2)\bar g^2, \quad u = \frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^T)} + \epsilon}.$$

    Then $v$ is frozen after its $T$-th update, so that the step is linear in $m$, whose errors can
    be fed back. In the *compressed stage* each worker adds its own gradient to the common momentum,
    sends signs with one scale a leaf, and remembers in $e_w$ what that leaves out:

    $$y_w = \beta_1 m + (1-\beta_1) g_w + e_w, \quad
    c_w = \tfrac{\|y_w\|_2}{\sqrt d}\,\mathrm{sgn}(y_w), \quad e_w \leftarrow y_w - c_w.$$

    Every worker owns a piece of each leaf, of $p$ entries. It averages that piece of all messages,
    its own too, compresses the mean likewise with a memory of its own, and sends it to all:

    $$z = \tfrac1n \textstyle\sum_w c_w + s, \quad
    m \leftarrow \tfrac{\|z\|_2}{\sqrt p}\,\mathrm{sgn}(z), \quad s \leftarrow z - m.$$

    **When the dense stage ends.** After ``warmup_steps`` updates; with ``variance_ratio``, at the
    first step from there on at which $\|v_t\|_1 / \|v_{t-\Delta}\|_1$ (bias-corrected, over all
    leaves that are to be compressed) is at least that: the paper's rule, with a ratio of 0.96,
    Δ = 1/(1 - b2) and ``warmup_steps`` those of the learning rate.

    **Small second moments.** The sign gives every entry of a piece the same magnitude, and the step
    of an entry whose frozen $v$ is far below the others' is large: rows of rare tokens are thrown
    about. An entry that never had a gradient ($v = 0$) does not move here. For the others there is
    ``variance_floor``; or send such leaves dense.

    **Wire**, per worker and step, of a leaf with $d$ entries: 8 d (n - 1)/n bytes in the dense
    stage; 2 (n - 1)(p/8 + 4) in the compressed one, with p = d/n rounded up to a multiple of 8: a
    32nd. All pieces for one worker travel in one buffer of whole lines of 128 bytes. The two stages
    are branches of one conditional in one program, of which a step runs one: a count of the
    program's bytes lists both as conditional. Leaves that are not compressed have the dense stage's
    bytes always, and go on with Adam, second moment and all. If ``update`` is given
    ``param_specs=`` (``make_train_step`` does so), each device talks along ``axis_name`` only, and
    its part of a leaf is a message of its own, with its own scales.

    **Non-finite numbers.** A NaN or infinity in one worker's gradient is in its scale, and so in
    everybody's momentum. All workers then give NaN in every leaf and keep the whole state as it
    was, at no extra collective.

    Memory, for an m-by-n matrix: 16mn bytes, twice that of Adam. The owner's error fills an n-th of
    its array: no array depends on the number of workers, or on the mesh.

    Departures from the official code (deepspeedai/DeepSpeed): it has no bias correction
    (``bias_correction=False``); it compresses all leaves (a ``dense`` that is never true); it pads
    leaves to a multiple of 8n entries, which then take part in scales and errors; its entries with
    v = 0 do move, unless they are masked by hand; its first step is lost; its errors are set to
    zero when a checkpoint is loaded.

    Args:
      b1: decay of the momentum, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, at least 0.
      eps_root: added under the root, at least 0.
      axis_name: the workers' axis, of ``parallel.run_workers`` or ``make_train_step``.
      warmup_steps: updates in the dense stage, at least 1: 15 to 25 % of a run in the paper.
      variance_ratio: the dense stage goes on until the second moment has settled to this ratio,
        above 0; ``None`` ends it after ``warmup_steps``.
      variance_interval: Δ, in updates; ``None`` is 1/(1 - b2), rounded.
      variance_floor: in the compressed stage, a second moment counts as at least this fraction of
        its leaf's mean, at least 0.
      bias_correction: correct both moments as Adam does.
      dense: ``(path, leaf) -> bool``, the leaves that stay in the dense stage. ``None``: those of
        fewer than 1024 elements.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; updates keep their dtype, arithmetic is in
      float32.

    Raises:
      ValueError, TypeError: for an argument out of range; at ``init``, for a leaf that is not real
        floating point; at ``update``, if ``axis_name`` is not bound, or specs for a leaf are
        missing.

    References:
      Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
      Speed", 2021, arXiv:2102.02888.
    """
    _common.check_adam_arguments(b1=b1, b2=b2, eps=eps, eps_root=eps_root)
    core.check_int("warmup_steps", warmup_steps)
    core.check_number("variance_floor", variance_floor, low=0.0)
    link = _Link(
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        axis_name=axis_name,
        warmup_steps=warmup_steps,
        ratio=variance_ratio,
        interval=_interval(variance_ratio, variance_interval, b2),
        floor=variance_floor,
        corrected=bias_correction,
        dense=default_dense(_BITS) if dense is None else dense,
    )
    return optax.GradientTransformationExtraArgs(link.init, link.update)  # type: ignore[arg-type]


def _interval(ratio: Any, interval: int | None, b2: Any) -> int:
    """Δ, checked; 0 where there is no ratio."""
    if ratio is None:
        if interval is not None:
            raise ValueError(f"variance_interval={interval} needs a variance_ratio, got None")
        return 0
    core.check_number("variance_ratio", ratio, low=0.0, low_open=True)
    if interval is None:
        if isinstance(b2, jax.core.Tracer):
            raise ValueError("variance_interval must be given where b2 is traced")
        interval = round(1 / (1 - float(b2)))
    core.check_int("variance_interval", interval)
    return interval


class _Leaf(NamedTuple):
    """A gradient and what the state has for it; or the layouts of these."""

    g: Any
    mu: Any
    nu: Any
    error: Any
    owner_error: Any


@dataclasses.dataclass(frozen=True)
class _Link:
    """What ``scale_by_onebit_adam`` was called with, checked."""

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    eps_root: jax.typing.ArrayLike
    axis_name: str
    warmup_steps: int
    ratio: jax.typing.ArrayLike | None
    interval: int
    floor: jax.typing.ArrayLike
    corrected: bool
    dense: DenseRule

    def _is_dense(self, path: Any, leaf: Any) -> bool:
        return jnp.size(leaf) == 0 or self.dense(path, leaf)

    def init(self, params: optax.Params) -> ScaleByOnebitAdamState:
        core.check_real_floating(params, "onebit_adam")
        zeros = lambda p: jnp.zeros(jnp.shape(p), jnp.float32)

        def error(path: Any, p: Any) -> Any:
            if self._is_dense(path, p):
                return optax.MaskedNode()
            return core.vary(zeros(p), self.axis_name)

        return ScaleByOnebitAdamState(
            count=jnp.zeros((), jnp.int32),
            dense_count=jnp.zeros((), jnp.int32),
            compressed=jnp.zeros((), bool),
            norms=jnp.zeros(self.interval) if self.interval else optax.MaskedNode(),
            mu=jax.tree.map(zeros, params),
            nu=jax.tree.map(zeros, params),
            error=jax.tree_util.tree_map_with_path(error, params),
            owner_error=jax.tree_util.tree_map_with_path(error, params),
        )

    def update(
        self,
        updates: optax.Updates,
        state: ScaleByOnebitAdamState,
        params: optax.Params | None = None,
        *,
        param_specs: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByOnebitAdamState]:
        del params, extra_args  # the rule reads gradients only
        bound_axis_size(self.axis_name, "onebit_adam")
        with_paths, structure = jax.tree_util.tree_flatten_with_path(updates)
        paths, gradients = [path for path, _ in with_paths], [x for _, x in with_paths]
        columns = [structure.flatten_up_to(tree) for tree in state[-4:]]
        leaves = [_Leaf(*row) for row in zip(gradients, *columns, strict=True)]
        dense = [self._is_dense(path, x) for path, x in with_paths]

        axes, specs = layout_of(paths, param_specs, self.axis_name)
        layouts = [
            jax.tree.map(lambda _, spec=spec: spec, leaf)
            for leaf, spec in zip(leaves, specs, strict=True)
        ]
        leaves, bad = run_on_shards(
            functools.partial(self._step, dense, axes),
            ((leaves, state.compressed),),
            ((layouts, PartitionSpec()),),
            like=0,
            axes=axes,
        )
        trees = [structure.unflatten([leaf[i] for leaf in leaves]) for i in range(1, 5)]
        new = self._counted(state, dense, *trees)
        steps = [
            jnp.where(bad, jnp.nan, self._divided(new, leaf, frozen)).astype(g.dtype)
            for leaf, frozen, g in zip(leaves, self._frozen(state, dense), gradients, strict=True)
        ]
        new = jax.tree.map(functools.partial(jnp.where, bad), state, new)
        return structure.unflatten(steps), new

    def _counted(
        self, state: ScaleByOnebitAdamState, dense: Sequence[bool], *trees: Any
    ) -> ScaleByOnebitAdamState:
        """The state with these moments and errors, and the decision about the next step."""
        was_dense = ~state.compressed
        count = optax.safe_increment(state.count)
        dense_count = jnp.where(
            was_dense, optax.safe_increment(state.dense_count), state.dense_count
        )
        over, norms = dense_count >= self.warmup_steps, state.norms
        if self.interval:
            to_freeze = zip(jax.tree.leaves(trees[1]), dense, strict=True)
            norm = sum((jnp.sum(nu) for nu, is_dense in to_freeze if not is_dense), jnp.zeros(()))
            norm = norm / self._correction(self.b2, dense_count)
            place = (dense_count - 1) % self.interval
            settled = (dense_count > self.interval) & (norm >= self.ratio * norms[place])
            over, norms = over & settled, norms.at[place].set(norm)
        return ScaleByOnebitAdamState(count, dense_count, state.compressed | over, norms, *trees)

    def _correction(self, decay: jax.typing.ArrayLike, count: jax.Array) -> jax.Array:
        return _common.bias_correction(decay, count) if self.corrected else jnp.ones(())

    def _frozen(self, state: ScaleByOnebitAdamState, dense: Sequence[bool]) -> list[jax.Array]:
        """For each leaf, whether its second moment is frozen in this step."""
        return [state.compressed & (not is_dense) for is_dense in dense]

    def _divided(self, new: ScaleByOnebitAdamState, leaf: _Leaf, frozen: jax.Array) -> jax.Array:
        """The step: the momentum over the root of the second moment, both bias-corrected."""
        nu = jnp.where(frozen, jnp.maximum(leaf.nu, self.floor * jnp.mean(leaf.nu)), leaf.nu)
        step = _common.divide_by_root(
            leaf.mu / self._correction(self.b1, new.count),
            nu,
            self._correction(self.b2, jnp.where(frozen, new.dense_count, new.count)),
            eps=self.eps,
            eps_root=self.eps_root,
            eps_mode="corrected",
        )
        return jnp.where(frozen & (leaf.nu == 0), 0.0, step)

    def _step(
        self,
        dense: Sequence[bool],
        axes: tuple[str, ...],
        args: tuple[Sequence[_Leaf], jax.Array],
    ) -> tuple[list[_Leaf], jax.Array]:
        """New moments and errors of what one device holds; whether anything was not finite."""
        leaves, compressed = args
        leaves = [leaf._replace(g=leaf.g.astype(jnp.float32)) for leaf in leaves]
        stages = (
            functools.partial(self._stage, dense),
            functools.partial(self._stage, [True] * len(dense)),
        )
        if leaves:
            leaves = jax.lax.cond(compressed, *stages, leaves)
        # Momenta are equal on all workers, and so is the verdict; other axes have to be asked.
        bad = jnp.zeros((), bool)
        for leaf in leaves:
            bad |= ~jnp.all(jnp.isfinite(leaf.mu))
        return leaves, any_worker(bad, axes) if axes else bad

    def _stage(self, dense: Sequence[bool], leaves: Sequence[_Leaf]) -> list[_Leaf]:
        """One update, in which the leaves that are ``dense`` are Adam's."""
        result = list(leaves)
        averaged = [i for i, flag in enumerate(dense) if flag]
        means = mean_of_buffer([leaves[i].g for i in averaged], self.axis_name)
        for i, mean in zip(averaged, means, strict=True):
            mu = _common.update_mean(leaves[i].mu, mean, self.b1)
            nu = _common.update_mean(leaves[i].nu, jnp.square(mean), self.b2)
            result[i] = leaves[i]._replace(mu=mu, nu=nu)
        exchanged = [i for i, flag in enumerate(dense) if not flag]
        done = _exchange([self._message(leaves[i]) for i in exchanged], self.axis_name)
        for i, (mu, error, owner_error) in zip(exchanged, done, strict=True):
            result[i] = leaves[i]._replace(mu=mu, error=error, owner_error=owner_error)
        return result

    def _message(self, leaf: _Leaf) -> tuple[jax.Array, jax.Array]:
        own = _common.update_mean(leaf.mu, core.vary(leaf.g, self.axis_name), self.b1)
        return own + leaf.error, leaf.owner_error


def _exchange(
    messages: Sequence[tuple[jax.Array, jax.Array]], axis_name: str
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """For each message and owner's error: the momentum, the error and the owner's error."""
    workers, worker = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    encoded = [_signs(y, workers) for y, _ in messages]
    received = pieces.to_owners([payload for payload, _ in encoded], axis_name)

    codes, owner_errors = [], []
    for (y, owner_error), payload in zip(messages, received, strict=True):
        z = jnp.mean(jax.vmap(_decode)(payload), axis=0)
        z = z + pieces.cut(owner_error, workers, _BITS.block)[worker]
        payload, left = _signs_of_piece(z, pieces.entries(y.size, len(z), worker))
        rows = jnp.zeros((workers, len(z))).at[worker].set(left)
        codes.append(payload)
        owner_errors.append(pieces.join(rows, y.shape, y.size))

    told = pieces.to_all(codes, axis_name)
    momenta = [
        pieces.join(jax.vmap(_decode)(payload), y.shape, y.size)
        for (y, _), payload in zip(messages, told, strict=True)
    ]
    errors = [y - sent for (y, _), (_, sent) in zip(messages, encoded, strict=True)]
    return list(zip(momenta, errors, owner_errors, strict=True))


def _signs(y: jax.Array, workers: int) -> tuple[SignPayload, jax.Array]:
    """A message for the owners of its pieces, one scale for all, and what it is taken for."""
    rows = pieces.cut(y, workers, _BITS.block)
    scale = _poisoned(_BITS.encode(y, _NO_KEY).scales[0], y)
    sent = jnp.where(y >= 0, scale, -scale)
    bits = jax.vmap(lambda row: pack(row >= 0, 1))(rows)
    return SignPayload(bits, jnp.broadcast_to(scale, (workers, 1))), sent


def _signs_of_piece(z: jax.Array, real: jax.Array) -> tuple[SignPayload, jax.Array]:
    """A mean for all, of which so many entries are no padding, and what is left out of it."""
    z = jnp.where(jnp.arange(len(z)) < real, z, 0.0)
    payload = _BITS.encode(z, _NO_KEY)
    full = jnp.sqrt(len(z) / jnp.maximum(real, 1))  # padding adds nothing to the norm
    payload = payload._replace(scales=_poisoned(payload.scales * full, z))
    return payload, z - _decode(payload)


def _poisoned(scale: jax.Array, x: jax.Array) -> jax.Array:
    """The scale; NaN if what it leaves out of ``x`` would not be finite."""
    largest = jnp.max(jnp.abs(x), initial=0.0) + scale
    return jnp.where(jnp.isfinite(largest), scale, jnp.nan)


def _decode(payload: SignPayload) -> jax.Array:
    """A piece: float32 ``[8 bytes]``."""
    like = jax.ShapeDtypeStruct((8 * payload.bits.size,), jnp.float32)
    return _BITS.decode(payload, like)


def onebit_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _common.Mask = None,
    *,
    axis_name: str,
    warmup_steps: int,
    variance_ratio: jax.typing.ArrayLike | None = None,
    variance_interval: int | None = None,
    variance_floor: jax.typing.ArrayLike = 0.0,
    bias_correction: bool = True,
    dense: DenseRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """1-bit Adam with decoupled weight decay: ``scale_by_onebit_adam``, decay, learning rate.

    Args:
      learning_rate: step size, at least 0, or a schedule of the step count.
      b1: see ``scale_by_onebit_adam``, as all arguments not described here.
      b2: see ``scale_by_onebit_adam``.
      eps: see ``scale_by_onebit_adam``.
      eps_root: see ``scale_by_onebit_adam``.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: tree of bools, or a function of the parameters returning one: which leaves decay.
      axis_name: see ``scale_by_onebit_adam``.
      warmup_steps: see ``scale_by_onebit_adam``.
      variance_ratio: see ``scale_by_onebit_adam``.
      variance_interval: see ``scale_by_onebit_adam``.
      variance_floor: see ``scale_by_onebit_adam``.
      bias_correction: see ``scale_by_onebit_adam``.
      dense: see ``scale_by_onebit_adam``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_suite import parallel
      >>> from jaxopt_suite.optimizers import onebit_adam
      >>> rate = optax.linear_schedule(0.1, 0.0, 200)
      >>> tx = onebit_adam(rate, axis_name="worker", warmup_steps=40)
      >>> def worker(x, target):
      ...     def step(carry, _):
      ...         x, state = carry
      ...         updates, state = tx.update(x - target, state, x)
      ...         return (optax.apply_updates(x, updates), state), None
      ...     return jax.lax.scan(step, (x, tx.init(x)), length=200)[0][0]
      >>> targets = jax.random.normal(jax.random.key(0), (4, 64, 64))
      >>> x = parallel.run_workers(worker, axis_name="worker", in_axes=(None, 0))(
      ...     jnp.zeros((64, 64)), targets)
      >>> bool(jnp.mean((x - targets.mean(0)) ** 2) < 0.1 * jnp.mean(targets.mean(0) ** 2))
      True

    References:
      Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
      Speed", 2021, arXiv:2102.02888.
    """
    rule = scale_by_onebit_adam(
        b1,
        b2,
        eps,
        eps_root,
        axis_name=axis_name,
        warmup_steps=warmup_steps,
        variance_ratio=variance_ratio,
        variance_interval=variance_interval,
        variance_floor=variance_floor,
        bias_correction=bias_correction,
        dense=dense,
    )
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)
