"""``jaxopt-suite train``: one run, and what to say when it ends."""

import dataclasses
import math
import shlex

from rich.console import Console

from jaxopt_suite.cli.shell import shell_command
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments.assembly import mesh_sizes, provide_cpu_devices
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.experiments.launch import launch
from jaxopt_suite.experiments.loop import TrainResult, train
from jaxopt_suite.parallel.processes import initialize

_NONFINITE = 3


def run(config: TrainConfig) -> int:
    """Trains, then prints how it ended.

    Args:
      config: what the command line said.

    Returns:
      The exit status: 0 when the run is finished, 3 for a loss that is not finite, and 128 plus the
      signal's number (130, 143) for a run that was asked to stop.
    """
    if config.processes is not None:
        return _launch(config, config.processes)
    is_first = _join(config)
    console = Console(soft_wrap=True, highlight=False, markup=False, quiet=not is_first)
    result = train(config, console=console)
    if result.stopped == "finished":
        console.print(result.message)
        console.print(_summary(result))
        return 0
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=not is_first)
    errors.print(result.message)
    if result.signum is None:
        return _NONFINITE
    errors.print(f"to go on: {command(config)}")
    return 128 + result.signum


def command(config: TrainConfig) -> str:
    """The shell command that starts or continues the run of ``config``."""
    return shell_command("train", config)


def _launch(config: TrainConfig, processes: int) -> int:
    """Runs the same command in several processes, and ends as they do."""
    devices = math.prod((mesh_sizes(config) or {}).values())
    if devices % processes:
        raise UserError(
            f"--processes must divide the {devices} devices of --mesh {config.mesh}, "
            f"got {processes}"
        )
    words = shlex.split(command(dataclasses.replace(config, processes=None)))[1:]
    return launch(words, processes=processes, devices_per_process=devices // processes)


def _join(config: TrainConfig) -> bool:
    """Finds the other processes, if there are any; returns whether this is the first."""
    if config.coordinator is None and not config.distributed:
        provide_cpu_devices(config)
        return True
    try:
        info = initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            timeout=config.initialization_timeout,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error
    return info.process_index == 0


def _summary(result: TrainResult) -> str:
    per_parameter = result.state_bytes / result.n_params
    rows = {
        "validation loss": f"{result.val_loss:.4f} nats per byte",
        "training loss": f"{result.train_loss:.4f} nats per byte",
        "unigram entropy": f"{result.unigram_entropy:.4f} nats per byte",
        "time per step": f"{result.ms_per_step:.2f} ms (median)",
        "tokens per second": f"{result.tokens_per_second:,.0f}",
        "optimizer state": f"{per_parameter:.3f} bytes per parameter",
    }
    if result.mesh is not None:
        rows["mesh"] = result.mesh
        rows["sent per step"] = f"{result.wire_bytes:,.0f} bytes per device"
        if result.largest_wire_bytes > result.wire_bytes:
            rows["in the largest"] = f"{result.largest_wire_bytes:,.0f} bytes per device"
    rows["folder"] = str(result.run.path)
    return "\n".join(f"  {name:<17}  {value}" for name, value in rows.items())
