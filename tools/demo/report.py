"""The demonstration's result: a table for the terminal and a page for the browser.

The page, ``report.html``, is one file that needs nothing else: its style and its curves stand inside it, and it runs
no script. It reads and prints in light and in dark.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ..page.markup import definitions, escape, note, page, section, table
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
        section("Validation loss and perplexity", _loss_table(data)),
        section("The run", draw_curves(metrics, data.interruptions) + definitions(data.facts), kind="curves"),
        section("Samples", "".join(map(_sample, data.samples))) if data.samples else "",
        section("Commands", _command_table(data.commands)),
        section("Configuration", f"<pre>{escape(data.configuration.strip())}</pre>"),
        section("Environment", definitions(data.environment)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(data.title, sections, STYLE), encoding="utf-8")


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


def _header(data: ReportData) -> str:
    cards = "".join(
        f'<div class="card {name}"><b>{loss.before:.3f} → {loss.after:.3f}</b><span>{escape(sentence)}</span></div>'
        for name, loss, sentence in zip(("domain", "general"), (data.domain, data.general), verdicts(data), strict=True)
    )
    return f'<header><h1>{escape(data.title)}</h1>\n<div class="cards">{cards}</div></header>'


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
    return table(head, rows) + note("Loss in nats per token on held-out documents; perplexity is its exponential.")


def _command_table(commands: Sequence[Command]) -> str:
    rows = [(command.line, _duration(command.seconds)) for command in commands]
    total = ("all commands", _duration(sum(command.seconds for command in commands)))
    return table(("command", "time"), rows, total=total, kind="commands")


def _sample(sample: Sample) -> str:
    def column(label: str, continuation: str) -> str:
        text = f"<mark>{escape(sample.prompt)}</mark>{escape(continuation)}"
        return f"<figure><figcaption>{label}</figcaption><pre>{text}</pre></figure>"

    return f'<div class="sample">{column("before", sample.before)}{column("after", sample.after)}</div>'


STYLE = """
.card.domain { border-color: var(--blue); }
.card.general { border-color: var(--orange); }
.commands tbody td:first-child { font: .8rem/1.5 ui-monospace, monospace; }
.commands tbody td:first-child { white-space: pre-wrap; overflow-wrap: anywhere; }
.commands td { vertical-align: top; }
.sample { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; margin-bottom: 1rem; }
figure pre { flex: 1; }
mark { background: none; color: var(--blue); font-weight: 600; }
@media print { .sample { grid-template-columns: 1fr 1fr; } }
"""
