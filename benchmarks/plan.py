"""Plans of presets for pods: the time they take, how near the compiler they are, and the state.

    python -m benchmarks.plan

Needs the extra ``tpu-aot``, and no TPU. Each plan is made by the command in a process of its own,
one after the other, and gets a row of ``results/plan.json``. Ends with status 1 if one took longer
or is further from the compiler's figure than promised, or if the state of Shampoo or SOAP is not
spread evenly.
"""

import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax

from benchmarks import _results
from jaxopt_suite.core import tree_bytes
from jaxopt_suite.experiments import model
from jaxopt_suite.experiments.config import parse_settings
from jaxopt_suite.optimizers import registry

SECONDS = 240.0  # promised on two cores, from the command to its answer
TOLERANCE = 0.1  # of the compiler's figure for the peak
SPREAD = {"shampoo": 1.05, "soap": 1.05}  # a device's state, of all the state over the devices


class Target(NamedTuple):
    """A plan to make."""

    preset: str
    optimizer: str
    topology: str
    mesh: str
    set: str = ""

    @property
    def words(self) -> list[str]:
        """What the command is given."""
        given = [(name, value) for name, value in self._asdict().items() if value]
        return ["plan", *(word for name, value in given for word in (f"--{name}", value))]

    @property
    def whole_state(self) -> int:
        """Bytes of the optimizer's state on a single device."""
        recipe = registry()[self.optimizer]
        settings = parse_settings((self.set,) if self.set else ())
        tx = recipe.make(recipe.learning_rate, **settings)
        return tree_bytes(
            jax.eval_shape(tx.init, model.abstract_params(model.PRESETS[self.preset]))
        )


TARGETS = (
    Target("1b", "adamw", "v5e:16x16", "data=64,model=4"),
    Target("1b", "adam_sn", "v5e:16x16", "data=64,model=4"),
    Target("1b", "shampoo", "v5e:16x16", "data=64,model=4", "block_size=256"),
    Target("1b", "soap", "v5e:16x16", "data=64,model=4", "block_size=256"),
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
    memory, devices = plan["memory"], plan["devices"]
    return {
        "plan": " ".join(filter(None, target)),
        **target._asdict(),
        "devices": devices,
        "seconds": round(seconds, 1),
        "compile_seconds": round(plan["compile_seconds"], 1),
        "memory_bytes": memory["parts"],
        "memory_total": memory["total"],
        "state_of_its_share": round(
            memory["parts"]["optimizer state"] / (target.whole_state / devices), 4
        ),
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
    spread = row["state_of_its_share"] <= SPREAD.get(row["optimizer"], math.inf)
    near = abs(row["of_the_compilers_peak"] - 1) <= TOLERANCE
    return row["seconds"] <= SECONDS and near and spread


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
