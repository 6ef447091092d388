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

# Where and how a step is computed. Another choice rounds differently, and changes nothing else.
# Of the workers of an outer loop it changes the run, from there on.
LAYOUT = (
    "mesh",
    "scan_layers",
    "remat",
    "accumulate",
    "shard_state_over",
    "offload_state",
    "diloco_workers",
)
# How a process finds the others of its run.
PROCESSES = (
    "processes",
    "distributed",
    "coordinator",
    "num_processes",
    "process_id",
    "initialization_timeout",
)
# Settings that leave the records of a run as they are: these alone may change when it goes on.
FREE_ON_RESUME = ("out", "checkpoint_every", "keep", "mirror", *LAYOUT, *PROCESSES)

MirrorName = Literal["tensorboard", "wandb"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """Where a step is computed and in what precision.

    Attributes:
      mesh: axes and sizes, such as data=4,model=2: data splits the batch, fsdp the batch and the
        parameters, model the matrix products, worker the batch among workers between which the
        optimizer communicates. None: one device.
      dtype: of the matrix products and the residual stream; parameters are float32.
      scan_layers: loop over the model's layers instead of writing them out: compiles faster.
      remat: recompute each block in the backward pass.
      accumulate: micro-batches per step, one after the other.
      shard_state_over: mesh axes to spread the optimizer state over besides, separated by commas.
      offload_state: keep the optimizer state in the host's memory between steps.
      compress: how workers' gradients travel, for an optimizer that does not communicate by itself:
        a compressor such as "sign()", "low_rank(4)" or "top_k(9, chunk=256)". None: whole.
      feedback: what a worker remembers of what compression left out: "none()", "ef()", "ef21()",
        "econtrol(0.1)" or "momentum(0.1)". None: none() for unbiased compressors, else ef().
      exchange: how compressed gradients are averaged; auto: in the fewest bytes.
      diloco_workers: train this many workers apart, each with the optimizer, and step together now
        and then (DiLoCo); they are the mesh's axis worker, which need not be given besides. What
        compress then compresses are their outer gradients. None: no outer loop.
      sync_every: steps between two outer steps. None: 50.
      outer_lr: learning rate of the outer steps. None: 0.7.
      outer_momentum: their Nesterov momentum, in [0, 1); 0: plain SGD, without state. None: 0.9.
    """

    mesh: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    scan_layers: bool = False
    remat: bool = False
    accumulate: int = 1
    shard_state_over: str | None = None
    offload_state: bool = False
    compress: str | None = None
    feedback: str | None = None
    exchange: Literal["auto", "mean", "gather", "two_phase"] = "auto"
    diloco_workers: int | None = None
    sync_every: int | None = None
    outer_lr: float | None = None
    outer_momentum: float | None = None

    def validate(self) -> None:
        """Checks every value that can be checked without loading anything.

        Raises:
          UserError: naming the option, its value and what is legal.
        """
        at_least("accumulate", self.accumulate, 1)
        if self.compress is None and (self.feedback is not None or self.exchange != "auto"):
            refuse("compress", self.compress, "given with --feedback and --exchange")
        self._validate_outer_loop()

    def _validate_outer_loop(self) -> None:
        outer = (self.sync_every, self.outer_lr, self.outer_momentum)
        if self.diloco_workers is None:
            if any(value is not None for value in outer):
                legal = "given with --sync-every, --outer-lr and --outer-momentum"
                refuse("diloco_workers", None, legal)
            return
        at_least("diloco_workers", self.diloco_workers, 1)
        if self.sync_every is not None:
            at_least("sync_every", self.sync_every, 1)
        if self.outer_lr is not None:
            positive("outer_lr", self.outer_lr, " or None")
        if self.outer_momentum is not None and not 0.0 <= self.outer_momentum < 1.0:
            refuse("outer_momentum", self.outer_momentum, "in [0, 1) or None")

    def state_axes(self) -> tuple[str, ...]:
        """The axes of ``shard_state_over``."""
        return tuple(name.strip() for name in (self.shard_state_over or "").split(",") if name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExperimentConfig(LayoutConfig):
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
        """Adds the checks of its own fields to those of the layout.

        Raises:
          UserError: naming the option, its value and what is legal.
        """
        super().validate()
        for name in ("steps", "batch_size", "seq_len", "eval_every", "eval_batches"):
            at_least(name, getattr(self, name), 1)
        if not 0.0 <= self.warmup_fraction <= 1.0:
            refuse("warmup_fraction", self.warmup_fraction, "a share of the steps in [0, 1]")
        if self.clip is not None:
            positive("clip", self.clip, " or None")
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
      noise_scale: measure the gradient noise scale, in sequences, between the workers of the mesh,
        and log it.
      checkpoint_every: steps between checkpoints; one is always saved at the end.
      keep: checkpoints kept.
      mirror: tensorboard or wandb: copies every record there too; may be given for each of them.
      processes: start this many processes on this machine's CPU, to try out what a cluster does.
      distributed: be one of several processes, which SLURM, Cloud TPU or GKE say how to find.
      coordinator: HOST:PORT of process 0, where nothing else says it.
      num_processes: number of processes; goes with coordinator.
      process_id: which of them this is, from 0; goes with coordinator.
      initialization_timeout: seconds that the processes have to find one another.
    """

    optimizer: str = "adamw"
    learning_rate: float | None = None
    seed: int = 0
    out: str | None = None
    log_every: int = 10
    noise_scale: bool = False
    checkpoint_every: int = 100
    keep: int = 3
    mirror: tuple[MirrorName, ...] = ()
    processes: int | None = None
    distributed: bool = False
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    initialization_timeout: int = 60

    def validate(self) -> None:
        """Adds the checks of its own fields to the common ones.

        Raises:
          UserError: naming the option, its value and what is legal.
        """
        super().validate()
        for name in ("log_every", "checkpoint_every", "keep", "initialization_timeout"):
            at_least(name, getattr(self, name), 1)
        if self.noise_scale and self.compress is not None:
            refuse("noise_scale", True, "given without --compress: the mean must be exact")
        self._validate_processes()
        _seed("seed", self.seed)
        if self.learning_rate is not None:
            positive("learning_rate", self.learning_rate)
        names = typing.get_args(MirrorName)
        for name in self.mirror:
            if name not in names or self.mirror.count(name) > 1:
                refuse("mirror", name, f"one of {', '.join(names)}, each once at most")

    def _validate_processes(self) -> None:
        address = (self.coordinator, self.num_processes, self.process_id)
        given = sum(value is not None for value in address)
        if given not in (0, len(address)):
            refuse("coordinator", self.coordinator, "given with --num-processes and --process-id")
        ways = (self.processes is not None) + self.distributed + (given > 0)
        if ways > 1:
            refuse("processes", self.processes, "alone, or --distributed, or --coordinator")
        if self.processes is not None:
            at_least("processes", self.processes, 1)
            if self.mesh is None and self.diloco_workers is None:
                refuse("processes", self.processes, "given with --mesh, for the number of devices")

    def run_path(self) -> pathlib.Path:
        """The run's folder: ``out``, or one named after what is trained."""
        return pathlib.Path(self.out or f"runs/{self.optimizer}-{self.preset}-seed{self.seed}")

    def identity(self) -> dict[str, Any]:
        """Everything that a record of the run depends on: what must not change when it goes on."""
        fields = dataclasses.asdict(self)
        kept = {name: value for name, value in fields.items() if name not in FREE_ON_RESUME}
        return kept | {"outer_loop": self.diloco_workers is not None}

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
        at_least("seeds", self.seeds, 1)
        names = self.names()
        if not names or "" in names or len(names) != len(frozenset(names)):
            refuse("optimizers", self.optimizers, "different names separated by commas")

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
            refuse("set", item, "NAME=VALUE, such as b2=0.95")
        if name in settings:
            refuse("set", item, f"one value per name, and {name} has {settings[name]!r} already")
        settings[name] = _literal(text)
    return settings


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def at_least(name: str, value: int, low: int) -> None:
    """Raises ``UserError`` unless the option's value is an integer of at least ``low``."""
    if value < low:
        refuse(name, value, f"an integer of at least {low}")


def positive(name: str, value: float, otherwise: str = "") -> None:
    """Raises ``UserError`` unless the option's value is positive and finite."""
    if not (math.isfinite(value) and value > 0):
        refuse(name, value, f"a positive, finite number{otherwise}")


def _seed(name: str, value: int) -> None:
    if not 0 <= value < 2**32:
        refuse(name, value, "an integer in [0, 2**32)")


def refuse(name: str, value: Any, legal: str) -> NoReturn:
    """Raises ``UserError`` naming the option, what it must be and what was given."""
    # Not above: the package this comes from imports JAX, which only a mistake has to wait for.
    from jaxopt_suite.core.errors import UserError

    option = name.replace("_", "-")
    raise UserError(f"--{option} must be {legal}, got {value!r}")
