"""``scale_by_shampoo`` and ``shampoo``: what they take, and what it means."""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core, kernels
from jaxopt_suite.optimizers import _common, roots
from jaxopt_suite.optimizers.shampoo import grafting
from jaxopt_suite.optimizers.shampoo.blocks import Cutting
from jaxopt_suite.optimizers.shampoo.preconditioner import Kronecker
from jaxopt_suite.optimizers.shampoo.refresh import Schedule, make_refresh
from jaxopt_suite.optimizers.shampoo.rule import Shampoo, is_zero


def scale_by_shampoo(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    *,
    block_size: int = 1024,
    merge_dims: bool = True,
    exponent: float | Fraction | None = None,
    refresh_every: int = 10,
    refresh: Schedule = "together",
    start_step: int | None = None,
    solver: str | roots.Solver = "eigh",
    damping: roots.Damping = roots.Relative(),  # noqa: B008  frozen
    graft: grafting.Graft = "adam",
    graft_b2: jax.typing.ArrayLike | None = None,
    graft_eps: jax.typing.ArrayLike = 1e-8,
    graft_scope: grafting.Scope = "block",
    momentum: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
    bias_correction: bool = True,
    mu_dtype: Any = None,
    factor_dtype: Any = None,
    root_dtype: Any = None,
    stack_multiple: int = 1,
    gram_impl: kernels.Impl = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Preconditions every mode of a gradient by an inverse root of that mode's second moment.

    A parameter's small dimensions are merged, and what results is cut into blocks of at most
    ``block_size`` along each of $k$ dimensions; each block $G$ is a problem of its own. With
    $G_{(i)}$ its unfolding along mode i, of shape $d_i \times (\prod_j d_j / d_i)$,

    $$F_i \leftarrow \beta_2 F_i + (1 - \beta_2)\, G_{(i)} G_{(i)}^T, \qquad
    X_i = \left(F_i / (1 - \beta_2^t) + \rho_i I\right)^{-1/2k},$$
    $$M \leftarrow \beta_1 M + (1 - \beta_1) G, \qquad
    P = \frac{M}{1 - \beta_1^t} \times_1 X_1 \times_2 \dots \times_k X_k .$$

    For matrices that is $L^{-1/4} \bar M R^{-1/4}$. With ``b2=1`` the statistics are sums, as in
    the first paper. The damping $\rho_i$ is relative to the largest eigenvalue by default. A vector
    has one mode: its blocks get full-matrix AdaGrad.

    **Grafting** gives the direction the length that another method's step would have, from the same
    mean gradient: $U = P\,\|D\| / \|P\|$, block by block or for whole parameters.

    | ``graft`` | $D$ |
    |---|---|
    | ``"none"`` | no length is taken over |
    | ``"sgd"`` | $\bar M$ |
    | ``"adagrad"`` | $\bar M / (\sqrt{v} + \epsilon)$, $v$ the sum of squares of the gradients |
    | ``"rmsprop"`` | the same with $v$ their mean |
    | ``"adam"`` | the same with that mean corrected for its beginning at zero |

    Before ``start_step`` the update is $D$ itself, so without grafting the mean gradient.

    **Refreshing.** ``"together"`` takes all roots at ``start_step`` and at every multiple of
    ``refresh_every`` after it. ``"staggered"`` takes a ``refresh_every``-th of them at each step:
    they are as old on average, and no step is slower than the others.

    **Failures.** A root that is not finite, or whose residual is large, leaves the one before in
    use; ``failures`` counts how often in a row. A statistic that is not finite begins again from
    zero at its next refresh. One of zeros, of a block that never had a gradient, leaves the root
    before in use and is no failure. A block whose gradient is not finite, or so large that its
    squares are not, is taken to have had a gradient of zero and is not moved in this step;
    ``skipped`` counts those. Nothing raises, and no other block is affected.

    **Stacks.** All blocks of one shape, of whatever parameter, lie in one array ``[rows, *block]``,
    and so do their moments and statistics: the program grows with the number of block shapes. The
    rows are independent, so ``parallel.state_specs`` spreads them over all devices of a mesh;
    ``stack_multiple``, a multiple of the number of devices, pads the stacks so that it divides
    them. Each device then takes the roots of its own rows.

    **What crosses a mesh**, if ``update`` is given ``param_specs=`` (``make_train_step`` does so):
    each device's part of a gradient goes to the owners of the blocks that it overlaps, in one
    all-to-all over the axes that split the parameter, in its own dtype; directions come back in
    another, and along the axes that hold copies of it each part is put together from what the
    owners at all copies have: by an all-gather, or by an all-reduce where most slots of that would
    be empty. For a parameter of N entries split over all of D devices that is about N / D entries
    each way; for one that every device has whole, nothing there, and from N to 2N entries back. The
    state never moves, nor is a gradient put together anywhere. Buffers have as many cells for every
    pair of devices as the busiest one needs: small blocks fill them better. A dimension that the
    mesh cuts into parts with which no divisor near a block's length goes is gathered along its
    axes. Without ``param_specs``, or where ``stack_multiple`` is no multiple of the devices,
    cutting is left to the compiler's partitioner, which gathers.

    Memory, for an m-by-n matrix with whole blocks of b: 4mn floats of statistics and roots,
    whatever b; mn each for ``b1``, ``momentum`` and the moment of AdaGrad, RMSProp or Adam. A block
    of r by c takes 2(r² + c²) for the first.

    Departures. From the 2018 paper: damping is added when a root is taken, not put into the
    statistics at the start, where a mean would forget it. From Meta's code: damping is relative by
    default (``roots.Absolute(1e-12)`` is its rule for positive definite statistics), ``start_step``
    may be less than ``refresh_every``, failures never end the run. From Google's: roots
    precondition the mean of the gradients, not each gradient before a mean is taken.

    Args:
      b1: decay of the mean of the gradients, in [0, 1).
      b2: decay of the statistics, in [0, 1]; 1 sums them up.
      block_size: largest dimension of a block.
      merge_dims: join neighbouring dimensions while their product is at most ``block_size``, the
        last ones first.
      exponent: of the roots, in (0, 1]; ``None`` is 1/(2k). A float stands for the nearest fraction
        with a denominator up to 64, which must not be 0.
      refresh_every: steps from one root of a block to the next.
      refresh: ``"together"`` or ``"staggered"``.
      start_step: the first step, counted from 1, that is preconditioned; ``None`` is
        ``refresh_every``. For ``"staggered"`` at least that, so that every block has a root.
      solver: a name in ``roots.SOLVERS``, or one of its objects.
      damping: ``roots.Relative``, ``roots.Absolute`` or ``roots.PseudoInverse``.
      graft: see above.
      graft_b2: decay of RMSProp's or Adam's moment, in [0, 1); ``None`` is ``b2``, or 0.999 if that
        is 1.
      graft_eps: its ε, at least 0.
      graft_scope: ``"block"`` or ``"parameter"``: what has a length.
      momentum: μ of T ← μ T + U, a second momentum after everything else, in [0, 1).
      nesterov: give U + μ T instead of T; needs ``momentum``.
      bias_correction: correct M and the statistics for beginning at zero.
      mu_dtype: of M and T; ``None`` is that of the arithmetic.
      factor_dtype: of the statistics; ``None`` likewise.
      root_dtype: of the roots; ``None`` likewise.
      stack_multiple: pad every stack to a multiple of this many rows.
      gram_impl: how L and R are updated: ``"auto"``, ``"xla"``, or by the kernel of
        ``kernels.gram_update`` for TPUs and Hopper GPUs ``"pallas"``, ``"interpret"`` on a CPU.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Updates keep their dtypes; arithmetic is in
      float32, or float64 if a parameter is.

    Raises:
      ValueError, TypeError: for an argument out of range or a combination that has no meaning; at
        ``init``, for a leaf that is not real floating point, or with too many dimensions for the
        solver.

    References:
      Gupta, Koren, Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", 2018,
      arXiv:1802.09568; Anil et al., "Scalable Second Order Optimization for Deep Learning", 2020,
      arXiv:2002.09018; Shi et al., "A Distributed Data-Parallel PyTorch Implementation of the
      Distributed Shampoo Optimizer for Training Neural Networks At-Scale", 2023, arXiv:2309.06497;
      Modoranu et al., "DASH: Faster Shampoo via Batched Block Preconditioning and Efficient
      Inverse-Root Solvers", 2026, arXiv:2602.02016 (the stacks).
    """
    _common.check_adam_arguments(b1=b1)
    core.check_number("b2", b2, low=0.0, high=1.0)
    core.check_number("momentum", momentum, low=0.0, high=1.0, high_open=True)
    if nesterov and is_zero(momentum):
        raise ValueError(f"nesterov=True needs momentum above 0, got momentum={momentum!r}")
    core.check_choice("gram_impl", gram_impl, kernels.IMPLS)
    _check_graft(graft, graft_b2, graft_eps, graft_scope)
    rule = Shampoo(
        b1=b1,
        cutting=Cutting(block_size, merge_dims, stack_multiple),
        preconditioner=Kronecker(
            b2=b2,
            exponent=_fraction(exponent),
            solver=_checked_solver(solver, damping, exponent),
            damping=damping,
            bias_correction=bias_correction,
            factor_dtype=factor_dtype,
            root_dtype=root_dtype,
            gram_impl=gram_impl,
        ),
        refresh=make_refresh(refresh, refresh_every, start_step, stack_multiple),
        graft=graft,
        graft_b2=_graft_b2(graft_b2, b2),
        graft_eps=graft_eps,
        graft_scope=graft_scope,
        momentum=momentum,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
    )
    return optax.GradientTransformationExtraArgs(rule.init, rule.update)  # type: ignore[arg-type]


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _common.Mask = None,
    *,
    block_size: int = 1024,
    merge_dims: bool = True,
    exponent: float | Fraction | None = None,
    refresh_every: int = 10,
    refresh: Schedule = "together",
    start_step: int | None = None,
    solver: str | roots.Solver = "eigh",
    damping: roots.Damping = roots.Relative(),  # noqa: B008  frozen
    graft: grafting.Graft = "adam",
    graft_b2: jax.typing.ArrayLike | None = None,
    graft_eps: jax.typing.ArrayLike = 1e-8,
    graft_scope: grafting.Scope = "block",
    momentum: jax.typing.ArrayLike = 0.0,
    nesterov: bool = False,
    bias_correction: bool = True,
    mu_dtype: Any = None,
    factor_dtype: Any = None,
    root_dtype: Any = None,
    stack_multiple: int = 1,
    gram_impl: kernels.Impl = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Shampoo: ``scale_by_shampoo``, decoupled weight decay, learning rate.

    With the default grafting its updates have the length of Adam's, so a learning rate and schedule
    tuned for AdamW are where to begin.

    Args:
      learning_rate: step size, at least 0, or a schedule of the step count.
      b1: decay of the mean of the gradients.
      b2: decay of the statistics; 1 sums them up.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: tree of bools, or a function of the parameters returning one: which leaves decay.
      block_size: see ``scale_by_shampoo``, as all that follow.
      merge_dims: see there.
      exponent: see there.
      refresh_every: see there.
      refresh: see there.
      start_step: see there.
      solver: see there.
      damping: see there.
      graft: see there.
      graft_b2: see there.
      graft_eps: see there.
      graft_scope: see there.
      momentum: see there.
      nesterov: see there.
      bias_correction: see there.
      mu_dtype: see there.
      factor_dtype: see there.
      root_dtype: see there.
      stack_multiple: see there.
      gram_impl: see there.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_suite.optimizers.shampoo import shampoo
      >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([[1.0], [100.0]]) * (w - 1.0) ** 2)
      >>> tx, w = shampoo(0.3, refresh_every=1), jnp.zeros((2, 3))
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> state = tx.init(w)
      >>> for _ in range(100):
      ...     w, state = step(w, state)
      >>> bool(loss(w) < 1e-2)
      True

    References:
      Gupta, Koren, Singer, 2018, arXiv:1802.09568; Shi et al., 2023, arXiv:2309.06497.
    """
    rule = scale_by_shampoo(
        b1,
        b2,
        block_size=block_size,
        merge_dims=merge_dims,
        exponent=exponent,
        refresh_every=refresh_every,
        refresh=refresh,
        start_step=start_step,
        solver=solver,
        damping=damping,
        graft=graft,
        graft_b2=graft_b2,
        graft_eps=graft_eps,
        graft_scope=graft_scope,
        momentum=momentum,
        nesterov=nesterov,
        bias_correction=bias_correction,
        mu_dtype=mu_dtype,
        factor_dtype=factor_dtype,
        root_dtype=root_dtype,
        stack_multiple=stack_multiple,
        gram_impl=gram_impl,
    )
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)


def _check_graft(graft: Any, b2: Any, eps: Any, scope: Any) -> None:
    core.check_choice("graft", graft, grafting.GRAFTS)
    core.check_choice("graft_scope", scope, grafting.SCOPES)
    core.check_number("graft_eps", eps, low=0.0)
    if scope != "block" and graft == "none":
        raise ValueError(f"graft_scope={scope!r} needs a graft, got graft='none'")
    if b2 is None:
        return
    core.check_number("graft_b2", b2, low=0.0, high=1.0, high_open=True)
    if graft not in ("rmsprop", "adam"):
        raise ValueError(
            f"graft_b2 is for graft='rmsprop' or 'adam', got graft_b2={b2!r} with graft={graft!r}"
        )


def _checked_solver(
    solver: str | roots.Solver, damping: roots.Damping, exponent: float | Fraction | None
) -> roots.Solver:
    """The solver, if it goes with the others; orders of 2k are checked at ``init``."""
    made, fraction = roots.make_solver(solver), _fraction(exponent)
    roots.check_damping(damping)
    made.check(Fraction(2) if fraction is None else 1 / fraction, damping)
    return made


def _fraction(exponent: float | Fraction | None) -> Fraction | None:
    if exponent is None:
        return None
    if isinstance(exponent, Fraction):
        found = exponent
    else:
        core.check_number("exponent", exponent, low=0.0, high=1.0, low_open=True)
        found = Fraction(float(exponent)).limit_denominator(64)
    if not 0 < found <= 1:
        raise ValueError(
            f"exponent must be in (0, 1], a float with a fraction of a denominator up to 64 near "
            f"it, got {exponent!r}"
        )
    return found


def _graft_b2(graft_b2: Any, b2: Any) -> Any:
    if graft_b2 is not None:
        return graft_b2
    if isinstance(b2, jax.Array):
        return jnp.where(b2 == 1, 0.999, b2)
    return 0.999 if b2 == 1 else b2
