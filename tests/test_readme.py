"""Every code block of the README and of the guides runs, and prints what is printed below it.

In a document, ``python`` blocks run in order in one namespace; a ``text`` block after one is its
exact output. In a ``console`` block the lines that start with ``$`` are commands of ours, run in
a folder that has nothing but a link to the clone's ``benchmarks``. A block that cannot run here
says why in a comment before it, in this form: ``<!-- not run: why -->``.
"""

import contextlib
import dataclasses
import io
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n+)?"
    r"^```(?P<language>\w*)\n(?P<body>.*?)^```$"
    r"(?:\n+```text\n(?P<output>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
# How a command is started without an install: by the module behind it.
_PROGRAMS = {
    ("jaxopt-suite",): ["-m", "jaxopt_suite.cli.main"],
    ("python", "-m"): ["-m"],
}


@dataclasses.dataclass(frozen=True)
class Block:
    language: str
    body: str
    output: str | None
    reason: str | None  # why it is not run


def blocks(text: str) -> list[Block]:
    """The code blocks of a document, in order."""
    return [
        Block(m["language"], m["body"], m["output"], m["reason"]) for m in _BLOCK.finditer(text)
    ]


def commands(body: str) -> list[list[str]]:
    """The commands of a console block, each as words; lines that end in a backslash go on."""
    lines = body.replace("\\\n", " ").splitlines()
    return [shlex.split(line[2:]) for line in lines if line.startswith("$ ")]


def run_command(words: list[str]) -> None:
    """Runs one command of ours in the current folder."""
    for start, replacement in _PROGRAMS.items():
        if tuple(words[: len(start)]) == start:
            call = [sys.executable, *replacement, *words[len(start) :]]
            done = subprocess.run(call, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
            return
    raise AssertionError(f"{words} is no command of ours: run it, or say why not in a comment")


def run_document(text: str) -> None:
    """Runs every block of a document in the current folder and compares what it prints."""
    namespace = {"__name__": "__main__"}
    for block in blocks(text):
        if block.reason or block.language == "text":
            continue
        if block.language == "console":
            assert commands(block.body), f"no command in\n{block.body}"
            for words in commands(block.body):
                run_command(words)
            continue
        assert block.language == "python", (
            f"a block in {block.language!r} is neither run nor excused"
        )
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.body, "<block>", "exec"), namespace)
        if block.output is not None:
            assert printed.getvalue() == block.output


def _has_blocks(path: pathlib.Path) -> bool:
    return any(not b.reason and b.language != "text" for b in blocks(path.read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if _has_blocks(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_block_runs_and_prints_what_the_document_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    run_document(path.read_text())


def test_the_readme_is_short_and_names_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert "make demo" in text
    assert "make test" in text


def test_the_first_result_of_the_readme_is_at_most_twenty_lines():
    first = next(b for b in blocks((ROOT / "README.md").read_text()) if b.language == "python")
    assert len(first.body.splitlines()) <= 20
    assert first.output is not None, "it must show what it prints"


def test_links_of_the_readme_lead_somewhere():
    """Links between pages of the site are for mkdocs to check."""
    targets = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text())
    local = [t for t in targets if not t.startswith(("http://", "https://"))]
    assert local
    assert [t for t in local if not (ROOT / t).exists()] == []


@pytest.mark.parametrize(
    "text",
    [
        "```python\nprint(1)\n```\n\n```text\n2\n```\n",
        "```python\nraise ValueError\n```\n",
        "```bash\nls\n```\n",
        "```console\n$ ls\n```\n",
        "```console\n$ jaxopt-suite no-such-command\n```\n",
    ],
)
def test_the_runner_finds_what_is_wrong(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, ValueError)):
        run_document(text)


def test_the_runner_shares_names_between_blocks_and_leaves_out_what_is_excused():
    run_document(
        "```python\nx = 1\n```\n"
        "<!-- not run: shows a mistake -->\n```python\nx = 1 / 0\n```\n"
        "```python\nprint(x)\n```\n```text\n1\n```\n"
    )
