"""``load_runs``: from files, folders and frames to one checked table."""

import os
import pathlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxopt_suite import core
from jaxopt_suite.scaling_laws.conventions import check_one_rule
from jaxopt_suite.scaling_laws.runs import columns as names
from jaxopt_suite.scaling_laws.runs import derive
from jaxopt_suite.scaling_laws.runs.collect import Collector
from jaxopt_suite.scaling_laws.runs.filters import Keep, mask_of
from jaxopt_suite.scaling_laws.runs.folders import open_path
from jaxopt_suite.scaling_laws.runs.sources import Source, frame_rows
from jaxopt_suite.scaling_laws.runs.table import BadRuns, Conventions, Dropped, Origins, Runs

_KINDS = types.MappingProxyType({"val_loss": "val"})  # names that say what the loss is


def load_runs(
    source: Any,
    *,
    columns: str | Mapping[str, str] | None = None,
    mode: str = "final",
    keep: Keep = None,
    on_bad: str = "raise",
    unfinished: str = "drop",
    text: Iterable[str] = (),
    n_rule: str | None = None,
    flops: str | None = None,
    loss_kind: str | None = None,
) -> Runs:
    """Reads runs, checks every value, and says where each row came from and why others did not.

    **What can be read.** JSON lines (``.jsonl``, ``.ndjson``), CSV and TSV with a header, Parquet,
    TensorBoard event files, folders of these, a folder of our own runs (``train``, ``compare`` and
    everything nested), data frames, mappings of arrays. In a folder that has our own runs nothing
    else is read; in one that has event files, no tables. Files are gone through once, row by row.

    **Columns.** ``N`` parameters, ``D`` tokens, ``C`` FLOPs, ``U`` unique tokens, ``loss`` in nats
    per token, ``loss_se``, ``lr``, ``batch_tokens``, ``steps``, ``step``, ``seed``, ``width``,
    ``depth``, ``vocab``, ``seq_len``, ``heads``, ``head_size``, ``ff_width``, ``ff_matrices``,
    ``decay_finished``; texts ``run_id``, ``optimizer``, ``schedule``, ``family``, ``group``; and
    ``N_rule``, ``flop_rule``, ``loss_kind``, which become ``conventions``. They are found under
    these names and a few that leave no doubt (``params``, ``tokens``, ``flops``, ``val_loss``,
    ``learning_rate``, ...). All others are read only if ``columns`` names them. ``"file"`` is the
    name of the file a row is in, where the file has no such column.

    **Bad rows** are damaged lines, texts in numeric columns, numbers that are not finite, counts
    and losses that are not positive, missing values of ``N``, ``D``, ``U``, ``C``, ``loss`` or of
    a column that ``columns`` names, and repeated runs. A record of a log (a row with a ``step``)
    that has no loss at all is no such row, and passed over.

    **Final mode.** Where rows have ``run_id`` and ``step``, the row of the largest step is the run;
    if that one is unusable, so is the run. Rows whose ``decay_finished`` is false are left out, and
    of our own runs those that diverged.

    Args:
      source: path of a file or folder; a ``pandas.DataFrame``; or a mapping from names to arrays.
      columns: for our columns, their names there: a mapping, or text such as
        ``"N=params,D=tokens,loss=val/loss"``. Names of your own are welcome.
      mode: ``"final"``, one row a run, or ``"curve"``, all rows.
      keep: which rows to keep: an expression such as ``"N > 1e7 and optimizer == 'adamw'"``, or a
        function of the columns that gives bool ``[rows]``.
      on_bad: ``"raise"`` collects all bad rows and raises; ``"drop"`` leaves them out and lists
        them in ``dropped``.
      unfinished: ``"drop"`` or ``"keep"``, rows whose ``decay_finished`` is false, in final mode.
      text: names in ``columns`` that hold text; all other names of your own hold numbers.
      n_rule: how ``N`` is counted. If there is no ``N``, a name of ``conventions.N_RULES`` has it
        computed from the models' sizes; for our own runs so do all names but ``"total"``.
      flops: how ``C`` is counted. If there is no ``C``, a name of ``conventions.FLOP_RULES`` has it
        computed from ``D`` and ``N`` or the sizes; if there is no ``D``, ``"6ND"`` has ``D``
        computed as ``C / 6N``. Nothing is computed without it.
      loss_kind: such as ``"train"`` or ``"val"``, where the files do not say it.

    Returns:
      The table, with what was left out in ``dropped``.

    Raises:
      BadRuns: a ``ValueError``, if rows are bad and may not be dropped.
      FileNotFoundError: if there is no such path.
      ValueError, TypeError: if a column is not there or may be several, a folder is empty, rules of
        counting are mixed or unknown, or nothing is left.

    Example:
      >>> from jaxopt_suite.scaling_laws import load_runs
      >>> runs = load_runs(
      ...     {"params": [1e6, 1e7], "tokens": [1e8, 1e9], "loss": [4.1, 3.2]}, flops="6ND")
      >>> runs["C"].tolist()
      [600000000000000.0, 6e+16]
    """
    core.check_choice("mode", mode, ("final", "curve"))
    core.check_choice("on_bad", on_bad, ("raise", "drop"))
    core.check_choice("unfinished", unfinished, ("drop", "keep"))
    asked = names.parse_columns(columns)
    collector = Collector(
        asked, _texts(text, asked), final=mode == "final", keep_all_bad=on_bad == "drop"
    )
    stated = {"N_rule": n_rule, "flop_rule": flops, "loss_kind": loss_kind}
    sources = _open(source, n_rule)
    for each in sources:
        collector.add(each)
    found, where = collector.finish()
    if mode == "final":
        _check_not_curves(found)
    if collector.bad and on_bad == "raise":
        raise BadRuns(collector.bad, collector.bad_count)
    dropped = (*collector.bad, *collector.excluded)
    _check_any(where, dropped, [each.name for each in sources])
    _check_loss(found)
    rules = _rules(found, where, stated, sources, collector.sources.get("N"))
    rules["loss_kind"] = rules["loss_kind"] or _KINDS.get(collector.sources["loss"])
    runs = _derived(found, where, dropped, rules, collector.sources)
    if mode == "final" and unfinished == "drop" and "decay_finished" in runs.columns:
        runs = runs.select(
            runs["decay_finished"] != 0.0, reason="its schedule had not finished (decay_finished)"
        )
    if keep is not None and len(runs):
        runs = runs.select(mask_of(keep, runs.columns), reason=f"not kept by {_name_of(keep)}")
    _check_any(runs.where, runs.dropped, where.files)
    return runs


def _texts(text: Iterable[str], asked: Mapping[str, str]) -> frozenset[str]:
    if isinstance(text, str):
        raise TypeError(f"text must be a sequence of names, got the text {text!r}")
    chosen = frozenset(text)
    known = chosen & names.KNOWN.keys() - names.TEXT
    if known or chosen - asked.keys() - names.TEXT:
        raise ValueError(
            f"text must be names in columns that are your own, got {sorted(chosen)} and columns "
            f"{sorted(asked)}"
        )
    return chosen


def _open(source: Any, n_rule: str | None) -> list[Source]:
    if isinstance(source, str | os.PathLike):
        return open_path(pathlib.Path(source), n_rule=n_rule)
    if isinstance(source, Mapping) or hasattr(source, "columns"):
        keys = source if isinstance(source, Mapping) else source.columns
        table = {str(name): source[name] for name in keys}
        return [Source("frame", lambda: frame_rows(table))]
    raise TypeError(
        "runs are loaded from a path, a data frame or a mapping of arrays, got "
        f"{type(source).__name__}"
    )


def _check_any(where: Origins, dropped: tuple[Dropped, ...], files: Iterable[str]) -> None:
    if not len(where):
        told = "".join(f"\n  {each}" for each in dropped[:10])
        looked = ", ".join(list(files)[:5])
        raise ValueError(f"no runs are left of {len(dropped)} rows in {looked}{told}")


def _check_loss(found: Mapping[str, np.ndarray]) -> None:
    if "loss" not in found:
        raise ValueError(
            f"no column gives the loss; found {', '.join(found) or 'none'}. Say which does, as in "
            "columns='loss=val/loss'"
        )


def _check_not_curves(found: Mapping[str, np.ndarray]) -> None:
    """Without run_id, steps of one run cannot be told from runs of one step."""
    if "step" in found and "run_id" not in found and len(found["step"]) > 1:
        raise ValueError(
            "rows have a step but no run_id, so the last row of each run cannot be told: say which "
            "column is the run's name, or columns={'run_id': 'file'} if each file is a run, or "
            "mode='curve'"
        )


def _rules(
    found: dict[str, np.ndarray],
    where: Origins,
    stated: Mapping[str, str | None],
    sources: Iterable[Source],
    size_key: str | None,
) -> dict[str, str | None]:
    """The conventions by their names in ``Conventions``; takes their columns out of ``found``."""
    result: dict[str, str | None] = {}
    for column, name in names.RULES.items():
        values: dict[str | None, str] = {}
        if column in found:
            for row, value in enumerate(found.pop(column)):
                values.setdefault(value or None, where[row])
        for source in sources:
            # What a reader knows of N holds for the key that it would have taken.
            if column in source.conventions and size_key == source.defaults.get("N"):
                values.setdefault(source.conventions[column], source.name)
        if stated[column] is not None:
            values.setdefault(stated[column], "the argument")
        result[name] = check_one_rule(name, values)
    return result


def _derived(
    found: dict[str, np.ndarray],
    where: Origins,
    dropped: tuple[Dropped, ...],
    rules: Mapping[str, str | None],
    sources: Mapping[str, str],
) -> Runs:
    """Adds the columns that the rules give."""
    made: dict[str, str] = {}
    derive.add_size(found, rules["n_rule"], made)
    derive.add_flops(found, rules["flop_rule"], made)
    kept = {name: key for name, key in sources.items() if name in found}
    return Runs(found, where, dropped, Conventions(**rules, sources=kept, derived=made))


def _name_of(keep: Any) -> str:
    return repr(keep) if isinstance(keep, str) else getattr(keep, "__qualname__", repr(keep))
