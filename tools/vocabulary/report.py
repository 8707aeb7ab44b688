"""Report the gain from new tokens: a table, ``vocabulary.json``, and a page with the gain by number of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..reports.charts import Axis, ChartLine, line_chart
from ..reports.page import header, page, section, table
from .vocabulary import NewToken

REPORT_FILE, PAGE_FILE = "vocabulary.json", "vocabulary.html"
_SHOWN = 20


@dataclass(frozen=True)
class TextSize:
    """The size of a text in tokens."""

    characters: int
    bytes: int
    """Number of bytes in UTF-8."""
    tokens: int

    @property
    def tokens_per_character(self) -> float:
        """Return tokens per character; less is better."""
        return self.tokens / max(1, self.characters)

    @property
    def bytes_per_token(self) -> float:
        """Return bytes per token; more is better."""
        return self.bytes / max(1, self.tokens)


@dataclass(frozen=True)
class Gain:
    """The same text with the old and the new tokenizer."""

    text: str
    """Description of the text."""
    documents: int
    before: TextSize
    after: TextSize

    @property
    def fewer_tokens(self) -> float:
        """Return the fraction of tokens saved."""
        return 1 - self.after.tokens / max(1, self.before.tokens)


def format_gain(gain: Gain) -> str:
    """Return a table for the console."""
    rows = [
        ("", "before", "after"),
        ("tokens", f"{gain.before.tokens:,}", f"{gain.after.tokens:,}"),
        ("tokens per character", f"{gain.before.tokens_per_character:.4f}", f"{gain.after.tokens_per_character:.4f}"),
        ("bytes per token", f"{gain.before.bytes_per_token:.3f}", f"{gain.after.bytes_per_token:.3f}"),
    ]
    title = f"{gain.text}: {gain.documents:,} documents, {gain.before.characters:,} characters"
    lines = [f"{name:<22}{before:>14}{after:>14}" for name, before, after in rows]
    return "\n".join([title, *lines, f"{'fewer tokens':<22}{'':>14}{gain.fewer_tokens:>14.1%}"])


def format_tokens(tokens: Sequence[NewToken], texts_of: dict[int, str]) -> str:
    """Return the first new tokens with their parts."""
    lines = [
        f"  {token.id:>8}  {token.text!r:<28} {' + '.join(repr(texts_of.get(part, '?')) for part in token.subtokens)}"
        for token in tokens[:_SHOWN]
    ]
    more = [f"  and {len(tokens) - _SHOWN:,} more, in {REPORT_FILE}"] if len(tokens) > _SHOWN else []
    return "\n".join(["new tokens", *lines, *more])


def write_report(
    folder: Path, facts: dict[str, Any], tokens: Sequence[NewToken], gain: Gain | None, curve: Sequence[int]
) -> None:
    """Write ``vocabulary.json``."""
    content = {
        **facts,
        "gain": None
        if gain is None
        else {
            "text": gain.text,
            "documents": gain.documents,
            **{
                when: {
                    **asdict(measure),
                    "tokens_per_character": measure.tokens_per_character,
                    "bytes_per_token": measure.bytes_per_token,
                }
                for when, measure in (("before", gain.before), ("after", gain.after))
            },
            "fewer_tokens": gain.fewer_tokens,
        },
        "held_out_tokens_by_number_of_new_tokens": list(curve),
        "tokens": [{**asdict(token), "subtokens": list(token.subtokens)} for token in tokens],
    }
    (folder / REPORT_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_page(folder: Path, title: str, gain: Gain, curve: Sequence[int], tokens: Sequence[NewToken]) -> None:
    """Write the page with the curve of saved tokens and the first new tokens into ``folder``."""
    saved = [100 * (1 - total / max(1, curve[0])) for total in curve]
    chart = line_chart(
        f"What the first n new tokens save on the {gain.text}: fewer tokens, %",
        [ChartLine("", list(enumerate(saved)))],
        Axis("new tokens", start=0),
        Axis(start=0),
    )
    numbers = sorted({round((len(curve) - 1) * part / 10) for part in range(11)})
    steps = table(
        ("new tokens", "tokens", "tokens per character", "fewer tokens"),
        [
            (f"{n:,}", f"{curve[n]:,}", f"{curve[n] / max(1, gain.before.characters):.4f}", f"{saved[n]:.1f} %")
            for n in numbers
        ],
    )
    first = table(
        ("token", "id", "kind", "times"),
        [(repr(token.text), str(token.id), token.kind, f"{token.count:,}") for token in tokens[:100]],
    )
    sections = [header(title, ()), chart, section("Number of new tokens", steps), section("First new tokens", first)]
    (folder / PAGE_FILE).write_text(page(title, sections), encoding="utf-8")
