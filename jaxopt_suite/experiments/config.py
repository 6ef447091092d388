"""What the commands can be told: plain dataclasses, read by tyro, checked by ``validate``.

Nothing here imports JAX, so ``jaxopt-suite --help`` answers at once.
"""

import ast
import dataclasses
import math
import pathlib
import typing
from collections.abc import Iterable
from typing import Any, Literal, NoReturn

# Settings that leave every record of a run as it is: these alone may change when a run goes on.
_FREE_ON_RESUME = ("out", "checkpoint_every", "keep", "mirror")

MirrorName = Literal["tensorboard", "wandb"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """What training one model and comparing many optimizers on it have in common.

    Attributes:
      preset: size of the model: nano, tiny, small, 125m or 1b.
      steps: optimizer steps.
      batch_size: sequences per step.
      seq_len: bytes the model predicts per sequence.
      warmup_fraction: share of the steps in which the learning rate rises, in [0, 1].
      clip: global norm the gradient is clipped to before the optimizer sees it; None: not clipped.
      data: text file or folder of text files; None: the sources of Python's standard library.
      eval_every: steps between evaluations; the last step is always one.
      eval_batches: validation batches per evaluation, the same ones every time.
      set: hyperparameters as NAME=VALUE, given once per name: --set b2=0.95 --set eps=1e-6.
    """

    preset: str = "nano"
    steps: int = 200
    batch_size: int = 16
    seq_len: int = 128
    warmup_fraction: float = 0.1
    clip: float | None = 1.0
    data: str | None = None
    eval_every: int = 50
    eval_batches: int = 8
    set: tuple[str, ...] = ()

    def validate(self) -> None:
        """Checks every value that can be checked without loading anything.

        Raises:
          UserError: naming the option, its value and what is legal.
        """
        for name in ("steps", "batch_size", "seq_len", "eval_every", "eval_batches"):
            _at_least(name, getattr(self, name), 1)
        if not 0.0 <= self.warmup_fraction <= 1.0:
            _refuse("warmup_fraction", self.warmup_fraction, "a share of the steps in [0, 1]")
        if self.clip is not None:
            _positive("clip", self.clip, " or None")
        parse_settings(self.set)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(ExperimentConfig):
    """Train one model with one optimizer, in a folder that a later start goes on from.

    Attributes:
      optimizer: name of a recipe; an unknown one is refused with the list.
      learning_rate: peak learning rate; None: the one tuned for the default task.
      seed: of the initial parameters and of the order of the data.
      out: folder of the run; None: runs/OPTIMIZER-PRESET-seedSEED.
      log_every: steps between lines of metrics.jsonl.
      checkpoint_every: steps between checkpoints; one is always saved at the end.
      keep: checkpoints kept.
      mirror: tensorboard or wandb: copies every record there too; may be given for each of them.
    """

    optimizer: str = "adamw"
    learning_rate: float | None = None
    seed: int = 0
    out: str | None = None
    log_every: int = 10
    checkpoint_every: int = 100
    keep: int = 3
    mirror: tuple[MirrorName, ...] = ()

    def validate(self) -> None:
        """Adds the checks of its own fields to the common ones.

        Raises:
          UserError: naming the option, its value and what is legal.
        """
        super().validate()
        for name in ("log_every", "checkpoint_every", "keep"):
            _at_least(name, getattr(self, name), 1)
        _seed("seed", self.seed)
        if self.learning_rate is not None:
            _positive("learning_rate", self.learning_rate)
        names = typing.get_args(MirrorName)
        for name in self.mirror:
            if name not in names or self.mirror.count(name) > 1:
                _refuse("mirror", name, f"one of {', '.join(names)}, each once at most")

    def run_path(self) -> pathlib.Path:
        """The run's folder: ``out``, or one named after what is trained."""
        return pathlib.Path(self.out or f"runs/{self.optimizer}-{self.preset}-seed{self.seed}")

    def identity(self) -> dict[str, Any]:
        """Everything that a record of the run depends on: what must not change when it goes on."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in _FREE_ON_RESUME}

    def logs(self, step: int) -> bool:
        """Whether a record is written after ``step`` steps (0: before the first)."""
        return step % self.log_every == 0 or self.evaluates(step)

    def evaluates(self, step: int) -> bool:
        """Whether the record of ``step`` holds a validation loss."""
        return step % self.eval_every == 0 or step == self.steps

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after ``step`` steps."""
        return step % self.checkpoint_every == 0 or step == self.steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig(ExperimentConfig):
    """Train the same model with several optimizers and seeds; write a table, a report and curves.

    Attributes:
      optimizers: names of recipes, separated by commas.
      seeds: number of runs per optimizer; seeds are 0, 1, ...
      lr_sweep: also look for each optimizer's best learning rate around its tuned one first.
      out: folder of the comparison: every run's logs, report.md and report.html.
      set: as for train, for every optimizer that has the name; or for one: --set adam_snsm.rank=32.
    """

    optimizers: str = "adamw,grams,adam_sn,adam_snsm,muon"
    seeds: int = 3
    lr_sweep: bool = False
    out: str = "runs/compare"

    def validate(self) -> None:
        """Adds the checks of its own fields to the common ones.

        Raises:
          UserError: naming the option, its value and what is legal.
        """
        super().validate()
        _at_least("seeds", self.seeds, 1)
        names = self.names()
        if not names or "" in names or len(names) != len(frozenset(names)):
            _refuse("optimizers", self.optimizers, "different names separated by commas")

    def names(self) -> list[str]:
        """The optimizers' names, in the order given."""
        return [name.strip() for name in self.optimizers.split(",")]


def parse_settings(items: Iterable[str]) -> dict[str, Any]:
    """Reads ``NAME=VALUE`` texts: a Python literal where it is one, the text itself where not.

    Args:
      items: such as ``"b2=0.95"``, ``"nesterov=True"`` or ``"adam_snsm.rank=32"``.

    Returns:
      Values by name, in the order given.

    Raises:
      UserError: if an item is not of that form or names come twice.
    """
    settings: dict[str, Any] = {}
    for item in items:
        name, equals, text = (part.strip() for part in item.partition("="))
        if not (equals and text and all(part.isidentifier() for part in name.split("."))):
            _refuse("set", item, "NAME=VALUE, such as b2=0.95")
        if name in settings:
            _refuse("set", item, f"one value per name, and {name} has {settings[name]!r} already")
        settings[name] = _literal(text)
    return settings


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        _refuse(name, value, f"an integer of at least {low}")


def _positive(name: str, value: float, otherwise: str = "") -> None:
    if not (math.isfinite(value) and value > 0):
        _refuse(name, value, f"a positive, finite number{otherwise}")


def _seed(name: str, value: int) -> None:
    if not 0 <= value < 2**32:
        _refuse(name, value, "an integer in [0, 2**32)")


def _refuse(name: str, value: Any, legal: str) -> NoReturn:
    # Not above: the package this comes from imports JAX, which only a mistake has to wait for.
    from jaxopt_suite.core.errors import UserError

    option = name.replace("_", "-")
    raise UserError(f"--{option} must be {legal}, got {value!r}")
