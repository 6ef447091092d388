"""``jaxopt-suite train``: one run, and what to say when it ends."""

from rich.console import Console

from jaxopt_suite.cli.shell import shell_command
from jaxopt_suite.experiments.config import TrainConfig
from jaxopt_suite.experiments.loop import TrainResult, train

_NONFINITE = 3


def run(config: TrainConfig) -> int:
    """Trains, then prints how it ended.

    Args:
      config: what the command line said.

    Returns:
      The exit status: 0 when the run is finished, 3 for a loss that is not finite, and 128 plus the
      signal's number (130, 143) for a run that was asked to stop.
    """
    console = Console(soft_wrap=True, highlight=False, markup=False)
    result = train(config, console=console)
    if result.stopped == "finished":
        console.print(result.message)
        console.print(_summary(result))
        return 0
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    errors.print(result.message)
    if result.signum is None:
        return _NONFINITE
    errors.print(f"to go on: {command(config)}")
    return 128 + result.signum


def command(config: TrainConfig) -> str:
    """The shell command that starts or continues the run of ``config``."""
    return shell_command("train", config)


def _summary(result: TrainResult) -> str:
    per_parameter = result.state_bytes / result.n_params
    rows = {
        "validation loss": f"{result.val_loss:.4f} nats per byte",
        "training loss": f"{result.train_loss:.4f} nats per byte",
        "unigram entropy": f"{result.unigram_entropy:.4f} nats per byte",
        "time per step": f"{result.ms_per_step:.2f} ms (median)",
        "tokens per second": f"{result.tokens_per_second:,.0f}",
        "optimizer state": f"{per_parameter:.3f} bytes per parameter",
        "folder": str(result.run.path),
    }
    return "\n".join(f"  {name:<17}  {value}" for name, value in rows.items())
