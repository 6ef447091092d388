"""jaxopt-suite: optimization research in JAX.

Subpackages are imported on first use, so ``import jaxopt_suite`` itself costs nothing and starts no
backend. See ``docs/design.md`` for how the pieces fit together.
"""

import importlib
import pathlib
from typing import Any

__version__ = "0.1.0"

_SUBPACKAGES = (
    "core",
    "experiments",
    "kernels",
    "optimizers",
    "parallel",
    "scaling_laws",
    "testing",
)
_CLONE = pathlib.Path(__file__).resolve().parent.parent

# In a clone the subpackages that an installed distribution maps to jaxopt_suite.* lie beside this
# folder, and this folder shadows any installed copy when Python runs from the clone's root.
if (_CLONE / "pyproject.toml").is_file() and (_CLONE / "optimizers" / "__init__.py").is_file():
    __path__.append(str(_CLONE))


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBPACKAGES])
