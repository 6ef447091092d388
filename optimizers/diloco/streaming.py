"""Streaming DiLoCo: the parameters in fragments, each synchronised in its turn."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers.diloco import local
from jaxopt_suite.optimizers.diloco.diloco import Restart, initial_state
from jaxopt_suite.optimizers.diloco.fragments import (
    ORDERS,
    Fragments,
    Order,
    Timetable,
    count_fragments,
)
from jaxopt_suite.optimizers.diloco.outer import contribution, nesterov, outer_step
from jaxopt_suite.optimizers.diloco.state import DilocoState

_FRAGMENTS = 4


def streaming_diloco(
    inner: optax.GradientTransformation,
    outer: optax.GradientTransformation | None = None,
    *,
    sync_every: int,
    axis_name: str,
    fragments: Any = None,
    order: Order = "strided",
    delay: int = 0,
    mixing: jax.typing.ArrayLike = 0.0,
    rejoin: Restart = "keep",
) -> optax.GradientTransformationExtraArgs:
    r"""DiLoCo in fragments: each is synchronised every H steps, at a time of its own.

    Written for one worker, as ``diloco``, whose notation, weights (``active=``), treatment of
    absent workers and of non-finite numbers, and rounding this has. All parameters take every inner
    step. Fragment p of P is *sent* at the end of inner steps $t$, from 1, with
    $t \equiv \lfloor (p+1) H / P \rfloor \pmod H$,

    $$\bar\Delta_p = \mathrm{mean}_w(\Theta_p - \theta_{w,p}), \quad
    \Theta_p \leftarrow \Theta_p + \mathrm{outer}_p(\bar\Delta_p),$$

    and τ steps later *applied*: $\theta_{w,p} \leftarrow \alpha\,\theta_{w,p} +
    (1-\alpha)\Theta_p$. So no step sends more than one fragment, a P-th of the parameters: the peak
    bandwidth is a P-th of DiLoCo's. ``outer`` has a state for each fragment, so that momenta rest
    until their fragment's turn. ``fragments.Timetable(H, P, τ).events(steps)`` lists all of it. One
    fragment, without delay and mixing, is ``diloco``.

    **Overlap.** The outer step is taken as soon as a fragment is sent, which is the same arithmetic
    as τ steps later: nothing looks at $\Theta_p$ in between but an evaluation. Its first use in
    training comes with the step that applies it. That leaves room to communicate beside τ inner
    steps, but a reduction inside of one compiled step ends with that step at the latest: to use the
    room, a compiler or a runtime must see several steps at once, as in a scan over them.

    **Wire.** A sending step is one branch of a switch on the count, with what ``outer`` sends for
    that fragment and two numbers; other steps send nothing. ``compressed_mean(compressors.int4(),
    ...)`` in ``outer`` makes it four bits an entry.

    Memory as ``diloco``'s: fragments that are under way are in $\Theta$ already.

    Args:
      inner: as in ``diloco``.
      outer: as in ``diloco``; it sees one fragment at a time, with ``optax.MaskedNode`` in the
        places of other leaves.
      sync_every: H, at least P.
      axis_name: as in ``diloco``.
      fragments: P, at most the number of leaves; or a tree like the parameters with the fragment of
        every leaf, from 0: layers that stay together, for instance. None: 4, or fewer if there are
        fewer leaves, or steps in a period.
      order: how P fragments are cut, ``"strided"`` or ``"sequential"``; see ``Fragments``.
      delay: τ, at least 0 and below H; the paper advises up to 5.
      mixing: α, how much of a worker's own fragment stays, in [0, 1].
      rejoin: as in ``diloco``.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with the state of ``diloco``; ``outer`` in it is
      a tuple, ``since`` counts the steps of the period.

    Raises:
      ValueError, TypeError: for an argument out of range, as in ``diloco``; at ``init``, for more
        fragments than leaves, or a tree of them that is not like the parameters.

    References:
      Douillard et al., "Streaming DiLoCo with overlapping communication: Towards a Distributed Free
      Lunch", 2025, arXiv:2501.18512. Departures: its text and its Algorithm 2 differ in the sign of
      offsets, and literally the first round of a fragment is shorter or longer than H; here
      fragment p is first sent at its offset, as in MaxText (torchft sends it τ steps earlier).
      Fragments are of whole leaves, not of layers, unless told. The paper's four bits are E3M0,
      ours are ``int4``.
    """
    core.check_choice("order", order, ORDERS)
    core.check_choice("rejoin", rejoin, ("keep", "reset"))
    core.check_number("mixing", mixing, low=0.0, high=1.0)
    Timetable(sync_every, 1 if fragments is None else count_fragments(fragments), delay)  # checks
    stream = _Stream(
        inner=optax.with_extra_args_support(inner),
        outer=optax.with_extra_args_support(nesterov(axis_name) if outer is None else outer),
        every=sync_every,
        fragments=fragments,
        order=order,
        delay=delay,
        mixing=mixing,
        axis_name=axis_name,
        rejoin=rejoin,
    )
    return optax.GradientTransformationExtraArgs(stream.init, stream.update)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class _Stream:
    """What ``streaming_diloco`` was called with, checked."""

    inner: optax.GradientTransformationExtraArgs
    outer: optax.GradientTransformationExtraArgs
    every: int
    fragments: Any
    order: str
    delay: int
    mixing: jax.typing.ArrayLike
    axis_name: str
    rejoin: str

    def cut(self, params: optax.Params) -> Fragments:
        given, leaves = self.fragments, len(jax.tree.leaves(params))
        if given is None:
            given = max(1, min(_FRAGMENTS, leaves, self.every))
        return Fragments(params, given, self.order)

    def init(self, params: optax.Params) -> DilocoState:
        parts = self.cut(params)

        def outer_state(theta: Any) -> tuple[Any, ...]:
            return tuple(self.outer.init(parts.pick(theta, p)) for p in range(parts.count))

        return initial_state(self.inner, outer_state, params, self.axis_name)

    def update(
        self,
        updates: optax.Updates,
        state: DilocoState,
        params: optax.Params | None = None,
        *,
        active: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DilocoState]:
        weight = local.as_weight(active)
        step, state = local.advance(
            self.inner,
            updates,
            state,
            params,
            active=weight,
            rejoin=self.rejoin,
            axis_name=self.axis_name,
            **extra_args,
        )
        state = state._replace(since=state.since % self.every)
        parts, specs = self.cut(params), extra_args.get("param_specs")
        timetable = Timetable(self.every, parts.count, self.delay)

        send = lambda p, step, state: self.send(parts, p, params, step, state, weight, specs)
        apply = lambda p, step, theta: self.apply(parts, p, params, step, theta, weight)
        sent, arrived = timetable.sent(state.count), timetable.applied(state.count)
        step, state = _switch(sent, parts.count, send, lambda *same: same, step, state)
        rest = lambda step, outer_params: step
        return _switch(arrived, parts.count, apply, rest, step, state.outer_params), state

    def send(
        self,
        parts: Fragments,
        p: int,
        params: optax.Params,
        step: optax.Updates,
        state: DilocoState,
        active: jax.Array | None,
        specs: Any,
    ) -> tuple[optax.Updates, DilocoState]:
        """The outer step of one fragment; a worker that is not finite there begins anew."""
        theta = parts.pick(state.outer_params, p)
        reached = optax.apply_updates(parts.pick(params, p), parts.pick(step, p))
        own = contribution(local.pseudo_gradient(theta, reached), active, self.axis_name)
        stepped = outer_step(
            self.outer, own, theta, state.outer[p], axis_name=self.axis_name, param_specs=specs
        )
        theta = parts.put(state.outer_params, stepped.params, p)
        fresh = local.restarted(self.inner, state.inner, theta, params)
        anew = local.updates_to(params, theta), fresh
        step, inner = local.choose(own.finite, (step, state.inner), anew)
        return step, state._replace(
            inner=inner,
            outer_params=theta,
            outer=(*state.outer[:p], stepped.state, *state.outer[p + 1 :]),
            skipped=state.skipped + stepped.skipped,
            left_out=state.left_out + own.left_out,
        )

    def apply(
        self,
        parts: Fragments,
        p: int,
        params: optax.Params,
        step: optax.Updates,
        outer_params: Any,
        active: jax.Array | None,
    ) -> optax.Updates:
        """The step, and for one fragment in its place the way to where it is mixed."""
        theta, own = parts.pick(outer_params, p), parts.pick(params, p)
        reached = optax.apply_updates(own, parts.pick(step, p))
        kept = self.mixing if active is None else jnp.where(active > 0, self.mixing, 0.0)
        mixed = jax.tree.map(
            lambda o, x: o + jnp.asarray(kept, o.dtype) * (x.astype(o.dtype) - o), theta, reached
        )
        return parts.put(step, local.updates_to(own, mixed), p)


def _switch(
    index: jax.Array,
    count: int,
    branch: Callable[..., Any],
    otherwise: Callable[..., Any],
    *operands: Any,
) -> Any:
    """``branch(index, *operands)`` for an index below ``count``, else ``otherwise(*operands)``."""
    branches: list[Callable[..., Any]] = [functools.partial(branch, p) for p in range(count)]
    branches.append(otherwise)
    return jax.lax.switch(index, core.alike(branches, *operands), *operands)
