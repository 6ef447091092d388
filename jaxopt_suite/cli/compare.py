"""``jaxopt-suite compare``: several optimizers on one task, and the table of how they did."""

import pathlib
from collections.abc import Sequence

import rich.box
import rich.table
from rich.console import Console
from rich.measure import Measurement

from jaxopt_suite.cli.shell import shell_command
from jaxopt_suite.experiments import compare, table
from jaxopt_suite.experiments.assembly import provide_cpu_devices
from jaxopt_suite.experiments.config import CompareConfig
from jaxopt_suite.experiments.report import Comparison

_SPLIT = 5  # columns in the first part of a table that is too wide for the terminal
_PIPE_WIDTH = 200  # characters; a pipe or a file has no width of its own


def run(config: CompareConfig) -> int:
    """Compares, then prints the table and where the report is.

    Args:
      config: what the command line said.

    Returns:
      The exit status: 0 when the report is written, whatever it says, and 128 plus the signal's
      number (130, 143) for a comparison that was asked to stop.
    """
    provide_cpu_devices(config)
    console = Console()
    try:
        comparison = compare.compare(config, command=command(config), console=console)
    except compare.Interrupted as stop:
        errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
        errors.print(stop)
        errors.print(f"to go on: {command(config)}")
        return 128 + stop.signum
    show(comparison, console if console.is_terminal else Console(width=_PIPE_WIDTH))
    folder = pathlib.Path(config.out)
    for name in ("report.html", "report.md", "summary.json"):
        console.print(f"{folder / name}", markup=False, highlight=False, soft_wrap=True)
    return 0


def command(config: CompareConfig) -> str:
    """The shell command that makes the comparison of ``config``, or goes on with it."""
    return shell_command("compare", config)


def show(comparison: Comparison, console: Console) -> None:
    """Prints the table, best first, in two parts where it is too wide, and what to see it against.

    Args:
      comparison: what was compared.
      console: where to print.
    """
    summary = comparison.table
    columns = range(len(table.headings(summary)))
    whole = _grid(summary, columns)
    if _width(whole) <= console.width:
        console.print(whole)
    else:
        console.print(_grid(summary, columns[:_SPLIT]))
        console.print(_grid(summary, [0, *columns[_SPLIT:]]))
    statement = table.entropy_statement(summary, comparison.entropy)
    console.print(statement, markup=False, highlight=False, soft_wrap=True)


def _grid(summary: table.Table, columns: Sequence[int]) -> rich.table.Table:
    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, collapse_padding=True)
    headings = table.headings(summary)
    for column in columns:
        grid.add_column(headings[column], justify="right" if column else "left")
    for row in summary.rows:
        texts = table.cells(row, summary)
        grid.add_row(*(texts[column] for column in columns))
    return grid


def _width(grid: rich.table.Table) -> int:
    """Characters that ``grid`` takes where nothing makes it narrower."""
    free = Console(width=1000)
    return Measurement.get(free, free.options, grid).maximum
