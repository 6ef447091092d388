"""Training one model with one optimizer, in a folder that any later start goes on from."""

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import optax
from rich.console import Console

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import environment, joining
from jaxopt_suite.experiments.checkpoints import Checkpoints
from jaxopt_suite.experiments.config import LAYOUT, PROCESSES, TrainConfig
from jaxopt_suite.experiments.data import Corpus, load_corpus, train_batches, validation_batches
from jaxopt_suite.experiments.logs import RunFolder
from jaxopt_suite.experiments.mirrors import Write, mirroring, require_packages
from jaxopt_suite.experiments.peers import Peers
from jaxopt_suite.experiments.progress import showing
from jaxopt_suite.experiments.results import Stopped, TrainResult, summarize
from jaxopt_suite.experiments.signals import StopRequest, signal_name, stop_on_signals
from jaxopt_suite.experiments.soundness import Lookout, NonFinite
from jaxopt_suite.experiments.steps import Metrics, Program, TrainState, build_program
from jaxopt_suite.optimizers.registry import Recipe
from jaxopt_suite.scaling_laws import read_noise_scale

__all__ = ["TrainResult", "train"]


def train(
    config: TrainConfig,
    *,
    recipe: Recipe | None = None,
    tx: optax.GradientTransformation | None = None,
    corpus: Corpus | None = None,
    program: Program | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Trains from the newest checkpoint in the run's folder, or from the start, to the last step.

    Several processes that JAX knows of train together: each calls this with the same arguments, the
    first alone writes records and mirrors, and all write checkpoints.

    Args:
      config: what to train and where.
      recipe: instead of the registry's entry for ``config.optimizer``.
      tx: instead of a recipe; see :func:`build_program`.
      corpus: ``config.data``, if it is loaded already.
      program: of this config or one like it, see ``Program.accepts``: saves compiling again.
      console: where progress is shown; None: nowhere.

    Returns:
      The result. A run that was finished before is not trained again; one that a signal or a
      non-finite loss stopped says so in ``stopped``.

    Raises:
      UserError: for everything the user can put right.
      ValueError: if the arguments contradict one another.
    """
    config.validate()
    require_packages(config.mirror)
    if program is None:
        program = build_program(config, recipe=recipe, tx=tx)
    elif recipe is not None or tx is not None or not program.accepts(config):
        raise ValueError("program was built for something else than this config, recipe or tx")
    corpus = load_corpus(config.data) if corpus is None else corpus
    peers = Peers.of_this_run()
    _check_same(peers, config, corpus)
    run = RunFolder(config.run_path(), peers)
    first = peers.index == 0
    with (
        Checkpoints(run.checkpoints_path, keep=config.keep) as checkpoints,
        stop_on_signals() as request,
    ):
        trainer = _Trainer(config, program, corpus, run, checkpoints, peers)
        with (
            mirroring(config.mirror if first else (), RunFolder(run.path)) as mirrors,
            showing(console if first else None, steps=config.steps, completed=trainer.step) as show,
        ):
            return trainer.finish(request, (show, *mirrors))


class _Stopwatch:
    """Seconds spent training, in total and since the last lap; it only runs when told to."""

    def __init__(self) -> None:
        self.total = 0.0
        self._lap = 0.0
        self._since: float | None = None

    def run(self) -> None:
        self._since = self._since or time.perf_counter()

    def pause(self) -> None:
        passed = 0.0 if self._since is None else time.perf_counter() - self._since
        self.total, self._lap, self._since = self.total + passed, self._lap + passed, None

    def lap(self) -> float:
        lap, self._lap = self._lap, 0.0
        return lap


class _Trainer:
    """One run under way: the state on the device, the position in the data, the folder."""

    def __init__(
        self,
        config: TrainConfig,
        program: Program,
        corpus: Corpus,
        run: RunFolder,
        checkpoints: Checkpoints,
        peers: Peers,
    ) -> None:
        sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
        self.config = config
        self.program = program
        self.run = run
        self.checkpoints = checkpoints
        self.peers = peers
        self.entropy = corpus.unigram_entropy()
        self.batches = train_batches(corpus, seed=config.seed, **sizes)
        self.held_out = validation_batches(corpus, batches=config.eval_batches, **sizes)
        self.watch = _Stopwatch()
        self.lookout = Lookout(peers)
        self.step = 0
        self.logged = 0  # step of the last record
        self.saved: int | None = None  # step of the last checkpoint
        self.metrics: Metrics | None = None  # of the last step, once one is made
        run.create_or_open(_identity(config, program, corpus))
        self.state = self._restored() or program.initial(config.seed)
        if self.step < config.steps:
            peers.from_first(self._note_start)

    def _restored(self) -> TrainState | None:
        """Goes back to the newest checkpoint and drops the records that came after it."""
        own = joining.of_workers(self.program)
        restored = self.checkpoints.restore(self.program.abstract_state, of_workers=own)
        self.run.truncate_to(-1 if restored is None else restored.step)
        if restored is None:
            return None
        self.step = restored.step
        self.logged = self.saved = self.step
        self.batches.set_state(restored.host["data"])
        self.watch.total = restored.host["seconds"]
        _check_records(self.run, self.config, self.step)
        return joining.with_joiners(self.program, restored.state, restored.workers)

    def _note_start(self) -> None:
        """Adds to ``starts.jsonl`` where and how the run is computed from this step on."""
        layout = {name: getattr(self.config, name) for name in LAYOUT}
        layout |= {"mesh": self.program.mesh, "processes": self.peers.count}
        start = {"step": self.step, **layout, "hardware": environment.hardware()}
        path = self.run.path / "starts.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(start) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error}") from error

    def finish(self, request: StopRequest, tell: Sequence[Write]) -> TrainResult:
        """Trains to the last step, or as far as it gets; ``tell`` are called with each record."""
        if self.step == self.config.steps:
            return self._result("finished", f"finished before: {self.step} steps, nothing to do")
        try:
            signum = self._advance(request, tell)
        except NonFinite as stop:
            return self._diverged(stop.step, stop.metrics, tell)
        self._save()
        self.checkpoints.wait()
        if self.step == self.config.steps:
            return self._result("finished", f"finished: {self.step} steps")
        where = f"step {self.step} of {self.config.steps}"
        name = signal_name(signum)
        return self._result(
            "signal", f"stopped by {name} after {where}; the state is saved", signum
        )

    def _advance(self, request: StopRequest, tell: Sequence[Write]) -> int | None:
        """Steps until the last one or a request; leaves the state of a step known to be sound.

        Returns the number of the signal that asked for the stop, if one did.

        The device is never waited for before it has its next step, except where a record or a
        checkpoint is due. So a step is found to be non-finite late, yet before anything of it is
        saved, as both are preceded by a look at the step itself.
        """
        if self.step == 0 and self.saved is None:
            self._record(tell)
        compiled = self.program.step
        signum = self._asked(request)
        while self.step < self.config.steps and signum is None:
            self.watch.run()
            self.state, self.metrics = compiled(self.state, next(self.batches))
            self.step += 1
            self.lookout.add(self.step, self.metrics)
            if self._due():
                self.lookout.settle()
                self.watch.pause()
                self._record(tell)
                if self.config.saves(self.step):
                    self._save()
            signum = self._asked(request)
        self.lookout.settle()
        self.watch.pause()
        return signum

    def _asked(self, request: StopRequest) -> int | None:
        """The signal to stop for. Processes get theirs at different steps, and must agree on one.

        They ask one another only where they wait for one another anyway.
        """
        if self.peers.count == 1:
            return request.signum
        if not self._due():
            return None
        return next((s for s in self.peers.gather(request.signum) if s is not None), None)

    def _due(self) -> bool:
        """Whether this step ends with a record or a checkpoint."""
        return self.config.logs(self.step) or self.config.saves(self.step)

    def _record(self, tell: Sequence[Write]) -> None:
        """Writes the record of this step, if the config wants one."""
        if not self.config.logs(self.step):
            return
        record = self._measured()
        if self.config.evaluates(self.step):
            record["val_loss"] = self.program.evaluate(self.state, self.held_out)
        self._write(record, tell)

    def _write(self, record: Mapping[str, Any], tell: Sequence[Write]) -> None:
        self.run.append(record)
        for each in tell:
            each(record)

    def _measured(self) -> dict[str, Any]:
        """What the last step and the stopwatch say."""
        per_step = self.config.batch_size * self.config.seq_len
        counts = {"step": self.step, "tokens": self.step * per_step, "seconds": self.watch.total}
        if self.metrics is None:
            return counts
        tokens, self.logged = (self.step - self.logged) * per_step, self.step
        return {
            **counts,
            "loss": float(self.metrics.loss),
            "grad_norm": float(self.metrics.grad_norm),
            "lr": self.program.learning_rate(self.step),
            "tokens_per_second": tokens / self.watch.lap(),
            **(self._noise_scale() if self.config.noise_scale else {}),
        }

    def _noise_scale(self) -> dict[str, Any]:
        """The gradient noise scale so far; where there is none yet, null and the reason."""
        estimate = read_noise_scale(self.state.opt_state)
        known = estimate.status == "ok"
        return {
            "noise_scale": estimate.scale if known else None,
            "noise_scale_status": estimate.status,
        }

    def _save(self) -> None:
        """Saves the state unless it is the one saved last. Its records are on disk before."""
        if self.step != self.saved:
            host = {"data": self.batches.get_state(), "seconds": self.watch.total}
            self.checkpoints.save(self.step, self.state, host)
            self.saved = self.step

    def _diverged(self, step: int, metrics: Metrics, tell: Sequence[Write]) -> TrainResult:
        """Ends the run at ``step``, whose metrics become the last record."""
        self.watch.pause()
        self.step, self.metrics = step, metrics
        self._write(self._measured(), tell)
        self.checkpoints.wait()
        kept = "no checkpoint came before it"
        if self.saved is not None:
            kept = f"the checkpoint of step {self.saved} holds the state before it"
        seen = ", ".join(
            f"{name} {float(value):g}"
            for name, value in (
                ("loss", metrics.loss),
                ("gradient norm", metrics.grad_norm),
                ("update norm", metrics.update_norm),
            )
        )
        return self._result("nonfinite", f"not finite at step {step}: {seen}; stopped, {kept}")

    def _result(self, stopped: Stopped, message: str, signum: int | None = None) -> TrainResult:
        return summarize(
            self.run,
            self.program,
            step=self.step,
            tokens_per_step=self.config.batch_size * self.config.seq_len,
            unigram_entropy=self.entropy,
            stopped=stopped,
            message=message,
            signum=signum,
        )


def _check_same(peers: Peers, config: TrainConfig, corpus: Corpus) -> None:
    """Raises unless all processes were started with the same settings and see the same data."""
    same = {name: v for name, v in dataclasses.asdict(config).items() if name not in PROCESSES}
    everyone = peers.gather(same | {"data": corpus.fingerprint})
    first = everyone[0]
    for index, other in enumerate(everyone):
        for name in (name for name in first if other[name] != first[name]):
            raise UserError(
                f"processes of one run must have the same {name}: process 0 has {first[name]!r}, "
                f"process {index} has {other[name]!r}"
            )


def _check_records(run: RunFolder, config: TrainConfig, step: int) -> None:
    """Raises unless all records up to ``step`` are there, as they were before its checkpoint."""
    wanted = [number for number in range(step + 1) if config.logs(number)]
    found = [record["step"] for record in run.read()]
    if found != wanted:
        missing = sorted(frozenset(wanted) - frozenset(found))
        what = (
            f"the record of step {missing[0]} is missing" if missing else "a record is there twice"
        )
        raise UserError(
            f"{run.metrics_path}: {what}, yet there is a checkpoint of step {step}; put the file "
            "back as it was, or start anew with another --out"
        )


def _identity(config: TrainConfig, program: Program, corpus: Corpus) -> dict[str, Any]:
    """What config.json holds and a later start must have in common with this one."""
    return {
        **config.identity(),
        "data": corpus.name,
        "data_fingerprint": corpus.fingerprint,
        "learning_rate": program.peak,
        "set": list(config.set),
        "hyperparameters": {name: _plain(v) for name, v in program.hyperparameters.items()},
        "n_params": program.n_params,
        "model": dataclasses.asdict(program.sizes),
    }


def _plain(value: Any) -> Any:
    """``value`` if JSON has it, else its name, which unlike its ``repr`` is the same next time."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "__qualname__", type(value).__qualname__)
