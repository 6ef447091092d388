"""Copies of a run's records for others to show: TensorBoard's event files, Weights & Biases.

``metrics.jsonl`` stays the truth: every start of the run copies all of it again before it goes on.
So what came after the checkpoint that a killed run goes back to leaves no trace, and ``--mirror``
may be given late, even to a run that has finished. TensorBoard's files in ``tensorboard/`` are
deleted and written anew. Weights & Biases takes no step lower than its last: it keeps the points
from before the kill, which those written again differ from by the clock alone. Offline
(``WANDB_MODE=offline``) each start makes a folder in ``wandb/`` with all records so far.
"""

import contextlib
import json
import pkgutil
import secrets
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxopt_suite.core.errors import UserError
from jaxopt_suite.core.files import write_atomically
from jaxopt_suite.experiments.logs import RunFolder

Write = Callable[[Mapping[str, Any]], None]

# What is called first of each package, so that a folder named wandb/ is not taken for the package.
_ENTRIES = types.MappingProxyType(
    {"tensorboard": "tensorboard.summary:Writer", "wandb": "wandb:init"}
)


def require_packages(names: Sequence[str]) -> None:
    """Imports what the mirrors need, or raises ``UserError`` with the command that installs it."""
    for name in names:
        _entry(name)


@contextlib.contextmanager
def mirroring(names: Sequence[str], run: RunFolder) -> Iterator[list[Write]]:
    """Opens mirrors and copies all records of the run so far.

    Whatever goes wrong with a mirror once it is open ends that mirror with a warning, not the run.

    Args:
      names: of the mirrors: ``"tensorboard"``, ``"wandb"``.
      run: the folder, with the records that the run goes on from.

    Yields:
      Functions to call with every further record, one per mirror.

    Raises:
      UserError: if a mirror cannot be opened: no package, no login, no room.
    """
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(_Guarded(name, run)) for name in names]


@contextlib.contextmanager
def _tensorboard(run: RunFolder) -> Iterator[Write]:
    """Event files. Wall time is when the run was created plus the seconds trained since."""
    folder = run.path / "tensorboard"
    for path in folder.glob("events.out.tfevents.*"):
        path.unlink()
    began = run.config_path.stat().st_mtime
    writer = _entry("tensorboard")(str(folder))

    def write(record: Mapping[str, Any]) -> None:
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["step"], wall_time=began + record["seconds"])
        writer.flush()

    with contextlib.closing(writer):
        yield write


@contextlib.contextmanager
def _wandb(run: RunFolder) -> Iterator[Write]:
    """A run of Weights & Biases whose id lies in the run's folder, so that all starts share it."""
    path = run.path / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, secrets.token_hex(8).encode())
    with _entry("wandb")(
        id=path.read_text(),
        name=run.path.resolve().name,
        dir=str(run.path),
        config=json.loads(run.config_path.read_text()),
        resume="allow",
        reinit="create_new",  # leaves alone a run that the calling program has open
    ) as there:

        def write(record: Mapping[str, Any]) -> None:
            if record["step"] >= there.step:  # it has the others, and would not take them again
                there.log(_numbers(record), step=record["step"], commit=True)

        yield write


_KINDS = types.MappingProxyType({"tensorboard": _tensorboard, "wandb": _wandb})


class _Guarded:
    """A mirror that can fail to open, but after that costs a run a warning at most."""

    def __init__(self, name: str, run: RunFolder) -> None:
        self._name, self._run, self._works = name, run, True
        self._mirror = _KINDS[name](run)

    def __enter__(self) -> Write:
        kept = self._run.read()
        try:
            write = self._mirror.__enter__()
        except Exception as error:  # login, network, disk: whatever the package raises
            raise UserError(f"--mirror {self._name} cannot be opened: {error}") from error
        guarded = lambda record: self._attempt(write, record) if self._works else None
        for record in kept:
            guarded(record)
        return guarded

    def __exit__(self, *exception: Any) -> None:
        self._attempt(self._mirror.__exit__, *exception)

    def _attempt(self, action: Callable[..., Any], *arguments: Any) -> None:
        try:
            action(*arguments)
        except Exception as error:  # as above; metrics.jsonl has the record already
            if self._works:
                self._works = False
                warnings.warn(f"--mirror {self._name} failed and is left: {error}", stacklevel=2)


def _entry(name: str) -> Any:
    try:
        return pkgutil.resolve_name(_ENTRIES[name])
    except (ImportError, AttributeError) as error:
        install = f"pip install 'jaxopt-suite[{name}]'"
        raise UserError(f"--mirror {name} needs the package {name}: {install}") from error


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record but its step; those not finite too, as written or as read back."""
    nonfinite = {name: float(text) for name, text in record.get("nonfinite", {}).items()}
    return {
        name: float(value)
        for name, value in {**record, **nonfinite}.items()
        if name != "step" and isinstance(value, int | float)
    }
