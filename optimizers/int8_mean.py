"""Means in one byte an entry: INTELLECT-1's quantiser, and AdamW on an 8-bit mean."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_suite import core
from jaxopt_suite.optimizers import _common
from jaxopt_suite.optimizers.compression import feedback
from jaxopt_suite.optimizers.compression.compressor import Compressor, Shape
from jaxopt_suite.optimizers.compression.mean import DenseRule, compressed_mean
from jaxopt_suite.optimizers.compression.quantize import int8
from jaxopt_suite.optimizers.grams import scale_by_grams

_LEVELS = 256

Quantiser = Literal["absmax", "intellect"]


class BinPayload(NamedTuple):
    """What ``intellect_int8`` sends for N entries."""

    codes: jax.Array  # uint8 [N]: the bin of each entry
    values: jax.Array  # float32 [256]: mean of the entries in each bin, 0 in an empty one


def intellect_int8(width: float = 6.0) -> Compressor:
    r"""One byte an entry: 256 bins of equal width, each decoded as the mean of what fell into it.

    For a tensor x of N entries, with $\varsigma = \|x\|_2 / \sqrt{N-1}$ (x is not centred) and
    width c,

    $$\mathrm{code} = \mathrm{clip}(\mathrm{round}(256\, x / (c\,\varsigma)) + 128, 0, 255),$$

    ties away from zero. The first and the last bin take all that is beyond ±c/2 root mean squares,
    and decode to its mean. The means travel, 1024 bytes a tensor, and those of a bin are summed in
    float32. A tensor of zeros is decoded to zeros, one of a single entry to itself.

    In INTELLECT-1 this averages the workers' movements of many steps, without error feedback:
    ``compressed_mean(intellect_int8(), feedback=feedback.none(), exchange="two_phase")``. Theirs is
    a ring, which quantises the sum again at every hop; the two phases of ``compressed_mean``
    quantise twice, and its error does not grow with the number of workers. In both what is received
    is added up in float32.

    Args:
      width: of all bins together, in root mean squares. 6, ±3 of them, is in the official code; 12
        has 0.6 of its squared error for Gaussian entries, 0.04 for Laplacian ones: movements of
        many steps have such tails.

    Returns:
      N + 1024 bytes. Neither a contraction factor nor unbiased: the mean of all entries is kept,
      and E‖C(x) − x‖² ≤ (c/256)² ‖x‖²/4 but for the entries in the outer bins.

    References:
      Jaghouar et al., "INTELLECT-1 Technical Report", 2024, arXiv:2412.01152.
    """
    core.check_number("width", width, low=0.0, low_open=True)

    def encode(x: jax.Array, key: jax.Array) -> BinPayload:
        del key  # nothing is drawn
        flat = x.reshape(-1)
        codes = _codes(flat, width)
        ones = jnp.zeros(_LEVELS).at[codes].add(1.0)
        # In units of the largest entry no sum leaves the range of float32.
        largest = jnp.max(jnp.abs(flat), initial=0.0)
        unit = jnp.where(largest == 0, 1.0, largest)
        sums = jnp.zeros(_LEVELS).at[codes].add(flat / unit)
        values = unit * sums / jnp.maximum(ones, 1.0)
        values = jnp.where(jnp.isfinite(largest), values, jnp.nan)
        return BinPayload(codes, values)

    def decode(payload: BinPayload, like: jax.ShapeDtypeStruct) -> jax.Array:
        return payload.values[payload.codes].reshape(like.shape)

    def nbytes(shape: Shape) -> int:
        return math.prod(shape) + 4 * _LEVELS

    return Compressor(
        name="intellect_int8",
        encode=encode,
        decode=decode,
        nbytes=nbytes,
        linear=False,
        shared_key=False,
        block=1,
        contraction=None,
        variance=None,
    )


def _codes(flat: jax.Array, width: float) -> jax.Array:
    largest = jnp.max(jnp.abs(flat), initial=0.0)
    unit = flat / jnp.where(largest == 0, 1.0, largest)
    sigma = jnp.sqrt(jnp.sum(jnp.square(unit)) / max(flat.size - 1, 1))
    steps = unit / jnp.where(sigma == 0, 1.0, sigma * (width / _LEVELS))
    rounded = jnp.trunc(steps + jnp.copysign(0.5, steps))  # halves away from zero
    return jnp.clip(rounded + _LEVELS // 2, 0, _LEVELS - 1).astype(jnp.uint8)


def adamw_int8(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: _common.Mask = None,
    *,
    axis_name: str,
    quantiser: Quantiser = "absmax",
    dense: DenseRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on the mean of workers' gradients, which travels in one byte an entry each way.

    ``compressed_mean`` in two phases without error feedback, Adam with float32 moments, decay,
    learning rate. Wire: 2 (n - 1)/n bytes an entry a step, and scales: a quarter of a dense mean's.

    Args:
      learning_rate: step size, at least 0, or a schedule of the step count.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root, at least 0.
      eps_root: added under the root, at least 0.
      mu_dtype: dtype of the first moment; ``None`` is float32.
      weight_decay: decoupled, multiplied by the learning rate.
      mask: tree of bools, or a function of the parameters returning one: which leaves decay.
      axis_name: the workers' axis, of ``parallel.run_workers`` or ``make_train_step``.
      quantiser: ``"absmax"``, ``compressors.int8()``, or ``"intellect"``, ``intellect_int8()``.
      dense: as in ``compressed_mean``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``; its updates are added to the parameters.

    References:
      Jaghouar et al., "INTELLECT-1 Technical Report", 2024, arXiv:2412.01152, for its quantiser.
    """
    core.check_choice("quantiser", quantiser, ("absmax", "intellect"))
    rule = optax.chain(
        compressed_mean(
            int8() if quantiser == "absmax" else intellect_int8(),
            axis_name=axis_name,
            feedback=feedback.none(),
            exchange="two_phase",
            dense=dense,
        ),
        scale_by_grams(b1, b2, eps, eps_root, mu_dtype, kappa=1.0),  # which is Adam
    )
    return _common.with_decay_and_rate(rule, learning_rate, weight_decay=weight_decay, mask=mask)
