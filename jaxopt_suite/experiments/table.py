"""The numbers of a comparison: finished runs in, one row for each optimizer out. Pure functions."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

BASELINE = "adamw"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run that has ended, reduced to what a comparison needs.

    Attributes:
      optimizer: the recipe's name.
      seed: seed of the initial parameters and of the data order.
      learning_rate: peak learning rate.
      steps: step of each evaluation, ascending, finite evaluations only.
      seconds: training seconds spent when each evaluation was made.
      val_loss: validation loss at each evaluation, nats per byte.
      ms_per_step: median milliseconds per training step.
      state_bytes: bytes of the optimizer state's arrays.
      n_params: parameters of the model.
      load: one-minute load average of the machine when the run ended.
      hardware: the device the run was timed on.
      mesh: what it was split over, such as data=8; ``None`` for one device.
      wire_bytes: bytes that each device sent per step, counted in the compiled program; where steps
        differ, the mean over a round of them.
      largest_wire_bytes: bytes that each device sent in the step that sends the most.
      diverged_at: the step at which the loss was first found not finite; ``None`` if it never was.
    """

    optimizer: str
    seed: int
    learning_rate: float
    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    val_loss: tuple[float, ...]
    ms_per_step: float
    state_bytes: int
    n_params: int
    load: float = 0.0
    hardware: str = ""
    mesh: str | None = None
    wire_bytes: float = 0.0
    largest_wire_bytes: float = 0.0
    diverged_at: int | None = None

    @property
    def final_loss(self) -> float:
        """Validation loss after the last step; infinite for a run that diverged."""
        diverged = self.diverged_at is not None or not self.val_loss
        return math.inf if diverged else self.val_loss[-1]

    @property
    def outcome(self) -> str:
        """The final loss, or at which step the run diverged, in words."""
        if self.diverged_at is not None:
            return f"diverged at step {self.diverged_at}"
        return f"validation loss {self.final_loss:.4f}"


@dataclasses.dataclass(frozen=True)
class Rate:
    """The learning rate an optimizer ran with, and where it came from.

    Attributes:
      value: peak learning rate.
      source: ``"tuned default"``, ``"given"`` or ``"swept"``.
      trials: the sweep's runs in ascending order of learning rate; empty without a sweep.
      at_edge: whether the best rate is the smallest or the largest one that was tried.
    """

    value: float
    source: str
    trials: tuple[Run, ...] = ()
    at_edge: bool = False


@dataclasses.dataclass(frozen=True)
class Curve:
    """Validation loss over the seeds of one optimizer, at the evaluations all of them reached.

    Attributes:
      steps: step of each evaluation, [points].
      seconds: training seconds until then, mean over seeds, [points].
      sent: bytes that a device has sent until then, [points].
      mean: mean loss over seeds, [points].
      low: smallest loss over seeds, [points].
      high: largest loss over seeds, [points].
    """

    steps: np.ndarray
    seconds: np.ndarray
    sent: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def mean_curve(runs: Sequence[Run]) -> Curve:
    """The curve of one optimizer's runs; where a run diverged, the curve ends."""
    steps = np.array(sorted(set.intersection(*(set(run.steps) for run in runs))))
    rows = [[run.steps.index(step) for step in steps] for run in runs]
    pairs = list(zip(runs, rows, strict=True))
    seconds = np.array([[run.seconds[i] for i in row] for run, row in pairs])
    losses = np.array([[run.val_loss[i] for i in row] for run, row in pairs])
    sent = steps * runs[0].wire_bytes
    return Curve(steps, seconds.mean(0), sent, losses.mean(0), losses.min(0), losses.max(0))


def first_reach(losses: Sequence[float] | np.ndarray, target: float) -> float | None:
    """Where a sequence first falls to a target, linearly interpolated.

    Args:
      losses: finite values, [points].
      target: the value to reach.

    Returns:
      A position in units of the index (2.5 lies half-way between ``losses[2]`` and ``losses[3]``),
      or ``None`` if no value is at or below the target.
    """
    for i, loss in enumerate(losses):
        if loss <= target:
            return i - (target - loss) / (losses[i - 1] - loss) if i else 0.0
    return None


@dataclasses.dataclass(frozen=True)
class Row:
    """One optimizer's line of the table. ``None`` is "there is no such number", never zero.

    Attributes:
      optimizer: the recipe's name.
      losses: final validation loss by seed, nats per byte; ``None`` for a diverged run.
      mean: their mean; ``None`` if any run diverged.
      spread: their sample standard deviation; ``None`` with one seed or a diverged run.
      diverged: the seed and the step of each run that diverged.
      difference: ``mean`` minus the baseline's mean.
      steps_to_baseline: steps until the mean curve first is at the baseline's final mean loss.
      seconds_to_baseline: training seconds until then.
      ms_per_step: median over seeds of the runs' median milliseconds per step.
      state_bytes_per_param: bytes of optimizer state divided by parameters.
      wire_bytes: bytes that each device sends per step; ``None`` without a mesh.
      largest_wire_bytes: bytes in the step that sends the most; ``None`` without a mesh.
      gbits_per_second: bandwidth with which ``wire_bytes`` take as long as a step; ``None`` without
        a mesh.
      peak_gbits_per_second: the same for ``largest_wire_bytes``.
      learning_rate: peak learning rate.
      rate_source: where the learning rate came from.
    """

    optimizer: str
    losses: tuple[float | None, ...]
    mean: float | None
    spread: float | None
    diverged: tuple[tuple[int, int], ...]
    difference: float | None
    steps_to_baseline: float | None
    seconds_to_baseline: float | None
    ms_per_step: float
    state_bytes_per_param: float
    wire_bytes: float | None
    largest_wire_bytes: float | None
    gbits_per_second: float | None
    peak_gbits_per_second: float | None
    learning_rate: float
    rate_source: str


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows, best first.

    Attributes:
      rows: sorted by mean validation loss; optimizers with a diverged run come last.
      curves: each optimizer's curve, in the order in which the optimizers were listed.
      baseline_loss: AdamW's mean final validation loss, or ``None``.
      baseline_gap: why there is no baseline; empty if there is one.
    """

    rows: tuple[Row, ...]
    curves: Mapping[str, Curve]
    baseline_loss: float | None
    baseline_gap: str


def _mean_loss(runs: Sequence[Run], curve: Curve) -> float | None:
    """Final mean loss, read off the curve so that the baseline reaches its own to the last bit."""
    return float(curve.mean[-1]) if all(math.isfinite(r.final_loss) for r in runs) else None


def _baseline(
    groups: Mapping[str, Sequence[Run]], curves: Mapping[str, Curve]
) -> tuple[float | None, str]:
    if BASELINE not in groups:
        return None, f"no {BASELINE} in the list"
    loss = _mean_loss(groups[BASELINE], curves[BASELINE])
    return loss, f"{BASELINE} diverged" if loss is None else ""


def _reach(curve: Curve, target: float | None) -> tuple[float | None, float | None]:
    """Steps and seconds until ``curve`` is at ``target``."""
    position = None if target is None else first_reach(curve.mean, target)
    if position is None:
        return None, None
    index = np.arange(len(curve.mean))
    steps = np.interp(position, index, curve.steps)
    return float(steps), float(np.interp(position, index, curve.seconds))


def _row(runs: Sequence[Run], rate: Rate, curve: Curve, baseline: float | None) -> Row:
    losses = [run.final_loss for run in runs]
    mean = _mean_loss(runs, curve)
    steps, seconds = _reach(curve, baseline)
    ms_per_step = statistics.median(run.ms_per_step for run in runs)
    on_mesh = runs[0].mesh is not None
    sent, largest = runs[0].wire_bytes, runs[0].largest_wire_bytes
    return Row(
        optimizer=runs[0].optimizer,
        losses=tuple(loss if math.isfinite(loss) else None for loss in losses),
        mean=mean,
        spread=None if mean is None or len(losses) < 2 else statistics.stdev(losses),
        diverged=tuple((r.seed, r.diverged_at) for r in runs if r.diverged_at is not None),
        difference=None if mean is None or baseline is None else mean - baseline,
        steps_to_baseline=steps,
        seconds_to_baseline=seconds,
        ms_per_step=ms_per_step,
        state_bytes_per_param=runs[0].state_bytes / runs[0].n_params,
        wire_bytes=sent if on_mesh else None,
        largest_wire_bytes=largest if on_mesh else None,
        gbits_per_second=_gbits(sent, ms_per_step) if on_mesh else None,
        peak_gbits_per_second=_gbits(largest, ms_per_step) if on_mesh else None,
        learning_rate=rate.value,
        rate_source=rate.source,
    )


def _gbits(nbytes: float, milliseconds: float) -> float:
    """Gbit/s at which bytes take so long."""
    return 8e-6 * nbytes / milliseconds


def summarize(runs: Sequence[Run], rates: Mapping[str, Rate]) -> Table:
    """The table of a comparison.

    Args:
      runs: the final runs, all seeds of all optimizers, in any order.
      rates: each optimizer's learning rate, in the order in which the optimizers were listed.

    Returns:
      The rows, sorted by validation loss, and the curves they were computed from.
    """
    groups = {name: [run for run in runs if run.optimizer == name] for name in rates}
    curves = {name: mean_curve(group) for name, group in groups.items()}
    loss, gap = _baseline(groups, curves)
    rows = [_row(group, rates[name], curves[name], loss) for name, group in groups.items()]
    rows.sort(key=lambda row: math.inf if row.mean is None else row.mean)
    return Table(tuple(rows), curves, loss, gap)


_HEADINGS = (  # a line break is where a narrow medium may break the line; others show a space
    "optimizer",
    "validation loss",
    "vs AdamW",
    "steps to\nAdamW's loss",
    "seconds to\nAdamW's loss",
    "ms per\nstep",
    "state bytes per\nparameter",
    "learning rate",
)
_ON_MESH = (
    "bytes sent per\nstep and device",
    "in the\nlargest step",
    "Gbit/s then\n(on average)",
)


def headings(table: Table) -> tuple[str, ...]:
    """The columns of a table; what crosses between devices has some where there are several."""
    on_mesh = any(row.wire_bytes is not None for row in table.rows)
    return (*_HEADINGS, *_ON_MESH) if on_mesh else _HEADINGS


def _loss_cell(row: Row) -> str:
    if row.diverged:
        step = min(step for _, step in row.diverged)
        share = f" ({len(row.diverged)} of {len(row.losses)} seeds)" if len(row.losses) > 1 else ""
        return f"diverged at step {step}{share}"
    return f"{row.mean:.4f}" + ("" if row.spread is None else f" ± {row.spread:.4f}")


def cells(row: Row, table: Table) -> tuple[str, ...]:
    """One row as text, in the order of ``headings``."""

    def relative(value: float | None, template: str, absent: str) -> str:
        return table.baseline_gap or (absent if value is None else template.format(value))

    is_baseline = row.optimizer == BASELINE and not table.baseline_gap
    return (
        row.optimizer,
        _loss_cell(row),
        "baseline" if is_baseline else relative(row.difference, "{:+.4f}", "diverged"),
        relative(row.steps_to_baseline, "{:.0f}", "not reached"),
        relative(row.seconds_to_baseline, "{:.1f}", "not reached"),
        f"{row.ms_per_step:.1f}",
        f"{row.state_bytes_per_param:.2f}",
        f"{row.learning_rate:.3g} ({row.rate_source})",
        *_sent_cells(row),
    )


def _sent_cells(row: Row) -> tuple[str, ...]:
    if row.wire_bytes is None:
        return ()
    bandwidth = f"{row.peak_gbits_per_second:.3g} ({row.gbits_per_second:.3g})"
    return f"{row.wire_bytes:,.0f}", f"{row.largest_wire_bytes:,.0f}", bandwidth


def entropy_statement(table: Table, entropy: float) -> str:
    """Says which optimizers end below the unigram entropy of the data, and which do not."""
    below = [row.optimizer for row in table.rows if row.mean is not None and row.mean < entropy]
    others = [row.optimizer for row in table.rows if row.optimizer not in below]
    parts = [
        f"Unigram entropy of the validation bytes: {entropy:.4f} nats per byte (what a model "
        "that knows only how frequent each byte is would reach).",
        f"Below it: {', '.join(below) or 'none'}.",
    ]
    return " ".join(parts + ([f"Not below it: {', '.join(others)}."] if others else []))
