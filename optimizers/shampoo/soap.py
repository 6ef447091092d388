"""SOAP: Adam in the slowly turning eigenbases of Shampoo's statistics."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core, kernels
from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers.shampoo import kronecker, stacked
from jaxopt_suite.optimizers.shampoo.blocks import Cutting, Stacks, usable, wide
from jaxopt_suite.optimizers.shampoo.eigenbases import Bases, Method, Rotated
from jaxopt_suite.optimizers.shampoo.refresh import Refresh, Schedule, make_refresh

FirstStep = Literal["update", "skip"]
FIRST_STEPS = ("update", "skip")


class ScaleBySoapState(NamedTuple):
    """State of ``scale_by_soap``: stacks of blocks, keyed by the shape of a block.

    Arithmetic is in float32, or in float64 if a parameter is; "wide" is that dtype.
    """

    count: jax.Array  # type: ignore[assignment]  # int32 []: gradients seen so far
    rotated: dict[str, Rotated]  # moments [rows, *block]; statistics and bases [rows, di, di]
    skipped: dict[str, jax.Array]  # int32 [rows, 1]: steps whose gradient could not be used


@dataclasses.dataclass(frozen=True)
class _Soap:
    """What ``scale_by_soap`` was called with, checked."""

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike
    eps_mode: _common.EpsMode
    cutting: Cutting
    bases: Bases
    refresh: Refresh
    method: Method
    skip_first: bool
    mu_dtype: Any

    def init(self, params: optax.Params) -> ScaleBySoapState:
        core.check_real_floating(params, "soap")
        dtype, blocks = wide(params), self.cutting.blocks(params)
        return ScaleBySoapState(
            count=jnp.zeros((), jnp.int32),
            rotated={
                name: self.bases.init(blocks.shape(name), dtype, self.mu_dtype or dtype)
                for name in blocks.rows
            },
            skipped={name: jnp.zeros((rows, 1), jnp.int32) for name, rows in blocks.rows.items()},
        )

    def update(
        self,
        updates: optax.Updates,
        state: ScaleBySoapState,
        params: optax.Params | None = None,
        *,
        param_specs: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySoapState]:
        del params, extra_args
        return stacked.run(self._on_stacks, self.cutting, updates, state, param_specs)

    def _on_stacks(
        self, given: Stacks, state: ScaleBySoapState, site: stacked.Site
    ) -> tuple[Stacks, ScaleBySoapState]:
        in_use = usable(given)
        gradients = {name: core.where_rows(in_use[name], g, 0) for name, g in given.items()}
        count = optax.safe_increment(state.count)
        first = count == 1

        begin = lambda parts: self.bases.refresh(
            self._observe(parts, gradients, first), method="eigh"
        )
        parts = jax.lax.cond(first, begin, lambda same: same, state.rotated)
        steps = count - 1 if self.skip_first else count
        directions, parts = self._adam(parts, gradients, steps)
        parts = self._observe(parts, gradients, ~first)
        again = lambda due, _: self.bases.refresh(due, method=self.method)
        nothing = dict.fromkeys(parts, ())
        parts = self.refresh.for_part(site.devices).run(again, parts, nothing, steps)

        directions = {name: core.where_rows(in_use[name], x, 0) for name, x in directions.items()}
        skipped = {name: n + ~in_use[name][:, None] for name, n in state.skipped.items()}
        return directions, ScaleBySoapState(count, parts, skipped)

    def _observe(
        self, parts: dict[str, Rotated], gradients: Stacks, active: jax.Array
    ) -> dict[str, Rotated]:
        return {name: self.bases.observe(parts[name], g, active) for name, g in gradients.items()}

    def _adam(
        self, parts: dict[str, Rotated], gradients: Stacks, steps: jax.Array
    ) -> tuple[Stacks, dict[str, Rotated]]:
        """Adam's direction in each basis, turned back; and the moments. Nothing for step 0."""
        directions, new = {}, {}
        for name, g in gradients.items():
            part = parts[name]
            turned = kronecker.rotate(g, part.bases)
            mu = _common.update_mean(part.mu, turned, self.b1)
            nu = _common.update_mean(part.nu, jnp.square(turned), self.b2)
            at = jnp.maximum(steps, 1)
            correction = _common.bias_correction(self.b1, at).astype(mu.dtype)
            direction = _common.divide_by_root(
                mu / correction,
                nu,
                _common.bias_correction(self.b2, at),
                eps=self.eps,
                eps_root=0.0,
                eps_mode=self.eps_mode,
            )
            begun = steps > 0
            back = kronecker.rotate_back(direction, part.bases)
            directions[name] = jnp.where(begun, back, 0)
            new[name] = part._replace(
                mu=jnp.where(begun, mu, 0).astype(part.mu.dtype),
                nu=jnp.where(begun, nu, 0).astype(part.nu.dtype),
            )
        return directions, new


def scale_by_soap(
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    shampoo_beta: jax.typing.ArrayLike | None = None,
    block_size: int = 2048,
    merge_dims: bool = False,
    one_sided: bool = False,
    rotate_vectors: bool = False,
    refresh_every: int = 10,
    refresh: Schedule = "together",
    method: Method = "qr",
    first_step: FirstStep = "skip",
    eps_mode: _common.EpsMode = "corrected",
    mu_dtype: Any = None,
    stack_multiple: int = 1,
    gram_impl: kernels.Impl = "auto",
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in the eigenbases of Shampoo's statistics.

    A parameter is cut into blocks as for ``scale_by_shampoo``. For a matrix G, with bases
    $Q_L, Q_R$ of orthonormal columns and $G' = Q_L^T G Q_R$,

    $$M \leftarrow \beta_1 M + (1 - \beta_1) G', \quad V \leftarrow \beta_2 V + (1 - \beta_2) G'^2,
    \quad U = Q_L \frac{\hat M}{\sqrt{\hat V} + \epsilon} Q_R^T,$$

    hats for bias correction; then $L \leftarrow \beta L + (1 - \beta) G G^T$ and
    $R \leftarrow \beta R + (1 - \beta) G^T G$. Every ``refresh_every`` steps the bases follow them:
    with e the diagonal of $Q^T L Q$ and π what sorts it, largest first,
    $Q \leftarrow \mathrm{qr}(L\, Q_{:,\pi})$. M is turned into the new bases. V holds squares of
    coordinates and cannot be; it stays with its columns, in their new order. Tensors of more
    dimensions have a basis for each.

    The first bases are eigenvectors of the first gradient's statistics. No step is taken with that
    gradient, as in the official code: in its own eigenbases it is diagonal, and Adam would raise
    the rounding errors beside the diagonal to the size of what is on it.

    **How it is kin to Shampoo.** Where V is the outer product of the eigenvalues of L and R over
    their trace, the update is that of Shampoo with exponent 1/2, times the root of the trace.
    Adafactor's V would make it so; Adam's is free, and is updated every step, so bases may be older
    than Shampoo's roots.

    **Failures.** A basis that is not finite or not orthonormal leaves the one before in use, with
    its moments; ``failures`` counts how often in a row. A statistic that is not finite begins again
    from zero. A block whose gradient is not finite, or so large that its squares are not, is taken
    to have had a gradient of zero and is not moved in this step; ``skipped`` counts those.

    **Stacks** and how they lie on a mesh are those of ``scale_by_shampoo``.

    Memory, for an m-by-n matrix in one block: 2mn + 2m² + 2n² floats; ``one_sided`` leaves out the
    squares of the longer side.

    Departures from the official code (nikhilvyas/SOAP): it adds ε before V is corrected
    (``eps_mode="uncorrected"`` does so); it decays weights after the step instead of before; a
    dimension longer than its ``max_precond_dim`` has no basis there, and is cut into blocks here.
    From Meta's eigenvalue-corrected Shampoo: its bases are refreshed before a step, and its V stays
    where it was when columns change their order.

    Args:
      b1: decay of M, in [0, 1).
      b2: decay of V, in [0, 1).
      eps: ε, at least 0.
      shampoo_beta: β, in [0, 1); ``None`` is ``b2``.
      block_size: largest dimension of a block.
      merge_dims: join neighbouring dimensions while their product is at most ``block_size``.
      one_sided: of a matrix only the shorter dimension has a basis, the last of two equal ones.
      rotate_vectors: give blocks of one dimension a basis too; else they get Adam.
      refresh_every: steps from one basis of a block to the next.
      refresh: ``"together"``, or ``"staggered"``: a ``refresh_every``-th of the blocks each step.
      method: ``"qr"``: a step of orthogonal iteration, as above; ``"eigh"``: a decomposition.
      first_step: ``"skip"``, or ``"update"``: take a step with the first gradient too.
      eps_mode: ``"corrected"``, as ``optax.scale_by_adam`` adds ε, or ``"uncorrected"``.
      mu_dtype: of M; ``None`` is that of the arithmetic.
      stack_multiple: pad every stack to a multiple of this many rows.
      gram_impl: how L and R are updated: ``"auto"``, ``"xla"``, or by the kernel of
        ``kernels.gram_update`` for TPUs and Hopper GPUs ``"pallas"``, ``"interpret"`` on a CPU.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Updates keep their dtypes; arithmetic is in
      float32, or float64 if a parameter is.

    Raises:
      ValueError, TypeError: for an argument out of range; at ``init``, for a leaf that is not real
        floating point.

    References:
      Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson, Kakade, "SOAP: Improving and
      Stabilizing Shampoo using Adam", 2024, arXiv:2409.11321.
    """
    _common.check_adam_arguments(b1=b1, b2=b2, eps=eps, eps_mode=eps_mode)
    if shampoo_beta is not None:
        core.check_number("shampoo_beta", shampoo_beta, low=0.0, high=1.0, high_open=True)
    core.check_choice("method", method, ("qr", "eigh"))
    core.check_choice("first_step", first_step, FIRST_STEPS)
    core.check_choice("gram_impl", gram_impl, kernels.IMPLS)
    rule = _Soap(
        b1=b1,
        b2=b2,
        eps=eps,
        eps_mode=eps_mode,
        cutting=Cutting(block_size, merge_dims, stack_multiple),
        bases=Bases(
            b2 if shampoo_beta is None else shampoo_beta, one_sided, rotate_vectors, gram_impl
        ),
        refresh=make_refresh(refresh, refresh_every, None, stack_multiple),
        method=method,
        skip_first=first_step == "skip",
        mu_dtype=mu_dtype,
    )
    return optax.GradientTransformationExtraArgs(rule.init, rule.update)  # type: ignore[arg-type]


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _common.Mask = None,
    *,
    shampoo_beta: jax.typing.ArrayLike | None = None,
    block_size: int = 2048,
    merge_dims: bool = False,
    one_sided: bool = False,
    rotate_vectors: bool = False,
    refresh_every: int = 10,
    refresh: Schedule = "together",
    method: Method = "qr",
    first_step: FirstStep = "skip",
    eps_mode: _common.EpsMode = "corrected",
    mu_dtype: Any = None,
    stack_multiple: int = 1,
    gram_impl: kernels.Impl = "auto",
) -> optax.GradientTransformationExtraArgs:
    """SOAP: ``scale_by_soap``, decoupled weight decay, learning rate.

    Args:
      learning_rate: step size, at least 0, or a schedule of the step count.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: tree of bools, or a function of the parameters returning one: which leaves decay.
      shampoo_beta: see ``scale_by_soap``, as all that follow.
      block_size: see there.
      merge_dims: see there.
      one_sided: see there.
      rotate_vectors: see there.
      refresh_every: see there.
      refresh: see there.
      method: see there.
      first_step: see there.
      eps_mode: see there.
      mu_dtype: see there.
      stack_multiple: see there.
      gram_impl: see there.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_suite.optimizers.shampoo import soap
      >>> loss = lambda w: 0.5 * jnp.sum(jnp.array([[1.0], [100.0]]) * (w - 1.0) ** 2)
      >>> tx, w = soap(optax.linear_schedule(0.3, 0.0, 200), refresh_every=1), jnp.zeros((2, 3))
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     return optax.apply_updates(w, updates), state
      >>> state = tx.init(w)
      >>> for _ in range(200):
      ...     w, state = step(w, state)
      >>> bool(loss(w) < 1e-2)
      True

    References:
      Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam", 2024, arXiv:2409.11321.
    """
    rule = scale_by_soap(
        b1,
        b2,
        eps,
        shampoo_beta=shampoo_beta,
        block_size=block_size,
        merge_dims=merge_dims,
        one_sided=one_sided,
        rotate_vectors=rotate_vectors,
        refresh_every=refresh_every,
        refresh=refresh,
        method=method,
        first_step=first_step,
        eps_mode=eps_mode,
        mu_dtype=mu_dtype,
        stack_multiple=stack_multiple,
        gram_impl=gram_impl,
    )
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)
