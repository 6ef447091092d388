"""What a comparison says for itself: ``report.md``, ``report.html``, ``summary.json``, curves."""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from jaxopt_suite.experiments import markup, plots, table
from jaxopt_suite.experiments.markup import Block, Code, Grid, Heading, Item, Listing, Paragraph
from jaxopt_suite.experiments.table import Rate, Run, Table


@dataclasses.dataclass(frozen=True)
class Method:
    """What the report says about one optimizer besides its numbers.

    Attributes:
      name: the recipe's name.
      title: the paper's title.
      year: the paper's year.
      arxiv: its arXiv id; empty if it has none.
      state_formula: elements of optimizer state for an m-by-n matrix.
      schedule: the learning rate's shape over the run, ``"cosine"`` or ``"constant"``.
      settings: hyperparameters given by the user, as ``"name=value"``.
    """

    name: str
    title: str
    year: int
    arxiv: str
    state_formula: str
    schedule: str
    settings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything a report is made from.

    Attributes:
      runs: the final runs, all seeds of all optimizers.
      rates: each optimizer's learning rate, in the order in which the optimizers were listed.
      methods: what is said about each optimizer, in the same order.
      entropy: unigram entropy of the validation bytes, nats per byte.
      settings: the comparison's own configuration by field name.
      data: facts about the data, to be shown as they are.
      environment: versions and hardware, to be shown as they are.
      command: the command line that makes this comparison.
    """

    runs: tuple[Run, ...]
    rates: Mapping[str, Rate]
    methods: tuple[Method, ...]
    entropy: float
    settings: Mapping[str, Any]
    data: Mapping[str, str]
    environment: Mapping[str, str]
    command: str

    @property
    def table(self) -> Table:
        """The rows and curves, computed from the runs."""
        return table.summarize(self.runs, self.rates)


def _schedule_statement(comparison: Comparison) -> str:
    warmup = f"linear warm-up over {100 * comparison.settings['warmup_fraction']:g} % of the steps"
    constant = [m.name for m in comparison.methods if m.schedule == "constant"]
    exception = f" except {', '.join(constant)} (the same warm-up, then flat)" if constant else ""
    return f"Learning rate: {warmup}, then a cosine down to 10 % of the peak{exception}."


def _rate_statement(comparison: Comparison) -> list[str]:
    if all(rate.source != "tuned default" for rate in comparison.rates.values()):
        return []
    return [
        "A tuned default is the peak learning rate tuned on the default task (nano model, sources "
        "of the standard library, batch 16, 128 bytes, 200 steps). On anything else compare with "
        "--lr-sweep."
    ]


def _timing_statement(runs: Sequence[Run]) -> str:
    loads = [run.load for run in runs]
    return (
        "Runs follow one another on one machine, seed by seed and within a seed optimizer by "
        "optimizer. Seconds are those of training steps alone: no compilation, evaluation or "
        "checkpoint. Milliseconds per step are medians over steps and seeds. Both are noisy: "
        "expect a few percent, more on a busy machine. Load average when the runs ended: "
        f"{min(loads):.1f} to {max(loads):.1f}, median {statistics.median(loads):.1f}."
    )


def _mesh_statement(comparison: Comparison) -> list[str]:
    meshes = sorted({run.mesh for run in comparison.runs if run.mesh is not None})
    if not meshes:
        return []
    return [
        f"Every run is split over the mesh {', '.join(meshes)}. Bytes sent are what each device "
        "sends to others per step, counted in the compiled program; where steps differ, the mean "
        "over a round between two synchronisations, and beside it the step that sends the most. "
        "Gbit/s are those with which these bytes take as long as a step, on this machine.",
        *_outer_loop_statement(comparison),
    ]


def _outer_loop_statement(comparison: Comparison) -> list[str]:
    if comparison.settings.get("diloco_workers") is None:
        return []
    return [
        "Every optimizer is the inner one of DiLoCo: each worker has its own. A tuned default is "
        "the rate tuned without an outer loop."
    ]


def _fairness(comparison: Comparison) -> list[str]:
    """What was held equal between the optimizers, and what was not."""
    s = comparison.settings
    clip = "not clipped" if s["clip"] is None else f"clipped to global norm {s['clip']:g}"
    return [
        f"Every run trains the {s['preset']} model ({comparison.runs[0].n_params:,} parameters) "
        f"for {s['steps']} steps on batches of {s['batch_size']} windows of {s['seq_len']} bytes; "
        f"gradients are {clip}.",
        "Runs with the same seed start from the same parameters and see the same batches in the "
        "same order, whatever the optimizer.",
        f"Validation loss is measured every {s['eval_every']} steps, before the first and after "
        f"the last, for every run on the same batches (at most {s['eval_batches']}).",
        _schedule_statement(comparison),
        *_rate_statement(comparison),
        "A ± is the sample standard deviation over seeds. A run that diverged counts as an "
        "infinite loss.",
        "Steps and seconds to AdamW's loss are read off the mean curve over seeds: the first point "
        "at or below AdamW's final mean, linearly interpolated between evaluations.",
        "Optimizer-state bytes are those of the state's arrays, counted exactly.",
        *_mesh_statement(comparison),
        _timing_statement(comparison.runs),
    ]


def _method_item(method: Method) -> Item:
    given = f"; given: {', '.join(method.settings)}" if method.settings else ""
    text = f"{method.name}: {method.title}, {method.year}; state {method.state_formula}{given}"
    return Item(text, f"https://arxiv.org/abs/{method.arxiv}" if method.arxiv else "")


def _sweep_blocks(comparison: Comparison) -> list[Block]:
    """The whole learning-rate sweep, one row a trial; empty without one."""
    swept = {name: rate for name, rate in comparison.rates.items() if rate.trials}
    if not swept:
        return []
    rows = [
        (name, f"{trial.learning_rate:.3g}", trial.outcome, _verdict(rate, trial))
        for name, rate in swept.items()
        for trial in rate.trials
    ]
    seed = next(iter(swept.values())).trials[0].seed
    return [
        Heading("Learning-rate sweep"),
        Paragraph(
            f"Seed {seed}, which no final run uses. The rate with the lowest final validation loss "
            "is used; while it is the smallest or the largest, one more is tried beyond it, twice "
            "at most."
        ),
        Grid(("optimizer", "learning rate", "outcome", ""), rows),
    ]


def _verdict(rate: Rate, trial: Run) -> str:
    if trial.learning_rate != rate.value:
        return ""
    if not math.isfinite(trial.final_loss):
        return "used, though every rate diverged"
    return "used, at the grid's edge" if rate.at_edge else "used"


def _runs_grid(runs: Sequence[Run]) -> Grid:
    headings = ("optimizer", "seed", "learning rate", "outcome", "ms per step", "load")

    def line(run: Run) -> tuple[str, ...]:
        rate, ms = f"{run.learning_rate:.3g}", f"{run.ms_per_step:.1f}"
        return run.optimizer, str(run.seed), rate, run.outcome, ms, f"{run.load:.1f}"

    return Grid(headings, [line(run) for run in runs])


def _curves(comparison: Comparison, **colours: str) -> Figure:
    settings = comparison.settings
    tokens = settings["batch_size"] * settings["seq_len"]
    return plots.draw(comparison.table, comparison.entropy, tokens_per_step=tokens, **colours)


def _facts(facts: Mapping[str, str]) -> Listing:
    return Listing([Item(f"{name}: {value}") for name, value in facts.items()])


def document(comparison: Comparison) -> list[Block]:
    """The report as a list of blocks, ready to be written as Markdown or HTML."""
    numbers = comparison.table
    seeds = comparison.settings["seeds"]
    caption = (
        f"Validation loss, mean over {seeds} seed{'s' if seeds > 1 else ''}"
        + (" with the range from lowest to highest as a band" if seeds > 1 else "")
        + ". The first steep fall may leave the picture at the top. ✖ marks where an optimizer's "
        "first run diverged."
    )
    svg = plots.inline_svg(_curves(comparison, ink=plots.PAGE_INK, paper="none"))
    alt = "Validation loss against steps, training seconds and bytes sent, one line per optimizer"
    return [
        Heading("Optimizers compared", level=1),
        Paragraph(table.entropy_statement(numbers, comparison.entropy)),
        Grid(table.headings(numbers), [table.cells(row, numbers) for row in numbers.rows]),
        markup.Picture("curves.svg", svg, alt, caption),
        Heading("How it was measured"),
        Listing([Item(text) for text in _fairness(comparison)]),
        *_sweep_blocks(comparison),
        Heading("Optimizers"),
        Listing([_method_item(method) for method in comparison.methods]),
        Heading("Every run"),
        _runs_grid(comparison.runs),
        Heading("Data"),
        _facts(comparison.data),
        Heading("Machine and versions"),
        _facts(comparison.environment),
        Heading("Command"),
        Code(comparison.command),
    ]


def _finite(value: Any) -> Any:
    """``value`` with every number that JSON cannot write replaced by ``None``."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def summary(comparison: Comparison) -> dict[str, Any]:
    """Every number of the report, ready for JSON; a number that does not exist is ``None``."""
    numbers = comparison.table
    return _finite(
        {
            "table": [dataclasses.asdict(row) for row in numbers.rows],
            "baseline_loss": numbers.baseline_loss,
            "baseline_gap": numbers.baseline_gap,
            "unigram_entropy": comparison.entropy,
            "runs": [dataclasses.asdict(run) for run in comparison.runs],
            "rates": {name: dataclasses.asdict(rate) for name, rate in comparison.rates.items()},
            "methods": [dataclasses.asdict(method) for method in comparison.methods],
            "settings": dict(comparison.settings),
            "data": dict(comparison.data),
            "environment": dict(comparison.environment),
            "command": comparison.command,
        }
    )


def write(comparison: Comparison, folder: pathlib.Path) -> None:
    """Writes the report's files into an existing folder, replacing what an earlier call wrote.

    Args:
      comparison: what to report.
      folder: gets ``report.md``, ``report.html``, ``summary.json``, ``curves.svg``, ``curves.png``.
    """
    blocks = document(comparison)
    figure = _curves(comparison)
    texts = {
        "curves.svg": plots.svg(figure),
        "summary.json": json.dumps(summary(comparison), indent=2, allow_nan=False) + "\n",
        "report.md": markup.to_markdown(blocks),
        "report.html": markup.to_html(blocks, title="Optimizers compared"),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    figure.savefig(folder / "curves.png", dpi=150)
