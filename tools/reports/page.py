"""Build self-contained HTML pages: style included, no scripts, all text escaped, in light and dark colors."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

from ...engine.files.outputs import GENERATOR

_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def page(title: str, sections: Iterable[str], style: str = "") -> str:
    """Return a page of ``sections`` (empty ones are skipped), with additional CSS in ``style``."""
    body = "\n".join(filter(None, sections))
    return _PAGE.format(generator=GENERATOR, title=escape(title), style=_STYLE + style + _PRINT_STYLE, body=body)


def escape(text: str) -> str:
    """Return text as HTML, with :func:`allowed` characters only."""
    return html.escape(allowed(text))


def allowed(text: str) -> str:
    """Replace control characters, which HTML forbids, and lone surrogates, which UTF-8 forbids, by U+FFFD."""
    return _FORBIDDEN.sub("\ufffd", text)


def section(title: str, content: str, kind: str = "") -> str:
    """Return a section with a headline; empty without content."""
    return f'<section class="{kind}"><h2>{escape(title)}</h2>\n{content}</section>' if content else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] = (), kind: str = "") -> str:
    """Return a table of text cells; ``total`` is its last row. Empty without rows."""

    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    if not body:
        return ""
    foot = f"<tfoot>{row(total, 'td')}</tfoot>" if total else ""
    return (
        f'<div class="scroll"><table class="{kind}"><thead>{row(head, "th")}</thead>'
        f"<tbody>{body}</tbody>{foot}</table></div>"
    )


def definitions(items: Mapping[str, str]) -> str:
    """Return a list of names and values; empty without any."""
    pairs = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items.items())
    return f"<dl>{pairs}</dl>" if pairs else ""


def note(text: str) -> str:
    """Return a remark in small type."""
    return f'<p class="note">{escape(text)}</p>'


def bullets(lines: Iterable[str]) -> str:
    """Return a list of remarks; empty without any."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def preformatted(text: str) -> str:
    """Return preformatted text; empty without any."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def header(title: str, cards: Iterable[tuple[str, str, str]]) -> str:
    """Return the head of a page; each card is ``(color, figure, words)``."""
    shown = "".join(
        f'<div class="card" style="border-color:var(--{color})"><b>{escape(figure)}</b>'
        f"<span>{escape(words)}</span></div>"
        for color, figure, words in cards
    )
    return f'<header><h1>{escape(title)}</h1>\n<div class="cards">{shown}</div></header>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="{generator}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  font-size: 15px;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --faint: #5d6673; --rule: #dfe3e8;
  --grey: #8b95a3; --blue: #1f6feb; --orange: #c4570c; --green: #1a7f37; --violet: #8250df; --red: #c93c37;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1d2126; --ink: #e6e9ed; --faint: #9aa4b1; --rule: #333a43;
    --grey: #7d8896; --blue: #5aa2ff; --orange: #f0954f; --green: #4cc268; --violet: #b48ef5; --red: #ff7b72;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.4rem 0 .7rem; }
.note { color: var(--faint); font-size: .85rem; margin: .5rem 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.card { background: var(--panel); border-left: 4px solid; border-radius: 4px; padding: .8rem 1.1rem; }
.card b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th { color: var(--faint); font-weight: 500; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tfoot td { border-bottom: 0; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1.2rem; margin-top: 1.2rem; }
.chart svg { display: block; width: 100%; height: auto; }
.chart svg text { font: 11px system-ui, sans-serif; fill: var(--faint); font-variant-numeric: tabular-nums; }
.chart svg text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.chart strong { color: var(--ink); }
.legend { float: right; }
.key { margin-left: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: 1.3rem; margin-right: .35rem; vertical-align: middle; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .7rem 1.5rem; margin: 1rem 0 0; }
dt { color: var(--faint); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
pre {
  margin: 0; padding: .9rem 1.1rem; background: var(--panel); border-radius: 4px;
  font: .8rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
}
figure { margin: 0; display: flex; flex-direction: column; }
figcaption { color: var(--faint); font-size: .85rem; margin-bottom: .25rem; }
ul { margin: .5rem 0 0; padding-left: 1.5rem; }
.warnings ul { border-left: 4px solid var(--orange); padding-top: .3rem; padding-bottom: .3rem; }
.facts dl { grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); margin-bottom: 1rem; }
.scroll + .scroll { margin-top: 1rem; }
.wrapped td:first-child, .wrapped td:last-child { white-space: normal; overflow-wrap: anywhere; }
td { vertical-align: top; }
"""

_PRINT_STYLE = """
@media print {
  :root { font-size: 11px; }
  main { max-width: none; padding: 0; }
  .cards { grid-template-columns: 1fr 1fr; }
  .card, tr, svg, figure, dl { break-inside: avoid; }
  h2 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
