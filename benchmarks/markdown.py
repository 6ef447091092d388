"""Markdown of tables, and of where a row of measurements comes from."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [list(map(str, row)) for row in rows]
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines]
    body = ["| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *escaped]]
    return "\n".join(body) + "\n"


def measured(row: Mapping[str, Any]) -> str:
    """When, where and with what a row was made."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return (
        f"Measured {row['date']} at commit `{row['our_commit'][:12]}` on {row['hardware']} "
        f"(load {row['load']:g}); {versions}. Command: `{row['command']}`\n"
    )
