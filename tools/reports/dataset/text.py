"""Format a dataset's report for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from ..text import fact_lines, table_lines, visible
from .decoding import DecodedDocument
from .facts import RUN_HEAD, SOURCE_HEAD, dataset_facts, run_facts, run_rows, source_rows, stage_table
from .lengths import LengthFacts
from .report import DatasetReport

_BAR_WIDTH = 30
_FREQUENT = 15
MASK_BEGINS, MASK_ENDS = "⟦", "⟧"
"""Brackets around text that the loss mask excludes."""


def format_report(report: DatasetReport) -> str:
    """Return the report as text."""
    return "\n\n".join("\n".join(section) for section in _sections(report))


def format_document(decoded: DecodedDocument, has_mask: bool) -> str:
    """Return a document's text between two lines that mark its beginning and end."""
    parts = "" if decoded.sequences < 2 else f", {decoded.sequences:,} sequences"
    masked = f", {MASK_BEGINS}not trained on{MASK_ENDS}" if has_mask else ""
    head = f"--- document {decoded.document}, {decoded.tokens:,} tokens{parts}{masked} ---"
    if decoded.problem:
        return f"{head}\n{visible(decoded.problem)}"
    text, outside = [], False
    for piece in decoded.pieces:
        if outside == piece.trained:
            text.append(MASK_ENDS if outside else MASK_BEGINS)
            outside = not outside
        text.append(visible(piece.text))
    return "\n".join([head, "".join([*text, MASK_ENDS if outside else ""]), f"--- {describe_end(decoded)} ---"])


def describe_end(decoded: DecodedDocument) -> str:
    """Describe how the text of a document ends."""
    if decoded.shown < decoded.tokens:
        return f"cut here: {decoded.tokens - decoded.shown:,} more tokens"
    without = ", without the token that ends documents" if decoded.ends_with_eod is False else ""
    return f"end of document {decoded.document}{without}"


def _sections(report: DatasetReport) -> Iterator[list[str]]:
    yield fact_lines({"dataset": report.prefix, **dataset_facts(report)})
    if report.warnings:
        yield [f"! {warning}" for warning in report.warnings]
    if report.sources:
        yield list(table_lines(SOURCE_HEAD, source_rows(report)))
    if report.lengths is not None:
        yield list(_histogram(report.lengths))
    if report.most_frequent:
        sample = " in a sample" if report.counts.tokens.sampled else ""
        yield list(table_lines(("most frequent", "id", f"share{sample}"), _frequent(report)))
    if report.training is not None:
        head, rows = stage_table(report.training)
        yield fact_lines(run_facts(report.training))
        yield list(table_lines(RUN_HEAD, run_rows(report.training)))
        if rows:
            yield list(table_lines(head, rows))
        yield ["the trainer will log:", *(f"  {line}" for line in report.training.summary)]
    for decoded in report.decoded:
        yield [format_document(decoded, report.has_loss_mask)]
    if report.missing:
        yield ["not shown:", *(f"- {line}" for line in report.missing)]


def _frequent(report: DatasetReport) -> list[tuple[str, ...]]:
    return [(quote(token.text), f"{token.id}", f"{token.share:.2%}") for token in report.most_frequent[:_FREQUENT]]


def quote(text: str | None) -> str:
    """Return a token's text with visible spaces."""
    return "" if text is None else repr(text)


def _histogram(lengths: LengthFacts) -> Iterator[str]:
    most = max(bin_.documents for bin_ in lengths.histogram)
    sample = "  (of a sample)" if lengths.sampled else ""
    yield f"{'tokens in a document':>30} {'documents':>14} {'tokens':>17}{sample}"
    for bin_ in lengths.histogram:
        bar = "#" * -(-bin_.documents * _BAR_WIDTH // most)
        row = f"{bin_.first:>13,} .. {bin_.last:>13,} {bin_.documents:>14,} {bin_.tokens:>17,} {bar}"
        yield row.rstrip()
