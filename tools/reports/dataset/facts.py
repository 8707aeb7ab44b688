"""Format a report as names and values, for the terminal and the page. Estimates are marked as such."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....engine.files.disk_space import format_bytes
from .decoding import TextFacts
from .duplicates import DuplicateFacts
from .lengths import LengthFacts
from .report import DatasetReport
from .token_counts import MaskFacts, TokenFacts

if TYPE_CHECKING:
    from .training_plan import TrainingPlan

SOURCE_HEAD = ("source", "files", "documents", "tokens", "share", "bytes per token", "left out")
RUN_HEAD = ("source", "tokens", "chunks", "samples", "epochs", "cap reached after")
_REPEATED = 3


def dataset_facts(report: DatasetReport) -> dict[str, str]:
    """Return facts about the dataset and its tokens."""
    facts = {
        "documents": _documents(report),
        "tokens": f"{report.tokens:,}",
        "files": f"{format_bytes(report.bytes)}, tokens as {report.dtype}",
        "tokenizer": _tokenizer(report),
        "document begin": _document_begin(report),
        "document end": _document_end(report),
        "bytes per token": _bytes_per_token(report),
    }
    if report.lengths is not None:
        facts |= length_facts(report.lengths)
    facts |= token_facts(report.counts.tokens)
    if report.tokenizer is not None:
        facts.setdefault("unknown share", "0: the tokenizer has no unknown token")
    if report.counts.duplicates is not None:
        facts["duplicates"] = duplicates(report.counts.duplicates)
        facts["most repeated"] = most_repeated(report.counts.duplicates)
    if report.text is not None and report.text.documents:
        facts["replacement share"] = _replacement(report.text)
    facts["loss mask"] = "none: every token is a target" if report.counts.mask is None else mask(report.counts.mask)
    if report.sidecar is not None and report.sidecar.options:
        facts["made with options"] = ", ".join(f"{name} {value}" for name, value in report.sidecar.options.items())
    return {name: value for name, value in facts.items() if value}


def length_facts(lengths: LengthFacts) -> dict[str, str]:
    """Return mean and percentiles of the document lengths."""
    about = f" (estimated from {lengths.documents:,} documents)" if lengths.sampled else ""
    least = "at least " if lengths.sampled else ""
    percentiles = ", ".join(f"{percent}%: {value:,.0f}" for percent, value in lengths.percentiles.items())
    return {
        "tokens in a document": f"mean {lengths.mean:,.1f}, longest {least}{lengths.longest:,}",
        "percentiles": f"{percentiles}{about}",
    }


def token_facts(tokens: TokenFacts) -> dict[str, str]:
    """Return how much of the vocabulary is used."""
    about = f" (estimated from {tokens.tokens:,} tokens)" if tokens.sampled else ""
    least = "at least " if tokens.sampled else ""
    of_all = "" if tokens.vocab_size is None else f" of {tokens.vocab_size:,}"
    facts = {"ids used": f"{least}{tokens.used_ids:,}{of_all}"}
    if tokens.unknown is not None:
        error = f" ± {tokens.unknown_error:.2%}" if tokens.sampled else ""
        facts["unknown share"] = f"{_share(tokens.unknown, tokens.tokens)}{error} of the tokens{about}"
    return facts


def duplicates(facts: DuplicateFacts) -> str:
    """Describe the exact copies among the documents."""
    if facts.part < 1:
        return (
            f"about {facts.share:.2%} ± {facts.share_error:.2%} of the documents are exact copies of others, with "
            f"{facts.token_share:.2%} ± {facts.token_share_error:.2%} of the tokens (estimated from the documents "
            f"whose hashes fall into 1/{round(1 / facts.part)} of all)"
        )
    are = "document is an exact copy of another" if facts.copies == 1 else "documents are exact copies of others"
    shares = f": {facts.share:.2%} of the documents, {facts.token_share:.2%} of the tokens" if facts.copies else ""
    return f"{facts.copies:,} {are}{shares}"


def most_repeated(facts: DuplicateFacts) -> str:
    """Describe the most repeated documents; empty if every document is unique."""
    shown = facts.most_repeated[:_REPEATED]
    return ", ".join(f"document {one.document} of {one.tokens:,} tokens {one.copies:,} times" for one in shown)


def mask(facts: MaskFacts) -> str:
    """Describe how many tokens are targets."""
    if facts.silent_documents is None:
        return f"about {facts.share:.2%} ± {facts.share_error:.2%} of the tokens are targets (estimated)"
    return f"{facts.predicted:,} tokens ({facts.share:.2%}) are targets"


def source_rows(report: DatasetReport) -> list[tuple[str, ...]]:
    """Return a row for each source; the header is :data:`SOURCE_HEAD`."""
    return [
        (
            source.name,
            f"{source.files:,}",
            f"{source.documents:,}",
            f"{source.tokens:,}",
            f"{source.tokens / max(1, report.tokens):.1%}",
            f"{source.text_bytes / source.tokens:.2f}" if source.tokens else "",
            ", ".join(f"{count:,} {reason}" for reason, count in source.left_out.items()) or "0",
        )
        for source in report.sources
    ]


def run_facts(plan: TrainingPlan) -> dict[str, str]:
    """Return the steps of a run, and how many documents its chunks cut."""
    role = {
        "train": "trains on this dataset",
        "validation": "evaluates on this dataset",
        "assumed": "does not name this dataset; the numbers are for a run on this dataset alone",
    }
    facts = {
        "configuration": f"{plan.config}, which {role[plan.role]}",
        "steps": f"{plan.steps:,} of {plan.global_batch_size:,} samples x {plan.sequence_length:,} tokens = "
        f"{plan.tokens:,} tokens",
    }
    if plan.truncation is not None:
        fitting = plan.truncation.documents - plan.truncation.longer
        about = "" if plan.truncation.exact else f" (estimated from {plan.truncation.documents:,} documents)"
        facts["documents cut"] = (
            f"{_share(plan.truncation.truncated, fitting)} of those that fit in a chunk; "
            f"{_share(plan.truncation.longer, plan.truncation.documents)} are longer than one{about}"
        )
        facts["tokens left out"] = f"{plan.truncation.tokens_dropped:,} after the last whole chunk"
    if not plan.checked_model:
        facts["model"] = "not found here: vocabulary and tokenizer were not compared with the datasets'"
    return facts


def run_rows(plan: TrainingPlan) -> list[tuple[str, ...]]:
    """Return a row for each source of the run; the header is :data:`RUN_HEAD`."""
    return [
        (
            f"{source.name} (this dataset)" if source.is_this and len(plan.sources) > 1 else source.name,
            f"{source.tokens:,}",
            f"{source.chunks:,}",
            f"{source.samples:,}",
            f"{source.epochs:.3g}",
            "" if source.capped_at_tokens is None else f"{source.capped_at_tokens:,} tokens",
        )
        for source in plan.sources
    ]


def stage_table(plan: TrainingPlan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and rows of the samples that each stage draws from each source; empty for a single stage."""
    if len(plan.stage_stops) < 2:
        return (), []
    numbers = range(1, len(plan.stage_stops) + 1)
    head = ("samples from", *(f"stage {n}, until {stop:,}" for n, stop in zip(numbers, plan.stage_stops, strict=True)))
    return head, [(source.name, *(f"{count:,}" for count in source.samples_by_stage)) for source in plan.sources]


def _documents(report: DatasetReport) -> str:
    if report.sequences <= report.filled_documents:
        return f"{report.documents:,}"
    return f"{report.documents:,} in {report.sequences:,} sequences; the trainer treats each sequence as a document"


def _tokenizer(report: DatasetReport) -> str:
    used = report.tokenizer
    if used is None:
        return f"{report.sidecar.tokenizer} (not found on this machine)" if report.sidecar is not None else "not known"
    return f"{used.name} ({used.kind}, {used.vocab_size:,} ids, sha256 {used.sha256[:12]}...)"


def _document_begin(report: DatasetReport) -> str:
    sidecar = report.sidecar
    if sidecar is None or sidecar.bos_ids is None:
        return ""
    return f"{sidecar.bos_token} ({' '.join(map(str, sidecar.bos_ids))})" if sidecar.bos_ids else "no BOS"


def _document_end(report: DatasetReport) -> str:
    ends, sidecar = report.counts.ends, report.sidecar
    if sidecar is not None and not sidecar.append_eod:
        return "no token was appended"
    named = f"{sidecar.eod_token} ({sidecar.eod_id})" if sidecar is not None else f"id {ends.eod_id}" if ends else ""
    if ends is None:
        return named
    ended = _share(ends.ended, report.filled_documents)
    return f"{named}, at the end of {ended} of the documents, {ends.inside:,} times inside"


def _bytes_per_token(report: DatasetReport) -> str:
    if report.bytes_per_token is None:
        return ""
    text = report.text
    estimated = "" if report.bytes_per_token_is_exact or text is None else f" ({_decoded(text)})"
    return f"{report.bytes_per_token:.2f}{estimated}"


def _replacement(text: TextFacts) -> str:
    where = "all documents" if text.all_documents else _decoded(text)
    return (
        f"{_share(text.replaced_tokens, text.tokens)} of the tokens are parts of U+FFFD, "
        f"{_share(text.broken_tokens, text.tokens)} of bytes that are not UTF-8 ({where})"
    )


def _decoded(text: TextFacts) -> str:
    return f"estimated from {text.documents:,} documents, {text.tokens:,} tokens"


def _share(count: int, total: int) -> str:
    """Format a share; a small share is not rounded to 0."""
    share = count / max(1, total)
    return f"{share:.2%}" if share >= 5e-5 or not count else f"{share:.1e}"
