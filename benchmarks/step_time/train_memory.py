"""Peak memory of whole training runs, each in a process of its own."""

import os
import pathlib
import subprocess
import sys
import tempfile

from benchmarks import _results
from jaxopt_suite.core.errors import UserError


def peak_bytes(optimizer: str, *, preset: str, steps: int) -> int:
    """The largest resident size that ``jaxopt-suite train`` reaches, in bytes.

    Raises:
      UserError: if the run fails, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = pathlib.Path(folder) / "output.txt"
        words = [
            *(sys.executable, "-m", "jaxopt_suite.cli.main", "train"),
            *("--optimizer", optimizer, "--preset", preset, "--steps", str(steps)),
            *("--checkpoint-every", str(max(1, steps // 2)), "--out", f"{folder}/run"),
        ]
        with said.open("w") as output:
            process = subprocess.Popen(words, cwd=_results.ROOT, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise UserError(
                f"training with {optimizer} ended with status {process.returncode}: "
                f"{said.read_text()[-2000:]}"
            )
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return usage.ru_maxrss * unit
