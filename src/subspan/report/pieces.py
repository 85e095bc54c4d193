"""What every page is made of: its frame, tables, figures, cards of rows, commands, and numbers in words.

A page is complete in itself: it needs no network and no other file.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
from collections.abc import Callable
from html import escape
from importlib import resources
from typing import Any

from subspan.datasets import Rows

_THUMBNAIL = 160
_SNIPPET = 320
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def document(title: str, brand: str, top: str, links: str, body: str, facts: dict[str, Any]) -> str:
    """A page (HTML) around ready sections: its head, styles, contents, numbers as JSON and the scripts of its plots."""
    title = escape(title)
    style = resources.files("subspan.report").joinpath("page.css").read_text(encoding="utf-8")
    script = resources.files("subspan.report").joinpath("page.js").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title} · {brand}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<p class="brand">{brand}</p>
<h1>{title}</h1>
{top}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<footer>
<p>subspan {escape(facts["versions"]["subspan"])} · {escape(facts["created"])} · seed {facts["seed"]} ·
{facts["seconds"]:.0f} s. The numbers of this page are in it as JSON, in the element with the id <code>facts</code>.</p>
</footer>
<script type="application/json" id="facts">{as_json(facts)}</script>
<script type="text/plain" id="plotly">{plotly_script()}</script>
<script>
{script}</script>
</body>
</html>
"""


def as_json(value: Any) -> str:
    """JSON that may stand inside a script element: no `<` survives, so nothing in a text can end the element."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def plotly_script() -> str:
    """plotly.js with the kinds of plots that pages have, compressed; the page unpacks it."""
    packed = resources.files("subspan.report").joinpath("plotly-cartesian.min.js.gz").read_bytes()
    return base64.b64encode(packed).decode("ascii")


def figure_of(name: str, figure: dict[str, Any], caption: str, alternative: str) -> str:
    """A plot with its caption above and its words for those who cannot see it."""
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<div class="plot" data-figure="figure-{name}" role="img" aria-label="{escape(alternative)}"></div>'
        f'<script type="application/json" id="figure-{name}">{as_json(figure)}</script></figure>'
    )


def table_of(head: list[str], rows: list[list[str]], *, caption: str = "", numbers_from: int = 1) -> str:
    """A table of ready HTML cells; columns from `numbers_from` on are right-aligned."""

    def cells(row: list[str], tag: str) -> str:
        kinds = [' class="number"' if column >= numbers_from else "" for column in range(len(row))]
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in zip(row, kinds))

    title = f"<caption>{caption}</caption>" if caption else ""
    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    top = f"<thead><tr>{cells(head, 'th')}</tr></thead>" if any(head) else ""
    return f'<div class="wide-scroll"><table>{title}{top}<tbody>{lines}</tbody></table></div>'


def details_of(summary: str, content: str) -> str:
    """Content that is folded up under a summary."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def command_line(what: str, command: str) -> str:
    """What a command does, and the command."""
    return f'<p class="command"><span>{what}</span> <code>{escape(command)}</code></p>'


def call_of(verb: str, data: Rows, options: str) -> str:
    """The command line of a verb on these rows."""
    skipping = ["--skip-nan"] if data.dropped else []
    argument = [data.argument] if data.argument else []
    return f"{shlex.join(['subspan', verb, *argument, *data.reading, *skipping])} {options}"


def cards_of(entries: list[tuple[int, str]], data: Rows) -> str:
    """Rows with a note each, as thumbnails, texts, or names alone."""
    kind = "cards pictures" if data.images is not None else "cards"
    return f'<ul class="{kind}">{"".join(card_of(row, note, data) for row, note in entries)}</ul>'


def card_of(row: int, note: str, data: Rows) -> str:
    """A row with a note."""
    picture = "" if data.images is None else f'<img alt="" src="{thumbnail(data.images[row])}">'
    name, label = data.row_name(row), "" if data.labels is None else str(data.labels[row])
    # The images of a folder are named by it and labelled by it.
    label = f" · {escape(label)}" if label and label not in name.split("/")[:-1] else ""
    text = "" if data.texts is None else f"<p>{escape(snippet(data.texts[row]))}</p>"
    return f"<li>{picture}<b>{escape(name)}</b><small>{note}{label}</small>{text}</li>"


def snippet(text: str) -> str:
    """The beginning of a text, without its empty lines."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    short = "\n".join(line for line in lines if line)
    return short if len(short) <= _SNIPPET else short[: _SNIPPET - 1] + "…"


def thumbnail(image: Any) -> str:
    """A PIL image as a small JPEG in a data address."""
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def counted(value: float) -> str:
    """A whole number with thin spaces between the thousands."""
    return f"{round(value):,}".replace(",", "\u202f")


def rounded(value: float) -> str:
    """A number of three digits."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 or value == 0 else f"{value:.2e}"


def percent(share: float) -> str:
    """A share in percent; nothing that is less than all is shown as 100 %."""
    rounded = f"{share:.1%}" if share < 0.1 or share > 0.9 else f"{share:.0%}"
    if rounded == "100.0%" and share < 1:
        rounded = "99.9%"
    return rounded.replace(".0%", "%").replace("%", "\u202f%")


def ranging(low: float, high: float, show: Callable[[float], str]) -> str:
    """An interval, each end shown as `show` says."""
    return f"{show(low)} to {show(high)}"


def noun(count: int, one: str, many: str) -> str:
    """The word for so many."""
    return one if count == 1 else many


def plural(count: int, one: str, many: str) -> str:
    """So many, in digits and words."""
    return f"{counted(count)} {noun(count, one, many)}"
