"""Python processes that a test starts together, and that are dead when it ends."""

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 60  # seconds after which a test kills what it started


@dataclasses.dataclass
class Ended:
    """How a process ended, and after how many seconds."""

    status: int
    out: str
    err: str
    seconds: float


def clean_env(**extra: str) -> dict[str, str]:
    """Without the settings of the test suite but for what it has compiled and how."""
    cache = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
    kept = {
        k: v
        for k, v in os.environ.items()
        if k.startswith(cache) or not k.startswith(("JAX", "XLA", "SLURM"))
    }
    # Without MLIR's emitter a copied NaN may become another: checkpoints are kept to the bit.
    left_out = ("device_count", "fusion_emitters")
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [flag for flag in flags if not any(name in flag for name in left_out)]
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}
    return {**kept, **own, **extra}


@contextlib.contextmanager
def started(
    *commands: Sequence[str], env: dict[str, str] | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """One interpreter per command, each with the words after ``python``."""
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=env or clean_env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]

    def kill() -> None:
        for process in processes:
            process.kill()  # SIGTERM would only leave a note with JAX

    limit = threading.Timer(LIMIT, kill)  # so that what reads their output comes to its end
    limit.start()
    try:
        yield processes
    finally:
        limit.cancel()
        kill()
        for process in processes:
            process.communicate()


def run_all(*commands: Sequence[str], env: dict[str, str] | None = None) -> list[Ended]:
    """Runs them to their ends."""
    begun, ended = time.monotonic(), []
    with started(*commands, env=env) as processes:
        for process in processes:
            out, err = process.communicate(timeout=LIMIT)
            ended.append(Ended(process.returncode, out, err, time.monotonic() - begun))
    return ended
