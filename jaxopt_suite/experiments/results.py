"""How a run ended, in numbers."""

import dataclasses
import math
import statistics
from typing import Literal

from jaxopt_suite.experiments.logs import RunFolder
from jaxopt_suite.experiments.steps import Program

Stopped = Literal["finished", "signal", "nonfinite"]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended; losses are in nats per byte and NaN where none was recorded.

    Attributes:
      run: its folder; ``run.read()`` has the curves.
      step: steps made, earlier starts included.
      train_loss: of the last record.
      val_loss: of the last evaluation.
      stopped: why it ended.
      message: the same for people, with the step.
      signum: the signal's number if it was one.
      seconds: spent on steps alone: no compilation, evaluation or checkpoint.
      ms_per_step: median over the intervals between records.
      tokens_per_second: over all steps recorded.
      state_bytes: of the optimizer.
      mesh: what this start ran on, such as data=8; None: one device.
      wire_bytes: sent by each device per step, counted in the compiled program; where steps differ,
        the mean over a round of them.
      largest_wire_bytes: sent by each device in the step that sends the most.
      n_params: trained parameters.
      learning_rate: its peak; None where the optimizer keeps its own.
      unigram_entropy: of the validation data; no model that ignores context has a lower loss.
    """

    run: RunFolder
    step: int
    train_loss: float
    val_loss: float
    stopped: Stopped
    message: str
    signum: int | None
    seconds: float
    ms_per_step: float
    tokens_per_second: float
    state_bytes: int
    mesh: str | None
    wire_bytes: float
    largest_wire_bytes: float
    n_params: int
    learning_rate: float | None
    unigram_entropy: float


def summarize(
    run: RunFolder,
    program: Program,
    *,
    step: int,
    tokens_per_step: int,
    unigram_entropy: float,
    stopped: Stopped,
    message: str,
    signum: int | None = None,
) -> TrainResult:
    """The result as the run's records have it, so that it is the same for whoever asks later.

    Args:
      run: the folder with the records.
      program: what was run.
      step: steps made, earlier starts included.
      tokens_per_step: predictions per step.
      unigram_entropy: of the validation data, nats per byte.
      stopped: why it ended.
      message: the same for people.
      signum: the signal's number if it was one.

    Returns:
      The result.
    """
    records = run.read()
    trained = [record for record in records if "loss" in record]
    validations = [record["val_loss"] for record in records if "val_loss" in record]
    paces = [1e3 * tokens_per_step / record["tokens_per_second"] for record in trained]
    seconds = float(trained[-1]["seconds"]) if trained else 0.0
    return TrainResult(
        run=run,
        step=step,
        train_loss=_last([record["loss"] for record in trained]),
        val_loss=_last(validations),
        stopped=stopped,
        message=message,
        signum=signum,
        seconds=seconds,
        ms_per_step=statistics.median(paces) if paces else math.nan,
        tokens_per_second=trained[-1]["tokens"] / seconds if trained else math.nan,
        state_bytes=program.state_bytes,
        mesh=program.mesh,
        wire_bytes=program.traffic.mean,
        largest_wire_bytes=program.traffic.largest,
        n_params=program.n_params,
        learning_rate=program.peak,
        unigram_entropy=unigram_entropy,
    )


def _last(values: list[float | None]) -> float:
    """The last of recorded values, where null stands for one that was not finite."""
    return math.nan if not values or values[-1] is None else values[-1]
