"""``jaxopt-suite fit``: a scaling law fitted to logged runs."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import rich.box
import rich.table
import rich.text
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jaxopt_suite import scaling_laws
from jaxopt_suite.cli.shell import shell_command
from jaxopt_suite.core.errors import UserError
from jaxopt_suite.experiments import environment, fit_report, fit_study
from jaxopt_suite.experiments.fit_config import FitConfig
from jaxopt_suite.experiments.fit_report import Report
from jaxopt_suite.experiments.fit_study import Study
from jaxopt_suite.scaling_laws import summary

_PIPE_WIDTH = 200  # characters; a pipe or a file has no width of its own


def run(config: FitConfig) -> int:
    """Fits, then prints the table and writes the report if there is to be one.

    Args:
      config: what the command line said.

    Returns:
      The exit status: 0 when there is a fit, whether or not it is to be believed.
    """
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(width=_PIPE_WIDTH, highlight=False)
    if config.list:
        list_laws(console)
        return 0
    fit_study.find_law(config.law)
    folder = None if config.out is None else _folder(config.out)
    with _progress(console, fit_study.steps(config) + (folder is not None)) as tell:
        study = fit_study.make(config, tell)
        if folder is not None:
            tell("drawing")
            versions = environment.versions() | {"hardware": environment.hardware()}
            fit_report.write(Report(study, command(config), versions), folder)
    show(study, console)
    for name in fit_report.FILES if folder is not None else ():
        console.print(str(pathlib.Path(config.out or "") / name), markup=False, soft_wrap=True)
    return 0


def command(config: FitConfig) -> str:
    """The shell command that makes the fit of ``config``."""
    return shell_command("fit", config, positional=("runs",))


def list_laws(console: Console) -> None:
    """Prints every law: name, formula, inputs, source."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, collapse_padding=True)
    for heading in ("law", "form", "inputs", "source"):
        table.add_column(heading, overflow="fold")
    for name, law in scaling_laws.laws.registry().items():
        cells = (name, f"{law.output}: {law.formula}", ", ".join(law.inputs), law.source)
        table.add_row(*map(rich.text.Text, cells))
    console.print(table)


def show(study: Study, console: Console) -> None:
    """Prints coefficients, the certificate, warnings, optimal sizes and the next run.

    Args:
      study: what was found.
      console: where to print.
    """
    fit = study.fit
    say = lambda text: console.print(text, markup=False, soft_wrap=True)
    say(f"{fit.law.name}: {fit.law.formula}")
    if study.runs.dropped:
        say(f"{len(study.runs)} runs, {len(study.runs.dropped)} left out; the first of these:")
        for each in study.runs.dropped[:3]:
            say(f"  {each}")
    else:
        say(f"{len(study.runs)} runs")
    grid = fit_report.coefficients(study)
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, collapse_padding=True)
    for column, heading in enumerate(grid.headings):
        table.add_column(heading, justify="right" if column else "left")
    for row in grid.rows:
        table.add_row(*map(rich.text.Text, row))
    console.print(table)
    say(f"{fit.objective}: {fit.certificate.objective:.9g}; {fit.certificate}")
    for text in summary.warnings(fit):
        say(f"WARNING: {text}")
    if study.frontier is not None:
        say(str(study.frontier))
    if study.next_run is not None:
        say(f"next: {study.next_run}")


def _folder(out: str) -> pathlib.Path:
    """The report's folder, made if need be, before minutes are spent on what goes in there."""
    folder = pathlib.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder}: {error}") from error
    return folder


@contextlib.contextmanager
def _progress(console: Console, steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, which goes away when it is done; nothing elsewhere."""
    if not console.is_terminal:
        yield lambda text: None
        return
    columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=steps, completed=-1)
        yield lambda text: bar.update(task, advance=1, description=text)
