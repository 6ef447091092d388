"""Error feedback: what a worker remembers of what its lossy messages left out.

Every rule here has one form. A worker turns its input into a message, the message is sent lossily,
and the worker settles its memory knowing what the others will take its message for. The mean of
what was sent becomes the update, by way of an estimate that all workers hold if the rule has one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_suite import core

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Feedback:
    """A rule of error feedback for one array; all arrays are float32 and of one shape.

    Attributes:
      name: as it is written, with its parameters.
      local: how many arrays a worker keeps of its own; they start at zero.
      shared: how many arrays all workers keep alike; they start at zero.
      message: ``(x, local) -> message``, what is to be compressed.
      settle: ``(x, local, sent) -> local``, after ``sent`` was taken for the message.
      result: ``(mean of sent, shared) -> (update, shared)``.
      exact: whether messages that arrive unchanged give the mean of the inputs, so that an array
        which is not compressed needs no memory.
    """

    name: str
    local: int
    shared: int
    message: Callable[[jax.Array, Arrays], jax.Array]
    settle: Callable[[jax.Array, Arrays, jax.Array], Arrays]
    result: Callable[[jax.Array, Arrays], tuple[jax.Array, Arrays]]
    exact: bool = True


def none() -> Feedback:
    """No memory: for unbiased compressors, whose errors average out.

    A biased one need not converge: top-1 of three workers' gradients diverges on a strongly convex
    quadratic at every step size (Beznosikov et al., arXiv:2002.12410).
    """
    return Feedback(
        name="none()",
        local=0,
        shared=0,
        message=lambda x, local: x,
        settle=lambda x, local, sent: local,
        result=lambda mean, shared: (mean, shared),
    )


def ef() -> Feedback:
    r"""Error feedback: what a message left out is added to the next one.

    Worker $w$ with input $x_w$, residual $e_w$ (starts at zero) and compressor $C$:

    $$c_w = C(x_w + e_w), \quad e_w \leftarrow x_w + e_w - c_w,
    \quad u = \tfrac1n \textstyle\sum_w c_w.$$

    Nothing is lost: inputs summed over steps and averaged over workers are the updates summed over
    steps plus the mean of the residuals. Workers whose gradients differ at the optimum keep large
    residuals there, and a fixed step then stalls at a distance; see ``ef21`` and ``econtrol``.

    Memory: 4mn bytes per worker for an m-by-n matrix.

    The residual has the units of the link's input. Before the learning rate of a chain these are
    gradients, so that a decayed rate shrinks what is still owed (PowerSGD, 1-bit Adam). After it,
    ``optax.chain(optax.scale_by_learning_rate(rate), compressed_mean(...))``, they are steps, and
    what is owed is paid at the rate of its day (Stich et al., Karimireddy et al.).

    References:
      Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel
      Distributed Training of Speech DNNs", Interspeech 2014. Stich, Cordonnier, Jaggi, "Sparsified
      SGD with Memory", 2018, arXiv:1809.07599. Karimireddy et al., "Error Feedback Fixes SignSGD
      and other Gradient Compression Schemes", 2019, arXiv:1901.09847.
    """
    return Feedback(
        name="ef()",
        local=1,
        shared=0,
        message=lambda x, local: x + local[0],
        settle=lambda x, local, sent: (x + local[0] - sent,),
        result=lambda mean, shared: (mean, shared),
    )


def ef21() -> Feedback:
    r"""EF21: the difference to a running estimate is compressed, and it vanishes at an optimum.

    With worker $w$'s estimate $h_w$ and their mean $\bar h$, which all workers hold:

    $$c_w = C(x_w - h_w), \quad h_w \leftarrow h_w + c_w,
    \quad \bar h \leftarrow \bar h + \tfrac1n \textstyle\sum_w c_w, \quad u = \bar h.$$

    Converges to the optimum at a fixed step however much the workers' gradients differ; gradient
    noise, though, does not average out over steps as it does with ``ef``: see ``momentum``.

    Memory: 4mn bytes per worker for $h_w$, 4mn for $\bar h$.

    Departs from the official code in that $h_w$ starts at zero and the first message is compressed
    as any other, which the paper allows; theirs is the whole gradient.

    References:
      Richtárik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically
      Faster Error Feedback", 2021, arXiv:2106.05203.
    """
    return Feedback(
        name="ef21()",
        local=1,
        shared=1,
        message=lambda x, local: x - local[0],
        settle=lambda x, local, sent: (local[0] + sent,),
        result=_add_to_estimate,
    )


def econtrol(eta: jax.typing.ArrayLike) -> Feedback:
    r"""EControl: an estimate as in EF21 and a residual of which a fraction is fed back.

    $$c_w = C(\eta e_w + x_w - h_w), \quad e_w \leftarrow e_w + x_w - h_w - c_w,
    \quad h_w \leftarrow h_w + c_w,$$
    $$\bar h \leftarrow \bar h + \tfrac1n \textstyle\sum_w c_w, \quad u = \bar h.$$

    Keeps the exact limit of EF21 under heterogeneous workers and most of the averaging of noise
    that ``ef`` has. ``eta`` of 0 is EF21; of the order of the compressor's contraction factor (k/d
    for top-k) works; of 1 diverges.

    Memory: 8mn bytes per worker for $e_w$ and $h_w$, 4mn for $\bar h$.

    Departs from the paper in that $h_w$ starts at zero, where theirs is the first gradient, sent
    whole.

    Args:
      eta: the fraction of the residual in a message, in [0, 1].

    References:
      Gao, Islamov, Stich, "EControl: Fast Distributed Optimization with Compression and Error
      Control", 2023, arXiv:2311.05645.
    """
    core.check_number("eta", eta, low=0.0, high=1.0)

    def message(x: jax.Array, local: Arrays) -> jax.Array:
        error, estimate = local
        return jnp.asarray(eta, error.dtype) * error + (x - estimate)

    def settle(x: jax.Array, local: Arrays, sent: jax.Array) -> Arrays:
        error, estimate = local
        return error + (x - estimate) - sent, estimate + sent

    return Feedback(
        name=f"econtrol({eta})",
        local=2,
        shared=1,
        message=message,
        settle=settle,
        result=_add_to_estimate,
    )


def momentum(b: jax.typing.ArrayLike, then: Feedback | None = None) -> Feedback:
    r"""A running mean of a worker's inputs goes to another rule in their place.

    $$v_w \leftarrow (1 - b)\, v_w + b\, x_w,$$

    and $v_w$ is the input of ``then``. Note that ``b`` is the weight of the *new* input. With
    ``ef21`` it is EF21-SGDM: the mean takes out the noise that EF21 would send on.

    Memory: 4mn bytes per worker for $v_w$, besides that of ``then``; also for leaves that are not
    compressed.

    Departs from the paper in that $v_w$ starts at zero, where theirs is the first gradient: the
    first updates are small, $1 - (1-b)^t$ of what they will be.

    Args:
      b: the weight of the new input, in (0, 1].
      then: the rule that compresses the mean; None: ``ef21()``.

    References:
      Fatkhullin, Tyurin, Richtárik, "Momentum Provably Improves Error Feedback!", 2023,
      arXiv:2305.15155.
    """
    core.check_number("b", b, low=0.0, high=1.0, low_open=True)
    then = ef21() if then is None else then

    def mean(x: jax.Array, local: Arrays) -> jax.Array:
        return local[0] + jnp.asarray(b, x.dtype) * (x - local[0])

    def settle(x: jax.Array, local: Arrays, sent: jax.Array) -> Arrays:
        v = mean(x, local)
        return v, *then.settle(v, local[1:], sent)

    return Feedback(
        name=f"momentum({b}, {then.name})",
        local=1 + then.local,
        shared=then.shared,
        message=lambda x, local: then.message(mean(x, local), local[1:]),
        settle=settle,
        result=then.result,
        exact=False,
    )


def _add_to_estimate(mean: jax.Array, shared: Arrays) -> tuple[jax.Array, Any]:
    estimate = shared[0] + mean
    return estimate, (estimate,)
