"""The ``jaxopt-suite`` command: reads the command line and runs one subcommand."""

import importlib
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

import jaxopt_suite
from jaxopt_suite.experiments.config import CompareConfig, TrainConfig
from jaxopt_suite.experiments.fit_config import FitConfig
from jaxopt_suite.experiments.plan_config import PlanConfig

_PROGRAM = "jaxopt-suite"
_FAREWELL = 3.0  # seconds
# Each is run by ``run`` in the module of its name beside this one, imported when asked for.
_COMMANDS: dict[str, Callable[..., Any]] = {
    "train": TrainConfig,
    "compare": CompareConfig,
    "plan": PlanConfig,
    "fit": FitConfig,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: the words after ``jaxopt-suite``; None: those of this process.

    Returns:
      The exit status: the subcommand's own, 2 for something the user can put right, 130 for an
      interruption that came before there was anything to save.
    """
    # The CPU's singular value decompositions spin on every core for each small matrix: on a busy
    # machine of two cores 20 ms became seconds. Read when JAX is loaded, which is later than here.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"{_PROGRAM} {jaxopt_suite.__version__}")
        return 0
    config = tyro.extras.subcommand_cli_from_dict(
        _COMMANDS,
        prog=_PROGRAM,
        description="Optimization research in JAX: train, compare honestly, plan, fit laws.",
        args=arguments,
        config=(tyro.conf.UseAppendAction,),
    )
    return _run(config)


def _run(config: Any) -> int:
    from jaxopt_suite.core.errors import UserError  # imports JAX, which --help need not wait for

    name = next(name for name, kind in _COMMANDS.items() if type(config) is kind)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            config.validate()
            return importlib.import_module(f"jaxopt_suite.cli.{name}").run(config)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            status = 130
        except Exception:
            if not _has_peers():
                raise
            traceback.print_exc()
            status = 1
        if _has_peers():
            _part(status)
        return status


def _has_peers() -> bool:
    """Whether this is one of several processes of a run."""
    import jax

    return jax.distributed.is_initialized()


def _part(status: int) -> None:
    """Takes leave of the other processes, or ends this one if they do not come in time.

    Unlike at the end of a run, they may be waiting for this one inside a step, and are only told
    once it is gone. JAX by itself would wait for minutes before that.
    """
    import jax

    sys.stdout.flush()
    sys.stderr.flush()
    late = threading.Timer(_FAREWELL, os._exit, (status,))
    late.daemon = True
    late.start()
    jax.distributed.shutdown()
    late.cancel()


def _show_warning(message: Warning | str, *where: Any, **options: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
