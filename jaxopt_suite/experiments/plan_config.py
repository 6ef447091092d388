"""What ``jaxopt-suite plan`` can be told. Imports no JAX, so that ``--help`` answers at once."""

import dataclasses
from typing import Literal

from jaxopt_suite.experiments.config import (
    LayoutConfig,
    at_least,
    parse_settings,
    positive,
    refuse,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(LayoutConfig):
    """Compile the train step for a pod that need not exist; report memory, FLOPs, wire and time.

    Attributes:
      topology: the pod: chip and sizes, such as v5e:16x16, v5p:8x8x8 or h200:1x4x8.
      mesh: axes and sizes, such as data=64,model=4; they multiply to the number of devices.
      preset: size of the model: nano, tiny, small, 125m or 1b.
      optimizer: name of a recipe; an unknown one is refused with the list.
      compare: several recipes instead, separated by commas, side by side.
      batch_size: sequences per step on all devices together; None: as few as the mesh and
        accumulate allow.
      seq_len: bytes the model predicts per sequence.
      dtype: of the matrix products and the residual stream; parameters are float32.
      scan_layers: loop over the model's layers instead of writing them out: compiles faster.
      clip: global norm the gradient is clipped to before the optimizer sees it; None: not clipped.
      set: hyperparameters as NAME=VALUE, given once per name; NAME may be OPTIMIZER.NAME.
      json: file to write everything to, as JSON.
      html: file to write the report to, as one page that loads nothing.
    """

    topology: str
    mesh: str = dataclasses.field()  # not optional here
    preset: str = "125m"
    optimizer: str = "adamw"
    compare: str | None = None
    batch_size: int | None = None
    seq_len: int = 1024
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    scan_layers: bool = True
    clip: float | None = 1.0
    set: tuple[str, ...] = ()
    json: str | None = None
    html: str | None = None

    def validate(self) -> None:
        """Adds the checks of its own fields to those of the layout.

        Raises:
          UserError: naming the option, its value and what is legal.
        """
        super().validate()
        at_least("seq_len", self.seq_len, 1)
        if self.batch_size is not None:
            at_least("batch_size", self.batch_size, 1)
        if self.clip is not None:
            positive("clip", self.clip, " or None")
        names = self.names()
        if "" in names or len(names) != len(frozenset(names)):
            refuse("compare", self.compare, "different names separated by commas")
        parse_settings(self.set)

    def names(self) -> list[str]:
        """The optimizers to plan for, in the order given."""
        return [name.strip() for name in (self.compare or self.optimizer).split(",")]
