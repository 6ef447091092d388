"""Learning rate over the steps of one run."""

import optax


def learning_rate_schedule(
    kind: str, peak: float, *, steps: int, warmup_fraction: float
) -> optax.Schedule:
    r"""A linear warm-up to ``peak``, then a cosine to a tenth of it, or no change at all.

    With $w$ warm-up steps, update $t = 0, 1, \dots$ of $T$ has the rate $\eta (t+1)/(w+1)$ while
    $t < w$, so no step is wasted on a rate of zero. Afterwards it is $\eta$ for ``"constant"`` and
    $\eta (0.1 + 0.45 (1 + \cos(\pi (t-w)/(T-w))))$ for ``"cosine"``.

    Args:
      kind: ``"cosine"`` or ``"constant"``, as in ``Recipe.schedule``.
      peak: the largest learning rate, $\eta$.
      steps: number of updates, $T$.
      warmup_fraction: $w / T$, in [0, 1]; $w$ is rounded to an integer below $T$.

    Returns:
      A function of the number of updates made so far.

    Raises:
      ValueError: if ``kind`` is neither of the two.
    """
    warmup = min(round(warmup_fraction * steps), steps - 1)
    if kind == "cosine":
        after = optax.cosine_decay_schedule(peak, steps - warmup, alpha=0.1)
    elif kind == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise ValueError(f"schedule must be 'cosine' or 'constant', got {kind!r}")
    if warmup == 0:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup]
    )
