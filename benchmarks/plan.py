"""Plans of the presets for pods: how long they take to make, and how near the compiler they are.

    python -m benchmarks.plan

Needs the extra ``tpu-aot``, and no TPU. Each plan is made by the command in a process of its own,
one after the other, and gets a row of ``results/plan.json``. Ends with status 1 if one took longer
or is further from the compiler's figure than promised.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax

from benchmarks import _results

SECONDS = 240.0  # promised on two cores, from the command to its answer
TOLERANCE = 0.1  # of the compiler's figure for the peak


class Target(NamedTuple):
    """A plan to make."""

    preset: str
    optimizer: str
    topology: str
    mesh: str

    @property
    def words(self) -> list[str]:
        """What the command is given."""
        named = zip(self._fields, self, strict=True)
        return ["plan", *(word for name, value in named for word in (f"--{name}", value))]


TARGETS = (
    Target("1b", "adamw", "v5e:16x16", "data=64,model=4"),
    Target("1b", "adam_sn", "v5e:16x16", "data=64,model=4"),
    Target("1b", "adamw", "v5p:8x8x8", "data=128,model=4"),
    Target("1b", "adam_sn", "v5p:8x8x8", "data=128,model=4"),
    Target("125m", "adamw", "v5p:16x16x24", "data=6144"),
)


def measure(target: Target) -> dict[str, Any]:
    """Makes a plan and gives its row."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "plan.json"
        command = [sys.executable, "-m", "jaxopt_suite.cli.main", *target.words]
        start = time.perf_counter()
        subprocess.run([*command, "--json", str(path)], check=True, cwd=_results.ROOT)
        seconds = time.perf_counter() - start
        plan = json.loads(path.read_text())["plans"][target.optimizer]
    return row(target, plan, seconds)


def row(target: Target, plan: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What is kept of a plan, with where and when it was made."""
    memory = plan["memory"]
    return {
        "plan": " ".join(target),
        **target._asdict(),
        "devices": plan["devices"],
        "seconds": round(seconds, 1),
        "compile_seconds": round(plan["compile_seconds"], 1),
        "memory_bytes": memory["parts"],
        "memory_total": memory["total"],
        "compiler_bytes": memory["compiler"],
        "of_the_compilers_peak": round(memory["total"] / memory["compiler"]["peak"], 4),
        "flops": plan["flops"],
        "hbm_bytes": plan["hbm_bytes"],
        "wire_bytes": {"+".join(link["axes"]): link["nbytes"] for link in plan["wire"]},
        "bound_seconds": plan["bound"],
        "constraint": plan["constraint"],
        **_results.stamp(
            "python -m benchmarks.plan", packages=("jax", "jaxlib", "libtpu", "optax")
        ),
    }


def kept(row: dict[str, Any]) -> bool:
    """Whether the row is within what is promised."""
    return row["seconds"] <= SECONDS and abs(row["of_the_compilers_peak"] - 1) <= TOLERANCE


def main() -> int:
    """Measures every target; 1 if a promise is broken."""
    jax.config.update("jax_platforms", "cpu")  # for the stamp: libtpu would look for a TPU
    rows = []
    for target in TARGETS:
        rows.append(measure(target))
        _results.append(_results.RESULTS / "plan.json", rows[-1])
    return 0 if all(map(kept, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
