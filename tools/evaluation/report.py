"""Format the result of an evaluation for the terminal and as a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ...engine.observe.loss_changes import LossChange
from ..reports.charts import WIDE, bar_chart, signed
from ..reports.page import bullets, definitions, header, note, page, section, table
from ..reports.text import table_lines, visible
from .scores import DocumentScore, EvaluationResult, ModelScore, SetChange, SetScore, TaskScore

Table = tuple[Sequence[str], Sequence[tuple[str, ...]]]
_SHOWN = 60
"""Characters of a document's beginning in the terminal."""
_DIFFERENT = (
    "The two models have different tokenizers: losses and perplexities per token cannot be compared, bits per byte can."
)


def describe_set(score: SetScore) -> str:
    """Return a line about a set that has been scored."""
    return (
        f"  {score.name}: loss {score.loss:.4f}, perplexity {score.perplexity:.2f}, bits per byte {_bits(score)}, "
        f"{score.targets:,} targets"
    )


def format_result(result: EvaluationResult) -> str:
    """Return the tables for the terminal."""
    sides = _sides(result)
    sections = [
        *(_titled(f"{_role(result, one)}{one.model}", _lines(set_table(one))) for one in sides),
        [*_lines(change_table(result)), *([_DIFFERENT] if not result.same_tokenizer else [])],
        *(
            _titled(f"{one.name}: documents with the {kind} loss", _lines(document_table(found, _SHOWN)))
            for one in result.model.sets
            for kind, found in (("highest", one.highest), ("lowest", one.lowest))
        ),
        _titled("lm-evaluation-harness", _lines(task_table(result))),
        [f"! {visible(line)}" for line in _notes(result)],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def result_page(result: EvaluationResult) -> str:
    """Return the page."""
    title = f"Evaluation of {result.model.model}"
    sides = _sides(result)
    facts = {key: str(value) for key, value in result.settings.items() if value is not None}
    sections = [
        header(title, _cards(result)),
        section("Remarks", bullets(_notes(result)), kind="warnings"),
        section("Learned and forgotten", _changes(result)),
        *(
            section(f"{_role(result, one).capitalize() or 'Results: '}{one.model}", table(*set_table(one)))
            for one in sides
        ),
        section("Definitions", definitions(_DEFINITIONS)),
        *(section(f"Documents of {one.name}", _documents(one)) for one in result.model.sets),
        section("lm-evaluation-harness", table(*task_table(result))),
        *(
            section(f"How it was computed: {one.model}", definitions(one.facts | facts), kind="facts")
            for one in sides
            if one.facts
        ),
    ]
    return page(title, sections)


_DEFINITIONS = {
    "loss": "mean nats per scored token",
    "perplexity": "exponential of the loss",
    "bits per byte": "bits of the scored tokens with text, divided by the UTF-8 bytes of their text",
    "targets": "scored tokens",
}


# ----------------------------------------------------------------------------------------------------------------------
# Tables for the page and the terminal


def set_table(score: ModelScore) -> Table:
    """Return the results of a model."""
    head = ("set", "loss", "perplexity", "bits per byte", "documents", "tokens", "targets", "bytes")
    rows = [
        (
            *(one.name, f"{one.loss:.4f}", f"{one.perplexity:.2f}", _bits(one)),
            *(f"{number:,}" for number in (one.documents, one.tokens, one.targets)),
            "" if one.text_bytes is None else f"{one.text_bytes:,}",
        )
        for one in score.sets
    ]
    return head, rows


def change_table(result: EvaluationResult) -> Table:
    """Return the results before (baseline) and after (model)."""
    head = ("set", "loss before", "after", "change", "%", "bits per byte before", "after", "change", "%", "")
    rows = [(one.name, *_change_cells(one, result), *_cells(one.bits_per_byte), one.verdict) for one in result.changes]
    return head, rows


def _change_cells(change: SetChange, result: EvaluationResult) -> tuple[str, ...]:
    if change.loss is not None:
        return _cells(change.loss)
    return f"{change.before.loss:.4f}", f"{change.after.loss:.4f}", "", ""


def _cells(change: LossChange | None) -> tuple[str, ...]:
    if change is None:
        return ("",) * 4
    return f"{change.before:.4f}", f"{change.after:.4f}", f"{change.change:+.4f}", f"{change.percent:+.1f} %"


def document_table(found: Sequence[DocumentScore], characters: int) -> Table:
    """Return documents with extreme losses."""
    head = ("beginning", "document", "tokens", "loss", "bits per byte")
    rows = [
        (
            " ".join(one.beginning.split())[:characters],
            *(f"{one.index:,}", f"{one.tokens:,}", f"{one.loss:.4f}"),
            "" if one.bits_per_byte is None else f"{one.bits_per_byte:.4f}",
        )
        for one in found
    ]
    return head, rows


def task_table(result: EvaluationResult) -> Table:
    """Return the results of lm-evaluation-harness, before and after."""
    before = {} if result.baseline is None else {(one.task, one.metric): one for one in result.baseline.tasks}
    if result.baseline is None:
        return ("task", "metric", "value", "+-", "samples"), [
            (one.task, one.metric, *_task_cells(one), _samples(one)) for one in result.model.tasks
        ]
    rows = []
    for one in result.model.tasks:
        former = before.get((one.task, one.metric))
        change = "" if former is None else f"{one.value - former.value:+.4f}"
        cells = ("", "") if former is None else _task_cells(former)
        rows.append((one.task, one.metric, *cells, *_task_cells(one), change, _samples(one)))
    return ("task", "metric", "before", "+-", "after", "+-", "change", "samples"), rows


def _task_cells(score: TaskScore) -> tuple[str, str]:
    return f"{score.value:.4f}", "" if score.stderr is None else f"{score.stderr:.4f}"


def _samples(score: TaskScore) -> str:
    return "" if score.samples is None else f"{score.samples:,}"


def _bits(score: SetScore) -> str:
    return "unknown" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"


def _sides(result: EvaluationResult) -> list[ModelScore]:
    """Return the baseline, if there is one, and the model."""
    return [*filter(None, [result.baseline]), result.model]


def _role(result: EvaluationResult, score: ModelScore) -> str:
    if result.baseline is None:
        return ""
    return "after: " if score is result.model else "before: "


def _notes(result: EvaluationResult) -> list[str]:
    sides = _sides(result)
    return [f"{one.model}: {line}" for one in sides for line in one.notes]


def _titled(title: str, lines: list[str]) -> list[str]:
    return [visible(title), *lines] if lines else []


def _lines(content: Table) -> list[str]:
    return list(table_lines(*content)) if content[1] else []


# ----------------------------------------------------------------------------------------------------------------------
# The page


def _cards(result: EvaluationResult) -> Iterator[tuple[str, str, str]]:
    for change in result.changes:
        difference = change.comparable
        if difference is None:
            continue
        unit = "nats per token" if change.loss is not None else "bits per byte"
        color = {"learned": "green", "forgotten": "red"}.get(change.verdict, "grey")
        figures = f"{difference.before:.3f} \u2192 {difference.after:.3f}"
        yield color, figures, f"{change.name}: {change.verdict}, {difference.percent:+.1f} % ({unit})"
    if result.baseline is None:
        for one in result.model.sets:
            yield "blue", f"{one.loss:.3f}", f"{one.name}: nats per token; {_bits(one)} bits per byte"


def _changes(result: EvaluationResult) -> str:
    found = {one.name: one.comparable for one in result.changes}
    if not any(found.values()):
        return ""
    # Bars have no place for a loss that is not a number.
    changes = {name: one.percent for name, one in found.items() if one is not None and math.isfinite(one.percent)}
    unit = "loss" if result.same_tokenizer else "bits per byte"
    title = f"Change of {unit} in percent"
    values = {"change": list(changes.values())}
    chart = bar_chart(title, list(changes), values, "", WIDE, write=signed) if changes else ""
    words = f"Forgotten: a higher {unit} than before. Learned: a lower one."
    told = note(words if result.same_tokenizer else f"{words} {_DIFFERENT}")
    return table(*change_table(result)) + told + chart


def _documents(score: SetScore) -> str:
    return "".join(
        note(f"{kind} loss") + table(*document_table(found, 200), kind="wrapped")
        for kind, found in (("Highest", score.highest), ("Lowest", score.lowest))
        if found
    )
