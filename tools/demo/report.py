"""The demonstration's result: a table for the terminal and a page for the browser.

The page, ``report.html``, is one file that needs nothing else: its style and its curves stand inside it, and it runs
no script. It reads and prints in light and in dark.
"""

from __future__ import annotations

import html
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .charts import Interruption, draw_curves, read_metrics

UNCHANGED = 0.0005
"""Nats below which a change is none: it prints as 0.000."""


@dataclass(frozen=True)
class LossChange:
    """A corpus's validation loss, in nats per token, before and after continued pretraining."""

    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def percent(self) -> float:
        """The change of the loss in percent of the loss before."""
        return 100 * self.change / self.before

    @property
    def perplexity_before(self) -> float:
        return math.exp(self.before)

    @property
    def perplexity_after(self) -> float:
        return math.exp(self.after)

    @property
    def perplexity_percent(self) -> float:
        """The change of the perplexity in percent of the perplexity before."""
        return 100 * math.expm1(self.change)


@dataclass(frozen=True)
class Command:
    """A command line of the demonstration and how long it took."""

    line: str
    seconds: float


@dataclass(frozen=True)
class Sample:
    """A prompt and how the model went on from it before and after; the continuations do not repeat the prompt."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows."""

    domain: LossChange
    general: LossChange
    metrics: Path
    """The run's metrics file (see :mod:`.charts`) with evaluations named ``domain`` and ``general``."""
    configuration: str
    """The run's configuration, as YAML."""
    commands: Sequence[Command]
    """In the order in which they ran."""
    facts: Mapping[str, str]
    """What the run was, label to value: model, parameters, tokens, sizes of the corpora, ..."""
    environment: Mapping[str, str]
    """What it ran on, label to value; :func:`describe_environment` fills it."""
    samples: Sequence[Sample] = ()
    interruptions: Sequence[Interruption] = ()
    title: str = "Continued pretraining, end to end"


def describe_environment() -> dict[str, str]:
    """The versions and the machine that a reader needs to repeat a run."""
    return {
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "retemper")},
        "System": f"{platform.system()} {platform.machine()}",
        "CPU cores": str(os.cpu_count()),
    }


def format_table(data: ReportData) -> str:
    """The result as plain text: the losses of both corpora, and in words what was learned and what was forgotten."""
    lines = [f"{'corpus':<9}{'loss before':>12}{'after':>8}{'change':>19}{'perplexity before':>20}{'after':>9}"]
    for name, loss in (("domain", data.domain), ("general", data.general)):
        change = f"{loss.change:+.3f} ({_percent(loss.percent)})"
        perplexities = f"{loss.perplexity_before:>20.1f}{loss.perplexity_after:>9.1f}"
        lines.append(f"{name:<9}{loss.before:>12.3f}{loss.after:>8.3f}{change:>19}{perplexities}")
    return "\n".join([*lines, "", *verdicts(data)])


def verdicts(data: ReportData) -> tuple[str, str]:
    """One sentence on the domain corpus and one on the general corpus."""
    return (
        _verdict("domain", data.domain, fell="learned", rose="not learned"),
        _verdict("general", data.general, fell="nothing forgotten", rose="forgotten"),
    )


def write_report(path: Path, data: ReportData) -> None:
    """Write the page. Raises :class:`UserError` where matplotlib is missing or the metrics file cannot be read."""
    metrics = read_metrics(data.metrics)
    sections = [
        _header(data),
        _section("Validation loss and perplexity", _loss_table(data)),
        _section("The run", draw_curves(metrics, data.interruptions) + _definitions(data.facts), kind="curves"),
        _section("Samples", "".join(map(_sample, data.samples))) if data.samples else "",
        _section("Commands", _command_table(data.commands)),
        _section("Configuration", f"<pre>{_escape(data.configuration.strip())}</pre>"),
        _section("Environment", _definitions(data.environment)),
    ]
    page = PAGE.format(title=_escape(data.title), style=STYLE, body="\n".join(filter(None, sections)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _verdict(name: str, loss: LossChange, fell: str, rose: str) -> str:
    if abs(loss.change) < UNCHANGED:
        return f"{name} loss did not change"
    verb, meaning = ("fell", fell) if loss.change < 0 else ("rose", rose)
    return f"{name} loss {verb} by {abs(loss.change):.3f} nats ({_percent(loss.percent)}): {meaning}"


def _percent(value: float) -> str:
    return f"{value:+.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _escape(text: str) -> str:
    """Text as HTML. Control characters, which a model may well generate and HTML forbids, become U+FFFD."""
    visible = "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else "\ufffd" for c in text)
    return html.escape(visible)


def _section(title: str, content: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{_escape(title)}</h2>\n{content}</section>'


def _header(data: ReportData) -> str:
    cards = "".join(
        f'<div class="card {name}"><b>{loss.before:.3f} → {loss.after:.3f}</b><span>{_escape(sentence)}</span></div>'
        for name, loss, sentence in zip(("domain", "general"), (data.domain, data.general), verdicts(data), strict=True)
    )
    return f'<header><h1>{_escape(data.title)}</h1>\n<div class="cards">{cards}</div></header>'


def _loss_table(data: ReportData) -> str:
    head = ("corpus", "loss before", "after", "change", "%", "perplexity before", "after", "%")
    rows = [
        (
            name,
            f"{loss.before:.3f}",
            f"{loss.after:.3f}",
            f"{loss.change:+.3f}",
            _percent(loss.percent),
            f"{loss.perplexity_before:.1f}",
            f"{loss.perplexity_after:.1f}",
            _percent(loss.perplexity_percent),
        )
        for name, loss in (("domain", data.domain), ("general", data.general))
    ]
    note = "Loss in nats per token on held-out documents; perplexity is its exponential."
    return _table(head, rows) + f'<p class="note">{note}</p>'


def _command_table(commands: Sequence[Command]) -> str:
    rows = [(command.line, _duration(command.seconds)) for command in commands]
    total = ("all commands", _duration(sum(command.seconds for command in commands)))
    return _table(("command", "time"), rows, total=total, kind="commands")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] = (), kind: str = "") -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{_escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    foot = f"<tfoot>{row(total, 'td')}</tfoot>" if total else ""
    body = "\n".join(row(cells, "td") for cells in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead>{row(head, "th")}</thead>'
        f"<tbody>{body}</tbody>{foot}</table></div>"
    )


def _definitions(items: Mapping[str, str]) -> str:
    pairs = "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in items.items())
    return f"<dl>{pairs}</dl>"


def _sample(sample: Sample) -> str:
    def column(label: str, continuation: str) -> str:
        text = f"<mark>{_escape(sample.prompt)}</mark>{_escape(continuation)}"
        return f"<figure><figcaption>{label}</figcaption><pre>{text}</pre></figure>"

    return f'<div class="sample">{column("before", sample.before)}{column("after", sample.after)}</div>'


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
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

STYLE = """
:root {
  font-size: 15px;
  --paper: #ffffff; --panel: #f6f7f9; --ink: #1b1f24; --faint: #5d6673; --rule: #dfe3e8;
  --train: #8b95a3; --domain: #1f6feb; --general: #c4570c;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --panel: #1d2126; --ink: #e6e9ed; --faint: #9aa4b1; --rule: #333a43;
    --train: #7d8896; --domain: #5aa2ff; --general: #f0954f;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1.2rem; }
h2 { font-size: 1.05rem; margin: 2.4rem 0 .7rem; }
.note { color: var(--faint); font-size: .85rem; margin: .5rem 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
.card { background: var(--panel); border-left: 4px solid; border-radius: 4px; padding: .8rem 1.1rem; }
.card.domain { border-color: var(--domain); }
.card.general { border-color: var(--general); }
.card b { display: block; font-size: 1.6rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
th { color: var(--faint); font-weight: 500; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
tfoot td { border-bottom: 0; font-weight: 600; }
.commands tbody td:first-child { font: .8rem/1.5 ui-monospace, monospace; }
.commands tbody td:first-child { white-space: pre-wrap; overflow-wrap: anywhere; }
.commands td { vertical-align: top; }
.curves svg { display: block; width: 100%; height: auto; }
.curves svg text { font-family: system-ui, sans-serif !important; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .7rem 1.5rem; margin: 1rem 0 0; }
dt { color: var(--faint); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
pre {
  margin: 0; padding: .9rem 1.1rem; background: var(--panel); border-radius: 4px;
  font: .8rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
}
.sample { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; margin-bottom: 1rem; }
figure { margin: 0; display: flex; flex-direction: column; }
figure pre { flex: 1; }
figcaption { color: var(--faint); font-size: .85rem; margin-bottom: .25rem; }
mark { background: none; color: var(--domain); font-weight: 600; }
@media print {
  :root { font-size: 11px; }
  main { max-width: none; padding: 0; }
  .cards, .sample { grid-template-columns: 1fr 1fr; }
  .card, tr, svg, figure, dl { break-inside: avoid; }
  h2 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
