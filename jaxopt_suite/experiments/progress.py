"""What a run shows while it trains: a bar on a terminal, one line per record elsewhere."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Show = Callable[[Mapping[str, Any]], None]


def describe(record: Mapping[str, Any]) -> str:
    """The losses and the speed of one record of ``metrics.jsonl``, those it has, as text."""
    parts = [
        f"{label} {record[key]:{form}}"
        for key, label, form in (
            ("loss", "loss", ".4f"),
            ("val_loss", "validation", ".4f"),
            ("noise_scale", "noise scale", ",.3g"),
            ("tokens_per_second", "tokens/s", ",.0f"),
        )
        if record.get(key) is not None
    ]
    return "  ".join(parts)


@contextlib.contextmanager
def showing(console: Console | None, *, steps: int, completed: int) -> Iterator[Show]:
    """Shows records as they are written.

    Args:
      console: where to; None shows nothing.
      steps: the run's length.
      completed: steps made by earlier starts.

    Yields:
      A function to call with every record.
    """
    if console is None:
        yield lambda record: None
    elif not console.is_terminal:
        plain = lambda record: f"step {record['step']}/{steps}  {describe(record)}"
        yield lambda record: console.print(plain(record), highlight=False, soft_wrap=True)
    else:
        columns = (
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("compiling", total=steps, completed=completed)
            yield lambda record: bar.update(
                task, completed=record["step"], description=describe(record)
            )
