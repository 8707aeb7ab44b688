"""Write a dataset's report as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ....engine.files.outputs import write_report
from ..page import bullets, definitions, escape, header, note, page, preformatted, section, table
from .decoding import DecodedDocument
from .facts import RUN_HEAD, SOURCE_HEAD, dataset_facts, run_facts, run_rows, source_rows, stage_table
from .plots import draw_epochs, draw_frequencies, draw_lengths
from .report import DatasetReport
from .text import describe_end, quote


def write_page(path: Path, report: DatasetReport) -> None:
    """Write the page.

    Raises:
        UserError: the file cannot be written.
    """
    write_report("--html", path, page(f"Dataset {Path(report.prefix).name}", _sections(report), STYLE))


def _sections(report: DatasetReport) -> Iterator[str]:
    yield _header(report)
    yield section("Likely problems", bullets(report.warnings), kind="warnings")
    yield section("The dataset", definitions({"dataset": report.prefix, **dataset_facts(report)}), kind="facts")
    total = ("all sources", "", f"{report.documents:,}", f"{report.tokens:,}", "", "", "")
    yield section("Sources", table(SOURCE_HEAD, source_rows(report), total=total, kind="wrapped"))
    if report.lengths is not None:
        length = None if report.training is None else report.training.sequence_length
        remark = note(f"From a sample of {report.lengths.documents:,} documents.") if report.lengths.sampled else ""
        yield section("Lengths of documents", draw_lengths(report.lengths, length) + remark)
    if report.most_frequent:
        yield section("Tokens", draw_frequencies(report.counts.tokens) + _frequent(report))
    if report.training is not None:
        yield section(
            "The run",
            draw_epochs(report.training)
            + definitions(run_facts(report.training))
            + table(RUN_HEAD, run_rows(report.training))
            + table(*stage_table(report.training))
            + note("What the trainer will log about the data:")
            + preformatted("\n".join(report.training.summary)),
            kind="facts",
        )
    if report.decoded:
        legend = "Random documents. Every other token is shaded."
        if report.has_loss_mask:
            legend += " Tokens that the loss mask excludes are struck through."
        yield section("Documents", note(legend) + "".join(map(_document, report.decoded)), kind="documents")
    yield section("Not shown", bullets(report.missing))


def _header(report: DatasetReport) -> str:
    ratio = "" if report.bytes_per_token is None else f"{report.bytes_per_token:.2f} bytes of text each"
    mean = "" if report.lengths is None else f"{report.lengths.mean:,.0f} tokens each"
    cards = [("blue", f"{report.tokens:,} tokens", ratio), ("orange", f"{report.documents:,} documents", mean)]
    if report.counts.duplicates is not None:
        facts = report.counts.duplicates
        about = "about " if facts.part < 1 else ""
        cards.append(("grey", f"{about}{facts.share:.2%} copies", f"{facts.token_share:.2%} of the tokens"))
    if report.training is not None:
        here = next((source for source in report.training.sources if source.is_this), None)
        epochs = "" if here is None else f"{here.epochs:.3g} epochs of this dataset"
        cards.append(("grey", f"{report.training.steps:,} steps", epochs))
    return header(f"Dataset {Path(report.prefix).name}", cards)


def _frequent(report: DatasetReport) -> str:
    largest = report.most_frequent[0].share
    rows = "".join(
        f"<tr><td><code>{escape(quote(token.text))}</code></td><td>{token.id}</td><td>{token.count:,}</td>"
        f'<td>{token.share:.2%}</td><td class="bar"><i style="width:{100 * token.share / largest:.1f}%"></i></td></tr>'
        for token in report.most_frequent
    )
    head = "".join(f"<th>{name}</th>" for name in ("most frequent", "id", "times", "share", ""))
    sampled = report.counts.tokens.sampled
    remark = note(f"From a sample of {report.counts.tokens.tokens:,} tokens.") if sampled else ""
    return f'<div class="scroll"><table class="frequent"><thead><tr>{head}</tr></thead>{rows}</table></div>{remark}'


def _document(decoded: DecodedDocument) -> str:
    parts = "" if decoded.sequences < 2 else f", {decoded.sequences:,} sequences"
    caption = f"document {decoded.document}, {decoded.tokens:,} tokens{parts}"
    if decoded.problem:
        return f"<figure><figcaption>{caption}</figcaption><pre>{escape(decoded.problem)}</pre></figure>"
    text = "".join(
        f'<span class="{"even" if number % 2 else "odd"}{"" if piece.trained else " masked"}" '
        f'title="{" ".join(map(str, piece.tokens))}">{escape(piece.text)}</span>'
        for number, piece in enumerate(decoded.pieces)
    )
    # HTML ignores a line break right after <pre>.
    return (
        f"<figure><figcaption>{caption}</figcaption><pre>\n{text}</pre>"
        f"<figcaption>{describe_end(decoded)}</figcaption></figure>"
    )


STYLE = """
.frequent code { font: .8rem/1.5 ui-monospace, monospace; white-space: pre; }
.frequent td { padding-top: .1rem; padding-bottom: .1rem; }
.bar { width: 40%; }
.bar i { display: block; height: .7rem; background: var(--blue); }
.documents figure { margin-top: 1rem; }
.documents figcaption { margin-top: .25rem; }
.documents .even { background: color-mix(in srgb, var(--blue) 14%, transparent); }
.documents .masked { color: var(--faint); text-decoration: line-through; }
"""
