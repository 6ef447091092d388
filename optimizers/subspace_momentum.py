"""Subspace momentum: momentum inside a small subspace, the plain gradient outside it."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers import _common, subset_norm
from jaxopt_suite.optimizers import projections as projections_lib

OnRefresh = Literal["keep", "zero", "zero_and_restart_count", "reproject", "official_code"]
ON_REFRESH = ("keep", "zero", "zero_and_restart_count", "reproject", "official_code")
BiasCorrection = Literal["subspace", "numerator", "none"]
BIAS_CORRECTIONS = ("subspace", "numerator", "none")
RefreshPhase = Literal["before_count", "after_count"]
REFRESH_PHASES = ("before_count", "after_count")


class ScaleBySubspaceMomentumState(NamedTuple):
    """State of ``scale_by_subspace_momentum``; a = min(m, n), b = max(m, n), r = rank."""

    count: jax.Array  # type: ignore[assignment]  # int32 []: updates so far
    mu_count: jax.Array  # int32 []: updates in the projected momentum since it was last restarted
    mu: optax.Updates  # mu_dtype (float32): [..., b, r] or, rows, [..., r, a]; of p if no matrix
    projector: optax.Updates  # float32 [..., a, r] or, rows, int32 [..., r]; None if no matrix


def scale_by_subspace_momentum(
    b1: jax.typing.ArrayLike = 0.9,
    rank: int = 128,
    mu_dtype: Any = None,
    *,
    projection: projections_lib.ProjectionName = "svd",
    sketch_scale: int | None = None,
    refresh_every: int = 200,
    refresh_phase: RefreshPhase = "before_count",
    on_refresh: OnRefresh = "zero_and_restart_count",
    bias_correction: BiasCorrection = "subspace",
    matrix_mask: _common.MatrixMask = None,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""Momentum in a projected space, and plain gradient in its orthogonal complement.

    With gradient $G_t$ (m-by-n), projection $P$ and its lift $P^*$ (``projections.py``):

    $$R_t = P(G_t), \quad M_t = \beta_1 M_{t-1} + (1-\beta_1) R_t, \quad
    N_t = P^*(\hat M_t) + G_t - P^*(R_t),$$

    so that updates stay of full rank while momentum is stored for r directions only. $P$ is chosen
    anew from the current gradient every ``refresh_every`` steps, and at the first step.

    Choosing is done once per shape, on all leaves of that shape stacked (an SVD of each costs
    $O(mn \min(m,n))$); a gradient that is not finite keeps the projector it had. Leaves that are
    not matrices keep ordinary momentum.

    Memory, elements for an m-by-n matrix: rb + ra with a basis (``"svd"``, ``"approx_svd"``),
    ra + r with rows. Wire: nothing; the SVD of a sharded leaf gathers it on every device.

    Departures from the official code (timmytonga/sn-sm), each undone by the argument named:

    - ``on_refresh="official_code"``: at a refresh they step with the *old* momentum array,
      expressed in the basis that was just replaced, and then store zeros, so the gradient of that
      step never enters the momentum. Here momentum and basis always belong together.
    - ``refresh_phase="after_count"``: they refresh at steps 1, T, 2T, and so on; here at steps 1,
      T + 1, 2T + 1, and so on.
    - ``bias_correction="numerator"``: they divide all of $N_t$ by $1 - \beta_1^t$, also the part
      that is no average, which is ten times too long at the first step. Here only $M_t$ is
      corrected, by the number of gradients it holds.
    - Their approximate SVD applies the Hadamard transform and the signs to different axes; ours is
      derived anew.

    Args:
      b1: decay of the momentum, in [0, 1).
      rank: r, at least 1; clipped to what the leaf has.
      mu_dtype: dtype of the momentum; ``None`` is float32.
      projection: ``"svd"``, ``"approx_svd"``, ``"uniform_rows"`` or ``"top_rows"``.
      sketch_scale: for ``"approx_svd"``: the sketch has this times ``rank`` rows; ``None`` is 2.
      refresh_every: T, steps between refreshes, at least 1.
      refresh_phase: refresh when the count of updates before this one (``"before_count"``) or with
        this one (``"after_count"``) is a multiple of T. The first update always refreshes.
      on_refresh: what becomes of the projected momentum: ``"keep"`` its numbers although the basis
        changed (as GaLore does), ``"zero"`` it, ``"zero_and_restart_count"`` also restart its bias
        correction, ``"reproject"`` it: lift it with the old basis, project with the new.
      bias_correction: ``"subspace"`` corrects the momentum, ``"numerator"`` everything, ``"none"``
        nothing.
      matrix_mask: function of the parameters returning a tree of bools: which leaves are (stacks
        of) matrices. ``None``: all of two or more axes.
      seed: for the random projections; draws depend on seed, leaf path and refresh only.

    Returns:
      An ``optax.GradientTransformation``; updates keep their dtype. ``rank``, ``refresh_every``,
      ``sketch_scale`` and ``seed`` are static: list them in ``static_args`` of
      ``inject_hyperparams``.

    Raises:
      ValueError, TypeError: for an argument out of range; at ``init``, for a leaf that is not real
        floating point or a mask that does not fit.

    References:
      Nguyen, Nguyen, "Lean and Mean Adaptive Optimization via Subset-Norm and Subspace-Momentum
      with Convergence Guarantees", ICML 2025, arXiv:2411.07120. Official code: timmytonga/sn-sm.
    """
    _common.check_adam_arguments(b1=b1)
    core.check_int("refresh_every", refresh_every, low=1)
    core.check_int("seed", seed, low=0)
    core.check_choice("refresh_phase", refresh_phase, REFRESH_PHASES)
    core.check_choice("on_refresh", on_refresh, ON_REFRESH)
    core.check_choice("bias_correction", bias_correction, BIAS_CORRECTIONS)
    proj = projections_lib.make_projection(projection, rank, sketch_scale=sketch_scale)

    def init(params: optax.Params) -> ScaleBySubspaceMomentumState:
        core.check_real_floating(params, "subspace_momentum")
        leaves, treedef = jax.tree.flatten(params)
        flags = _common.matrix_flags(params, matrix_mask, "subspace_momentum")
        projectors = [
            proj.init(jnp.shape(p), core.accumulator_dtype(p)) if matrix else None
            for p, matrix in zip(leaves, flags, strict=True)
        ]
        mu = [
            jnp.zeros(_mu_shape(proj, projector, p), core.accumulator_dtype(p, mu_dtype))
            for p, projector in zip(leaves, projectors, strict=True)
        ]
        return ScaleBySubspaceMomentumState(
            count=jnp.zeros((), jnp.int32),
            mu_count=jnp.zeros((), jnp.int32),  # an array of its own: the state may be donated
            mu=treedef.unflatten(mu),
            projector=treedef.unflatten(projectors),
        )

    def refresh(
        grads: list[jax.Array],  # float32, the matrices only
        paths: list[Any],
        mus: list[jax.Array],
        projectors: list[jax.Array],
        count: jax.Array,
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        keys = list(core.leaf_keys(seed, paths, count))
        fit = lambda g, key, old: _fit_or_keep(proj, g, key, old)
        fitted = core.batch_by_shape(core.batch_factorisation(fit), grads, keys, projectors)
        if on_refresh in ("zero", "zero_and_restart_count"):
            mus = [jnp.zeros_like(mu) for mu in mus]
        elif on_refresh == "reproject":
            mus = [
                proj.down(new, proj.add_up(old, jnp.zeros_like(g), mu.astype(g.dtype))).astype(
                    mu.dtype
                )
                for g, mu, old, new in zip(grads, mus, projectors, fitted, strict=True)
            ]
        return mus, fitted

    def refresh_where(
        refreshed: jax.Array,  # bool []
        grads: list[jax.Array],
        paths: list[Any],
        mus: list[jax.Array],
        projectors: list[jax.Array | None],
        count: jax.Array,
    ) -> tuple[list[jax.Array], list[jax.Array | None]]:
        """Momenta and projectors to step with: as they are, or refreshed; leaves of all kinds."""
        matrices = [i for i, projector in enumerate(projectors) if projector is not None]
        if not matrices:
            return mus, projectors
        pick = lambda xs: [xs[i] for i in matrices]
        found = jax.lax.cond(
            refreshed,
            lambda mus, projectors: refresh(pick(grads), pick(paths), mus, projectors, count),
            lambda mus, projectors: (mus, projectors),
            pick(mus),
            pick(projectors),
        )
        new = dict(zip(matrices, zip(*found, strict=True), strict=True))
        both = [new.get(i, old) for i, old in enumerate(zip(mus, projectors, strict=True))]
        return [mu for mu, _ in both], [projector for _, projector in both]

    def update(
        updates: optax.Updates,
        state: ScaleBySubspaceMomentumState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, ScaleBySubspaceMomentumState]:
        del params  # the rule reads gradients only
        count = optax.safe_increment(state.count)
        tested = state.count if refresh_phase == "before_count" else count
        refreshed = (state.count == 0) | (tested % refresh_every == 0)
        restart = refreshed & (on_refresh == "zero_and_restart_count")
        mu_count = optax.safe_increment(jnp.where(restart, 0, state.mu_count))
        corrections = _corrections(b1, count, mu_count, bias_correction)

        with_paths, treedef = jax.tree_util.tree_flatten_with_path(updates)
        paths = [path for path, _ in with_paths]
        grads = [g.astype(core.accumulator_dtype(g)) for _, g in with_paths]
        mus, projectors = refresh_where(
            refreshed,
            grads,
            paths,
            treedef.flatten_up_to(state.mu),
            treedef.flatten_up_to(state.projector),
            count,
        )
        steps, means = [], []
        for (_, u), g, mu, projector in zip(with_paths, grads, mus, projectors, strict=True):
            step, mean = _leaf_step(proj, projector, g, mu, b1, corrections)
            if on_refresh == "official_code" and projector is not None:
                mean = jnp.where(refreshed & (count > 1), jnp.zeros_like(mean), mean)
            steps.append(step.astype(u.dtype))
            means.append(mean.astype(mu.dtype))
        return treedef.unflatten(steps), ScaleBySubspaceMomentumState(
            count, mu_count, treedef.unflatten(means), treedef.unflatten(projectors)
        )

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _mu_shape(
    proj: projections_lib.Projection, projector: jax.Array | None, param: Any
) -> tuple[int, ...]:
    if projector is None:
        return jnp.shape(param)
    like = jax.ShapeDtypeStruct(jnp.shape(param), core.accumulator_dtype(param))
    return jax.eval_shape(proj.down, projector, like).shape


def _fit_or_keep(
    proj: projections_lib.Projection, gradient: jax.Array, key: jax.Array, old: jax.Array
) -> jax.Array:
    """A projector for each matrix of a leaf ``[..., m, n]``; the old one where it is not finite."""
    flat = gradient.reshape(-1, *gradient.shape[-2:])
    finite = jnp.isfinite(flat).all(axis=(1, 2))
    flat = jnp.where(finite[:, None, None], flat, 0.0)
    fitted = jax.vmap(proj.fit)(flat, jax.random.split(key, flat.shape[0])).reshape(old.shape)
    leading = gradient.shape[:-2]
    finite = finite.reshape(leading + (1,) * (old.ndim - len(leading)))
    return jnp.where(finite, fitted, old)


class _Corrections(NamedTuple):
    """Divisors, float32 []."""

    projected: jax.Array  # of the projected momentum
    numerator: jax.Array  # of the whole step of a matrix
    plain: jax.Array  # of the momentum of a leaf that is no matrix


def _corrections(
    b1: jax.typing.ArrayLike, count: jax.Array, mu_count: jax.Array, mode: BiasCorrection
) -> _Corrections:
    one = jnp.ones((), jnp.result_type(float))
    if mode == "none":
        return _Corrections(one, one, one)
    plain = _common.bias_correction(b1, count)
    if mode == "numerator":
        return _Corrections(one, plain, plain)
    return _Corrections(_common.bias_correction(b1, mu_count), one, plain)


def _leaf_step(
    proj: projections_lib.Projection,
    projector: jax.Array | None,
    g: jax.Array,  # float32 [..., m, n], or any shape without a projector
    mu: jax.Array,
    b1: jax.typing.ArrayLike,
    corrections: _Corrections,
) -> tuple[jax.Array, jax.Array]:
    """One leaf's step and its new momentum, both in the dtype of ``g``."""
    divisors = _Corrections(*(c.astype(g.dtype) for c in corrections))
    if projector is None:
        mean = _common.update_mean(mu, g, b1)
        return mean / divisors.plain, mean
    projected = proj.down(projector, g)
    mean = _common.update_mean(mu, projected, b1)
    # The lift is linear: one lift of the difference gives both P*(M) and - P*(R).
    step = proj.add_up(projector, g, mean / divisors.projected - projected)
    return step / divisors.numerator, mean


def adam_snsm(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _common.Mask = None,
    *,
    rank: int = 128,
    projection: projections_lib.ProjectionName = "svd",
    sketch_scale: int | None = None,
    refresh_every: int = 200,
    refresh_phase: RefreshPhase = "before_count",
    on_refresh: OnRefresh = "zero_and_restart_count",
    bias_correction: BiasCorrection = "subspace",
    subset: subset_norm.Subset = "heuristic",
    matrix_mask: _common.MatrixMask = None,
    eps_mode: _common.EpsMode = "corrected",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamSNSM: subspace momentum over subset-norm step sizes, with decoupled weight decay.

    State for an m-by-n matrix with a basis projection: rb + ra + b elements; with rows ra + r + b.

    Args:
      learning_rate: step size, at least 0, or a schedule; start from ten times that of AdamW.
      b1: see ``scale_by_subspace_momentum``, as all arguments not described here.
      b2: decay of the subset sums; see ``scale_by_subset_norm``.
      eps: see ``scale_by_subset_norm``.
      mu_dtype: dtype of the projected momentum; ``None`` is float32.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: which leaves decay: a tree of bools or a function of the parameters returning one.
      rank: see ``scale_by_subspace_momentum``.
      projection: see ``scale_by_subspace_momentum``.
      sketch_scale: see ``scale_by_subspace_momentum``.
      refresh_every: see ``scale_by_subspace_momentum``.
      refresh_phase: see ``scale_by_subspace_momentum``.
      on_refresh: see ``scale_by_subspace_momentum``.
      bias_correction: see ``scale_by_subspace_momentum``.
      subset: see ``scale_by_subset_norm``.
      matrix_mask: which leaves are matrices, for momentum and step sizes both.
      eps_mode: see ``scale_by_subset_norm``.
      seed: see ``scale_by_subspace_momentum``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    References:
      Nguyen, Nguyen, "Lean and Mean Adaptive Optimization via Subset-Norm and Subspace-Momentum
      with Convergence Guarantees", ICML 2025, arXiv:2411.07120.
    """
    momentum = scale_by_subspace_momentum(
        b1,
        rank,
        mu_dtype,
        projection=projection,
        sketch_scale=sketch_scale,
        refresh_every=refresh_every,
        refresh_phase=refresh_phase,
        on_refresh=on_refresh,
        bias_correction=bias_correction,
        matrix_mask=matrix_mask,
        seed=seed,
    )
    rule = subset_norm.scale_by_subset_norm(
        b2, eps, momentum=momentum, subset=subset, matrix_mask=matrix_mask, eps_mode=eps_mode
    )
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)
