"""``jaxopt-suite plan``: what a train step will need on a pod that need not exist."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

import jax
import rich.box
import rich.table
from rich.console import Console

from jaxopt_suite.cli.shell import shell_command
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import environment, plan_report, plans
from jaxopt_suite.experiments.markup import Grid
from jaxopt_suite.experiments.plan_config import PlanConfig
from jaxopt_suite.experiments.plan_report import Report
from jaxopt_suite.parallel import topologies

_PIPE_WIDTH = 200  # characters; a pipe or a file has no width of its own


def run(config: PlanConfig) -> int:
    """Compiles, then prints the plan and writes the files asked for.

    Args:
      config: what the command line said.

    Returns:
      The exit status: 0 when there is a plan, whether or not the step fits.
    """
    for path in _files(config):
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    prepare_process()
    console = Console(highlight=False)
    with console.status(f"compiling for {config.topology}"):
        made = plans.make_plans(config)
    report = Report(
        plans=made,
        settings=dataclasses.asdict(config),
        command=command(config),
        environment=environment.versions() | {"processor": environment.processor()},
    )
    show(report, console if console.is_terminal else Console(width=_PIPE_WIDTH, highlight=False))
    for path, text in _files(config).items():
        path.write_text(text(report), encoding="utf-8")
        console.print(str(path), markup=False, soft_wrap=True)
    return 0


def command(config: PlanConfig) -> str:
    """The shell command that makes the plan of ``config``."""
    return shell_command("plan", config)


def prepare_process() -> None:
    """Makes this process one that compiles for chips it does not have, and touches none it has.

    Must come before JAX starts a backend; settings of the user's own are left as they are.
    """
    for name, value in topologies.SETTINGS.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def show(report: Report, console: Console) -> None:
    """Prints the tables, the chip's figures, and what limits the step.

    Args:
      report: what was planned.
      console: where to print.
    """
    chip = report.first.chip
    console.print(report.title, markup=False)
    for title, grid in {**plan_report.grids(report), "": plan_report.chip_grid(chip)}.items():
        console.print(_table(title, grid))
    said = [f"Figures: {'; '.join(chip.sources)}.", *plan_report.constraints(report)]
    for sentence in said:
        console.print(sentence, markup=False, soft_wrap=True)


def _files(config: PlanConfig) -> dict[pathlib.Path, Callable[[Report], str]]:
    asked = {config.json: plan_report.to_json, config.html: plan_report.to_html}
    return {pathlib.Path(name): text for name, text in asked.items() if name is not None}


def _table(title: str, grid: Grid) -> rich.table.Table:
    table = rich.table.Table(
        title=title or None, title_justify="left", box=rich.box.SIMPLE_HEAD, collapse_padding=True
    )
    for column, heading in enumerate(grid.headings):
        table.add_column(heading, justify="right" if column else "left")
    for row in grid.rows:
        table.add_row(*row)
    return table
