"""What ``jaxopt-suite fit`` can be told. Imports no JAX, so that ``--help`` answers at once."""

import dataclasses
from typing import Literal

import tyro

from jaxopt_suite.experiments.config import at_least, positive, refuse


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Fit a scaling law to logged runs; intervals, checks, the compute-optimal size, a report.

    Attributes:
      runs: folder or file: our own run folders, JSON lines, CSV, Parquet or TensorBoard events.
      law: name of a law; --list shows them.
      columns: our names of columns and yours, such as N=params,D=tokens,loss=val/loss,C=flops.
      n_rule: how N is counted: body, body_head, total or a name of your own.
      flops: how C is counted, such as 6ND; computes C, or D from C, where it is missing.
      keep: which runs to keep, an expression such as "N > 1e7 and optimizer == 'adamw'".
      on_bad: what to do about rows that cannot be used: raise, or drop and list them.
      objective: what is minimised: huber(1e-3), absolute(), squares() or quantile(0.1); with
        space='linear' on losses instead of their logarithms.
      weights: column with the weights of runs; None: 1 each.
      resample: what a bootstrap draws: rows, or a column whose equal values go together.
      bootstrap: number of resamples; 0 for intervals from the covariance.
      starts: starts of the fit, besides published values.
      level: of the intervals.
      at: FLOPs at which to give the compute-optimal size; may be given several times.
      next_run: FLOPs you can spend on one more run: which would tell most?
      allow: checks to leave out: few_runs, collinear or mixed; may be given for each.
      seed: of starts and resamples.
      out: folder for the report, its pictures and everything as JSON; None: the table alone.
      list: show the laws, and do nothing else.
    """

    runs: tyro.conf.Positional[str | None] = None
    law: str = "chinchilla"
    columns: str | None = None
    n_rule: str | None = None
    flops: str | None = None
    keep: str | None = None
    on_bad: Literal["raise", "drop"] = "raise"
    objective: str = "huber(1e-3)"
    weights: str | None = None
    resample: str = "rows"
    bootstrap: int = 1000
    starts: int = 256
    level: float = 0.9
    at: tuple[float, ...] = ()
    next_run: float | None = None
    allow: tuple[Literal["few_runs", "collinear", "mixed"], ...] = ()
    seed: int = 0
    out: str | None = None
    list: bool = False

    def validate(self) -> None:
        """Checks every value that can be checked without loading anything.

        Raises:
          UserError: naming the option, its value and what is legal.
        """
        if self.runs is None and not self.list:
            refuse("runs", self.runs, "the folder or file with the runs (or give --list)")
        at_least("bootstrap", self.bootstrap, 0)
        at_least("starts", self.starts, 1)
        at_least("seed", self.seed, 0)
        if not 0 < self.level < 1:
            refuse("level", self.level, "a share in (0, 1)")
        for flops in self.at:
            positive("at", flops)
        if self.next_run is not None:
            positive("next_run", self.next_run)
