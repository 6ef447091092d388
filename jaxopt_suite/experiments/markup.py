"""A document as a list of blocks, written as Markdown or as one self-contained HTML page."""

import dataclasses
import html
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Heading:
    """A section's title; ``level`` 1 is the document's."""

    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    """Plain text; nothing in it is markup."""

    text: str


@dataclasses.dataclass(frozen=True)
class Item:
    """One point of a listing, with an optional link written after it."""

    text: str
    url: str = ""


@dataclasses.dataclass(frozen=True)
class Listing:
    """A bulleted list."""

    items: Sequence[Item]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table. The first column is text, the others are aligned right."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Code:
    """Preformatted text, a command for instance."""

    text: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture: a file beside the Markdown, an ``<svg>`` element within the HTML."""

    path: str
    svg: str
    alt: str
    caption: str


Block = Heading | Paragraph | Listing | Grid | Code | Picture


def _escape_markdown(text: str) -> str:
    """``text`` such that Markdown and the HTML within it show it as it is, on one line."""
    text = html.escape(" ".join(text.split()), quote=False)
    text = re.sub(r"([\\`*\[\]|~#])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)  # inside a word an underscore is only itself


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _markdown_block(block: Block) -> str:
    esc = _escape_markdown
    match block:
        case Heading(text, level):
            return f"{'#' * level} {esc(text)}"
        case Paragraph(text):
            return esc(text)
        case Listing(items):
            return "\n".join(f"- {esc(i.text)}" + (f" (<{i.url}>)" if i.url else "") for i in items)
        case Grid(headings, rows):
            rule = "|---|" + "---:|" * (len(headings) - 1)
            lines = ["| " + " | ".join(map(esc, row)) + " |" for row in (headings, *rows)]
            return "\n".join([lines[0], rule, *lines[1:]])
        case Code(text):
            return _fenced(text)
        case Picture(path, _, alt, caption):
            return f"![{esc(alt)}]({path})\n\n{esc(caption)}"


def to_markdown(blocks: Sequence[Block]) -> str:
    """The document as Markdown; a picture is linked by its path, relative to the document.

    Args:
      blocks: the document's parts in order.

    Returns:
      Markdown text, ending in a newline.
    """
    return "\n\n".join(map(_markdown_block, blocks)) + "\n"


_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --quiet: #5f6368;
  --line: #d5d8dc; --shade: #f5f6f7; --link: #0b57b0 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --paper: #16181b; --quiet: #a0a6ad;
  --line: #3a3f45; --shade: #202429; --link: #8ab8f0 } }
body { margin: 2rem auto; max-width: 66rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, sans-serif }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
a { color: var(--link) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right }
th { color: var(--quiet); font-weight: 600; vertical-align: bottom }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left }
pre { padding: .8rem 1rem; background: var(--shade); border-radius: 6px; overflow-x: auto }
figure { margin: 1.5rem 0 } figure svg { width: 100%; height: auto }
figcaption { color: var(--quiet); font-size: .9rem }
"""


def _html_grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    esc = html.escape
    head = "".join(f"<th>{esc(text)}</th>" for text in headings)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{esc(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _html_item(item: Item) -> str:
    url = html.escape(item.url)
    link = f' (<a href="{url}">{url}</a>)' if url else ""
    return f"<li>{html.escape(item.text)}{link}</li>"


def _html_block(block: Block) -> str:
    esc = html.escape
    match block:
        case Heading(text, level):
            return f"<h{level}>{esc(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{esc(text)}</p>"
        case Listing(items):
            return "<ul>\n" + "\n".join(map(_html_item, items)) + "\n</ul>"
        case Grid(headings, rows):
            return _html_grid(headings, rows)
        case Code(text):
            return f"<pre><code>{esc(text)}</code></pre>"
        case Picture(_, svg, alt, caption):
            picture = f'<div role="img" aria-label="{esc(alt)}">\n{svg}\n</div>'
            return f"<figure>\n{picture}\n<figcaption>{esc(caption)}</figcaption>\n</figure>"


def to_html(blocks: Sequence[Block], *, title: str) -> str:
    """The document as one HTML page that loads nothing and reads well on white and on black.

    Args:
      blocks: the document's parts in order. All text is escaped; a picture's ``svg`` is not.
      title: the page's title.

    Returns:
      The page's text.
    """
    body = "\n".join(map(_html_block, blocks))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
