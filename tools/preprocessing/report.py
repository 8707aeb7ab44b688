"""The table that the preprocess command prints at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...engine.data.sidecar import Sidecar
from .pipeline import PreprocessReport
from .workers.task_output import DROPPED_TURNS, KEPT_NOTE


def counts_record(sidecars: Mapping[str, Sidecar]) -> dict[str, Any]:
    """Return the prefixes and counts of datasets for a file in JSON."""
    keys = ("documents", "tokens", "characters", "text_bytes", "left_out")
    found = []
    for prefix, sidecar in sidecars.items():
        total: Counter[str] = Counter()
        for source in sidecar.sources:
            total.update(source.left_out)
        values = (sidecar.documents, sidecar.tokens, sidecar.characters, sidecar.text_bytes, dict(total))
        found.append({"prefix": prefix, **dict(zip(keys, values, strict=True))})
    return {"datasets": found}


def format_report(report: PreprocessReport) -> str:
    """Return the table: one line per fact, and what was left out by reason."""
    rows: dict[str, str] = {}
    for prefix, sidecar in report.sidecars.items():
        name = f"{prefix}: " if len(report.sidecars) > 1 else ""
        rows[f"{name}documents"] = f"{sidecar.documents:,}"
        if not sidecar.text_xxh3_128:
            rows[f"{name}tokens"] = f"{sidecar.tokens:,} ({sidecar.dtype})"
    sidecars = list(report.sidecars.values())
    text_bytes, tokens = (sum(getattr(sidecar, name) for sidecar in sidecars) for name in ("text_bytes", "tokens"))
    first = sidecars[0]
    rows["characters"] = f"{sum(sidecar.characters for sidecar in sidecars):,}"
    if not first.text_xxh3_128:
        rows |= _token_rows(report, first, text_bytes / max(tokens, 1))
    # Every side of a split records what the whole run left out.
    left_out = Counter(first.left_out)
    turns = left_out.pop(DROPPED_TURNS, 0)
    notes = {reason: left_out.pop(reason) for reason in sorted(left_out) if reason.startswith(KEPT_NOTE)}
    rows["left out"] = f"{sum(left_out.values()):,}"
    for reason, count in sorted(left_out.items()):
        rows[f"  {reason}"] = f"{count:,}"
    if first.changed:
        rows["changed"] = "documents that these options changed, and did not leave out"
        rows.update({f"  {option}": f"{count:,}" for option, count in sorted(first.changed.items())})
    if turns:
        rows[DROPPED_TURNS] = f"{turns:,}, cut from conversations that were kept"
    if notes:
        rows["kept without"] = "these parts are not trained on"
        rows.update({f"  {reason.removeprefix(KEPT_NOTE)}": f"{count:,}" for reason, count in notes.items()})
    if report.first_bad:
        rows["first malformed"] = report.first_bad
    speed = f"{tokens / report.seconds:,.0f} tokens/s, " if tokens else ""
    rows["speed"] = f"{text_bytes / 1e6 / report.seconds:,.1f} MB of text/s, {speed}{report.seconds:,.1f} s"
    rows["files"] = " ".join(report.files)
    width = max(len(name) for name in rows if not name.startswith("  ")) + 1
    table = "\n".join(f"{name:<{width}} {value}" for name, value in rows.items())
    return f"{table}\n\n{report.mixture}" if report.mixture else table


def _token_rows(report: PreprocessReport, sidecar: Sidecar, bytes_per_token: float) -> dict[str, str]:
    bos = f"{sidecar.bos_token} ({' '.join(map(str, sidecar.bos_ids))})" if sidecar.bos_ids else "no BOS"
    return {
        "bytes per token": f"{bytes_per_token:.2f}",
        "encoder": report.encoder,
        "document begin": bos,
        "document end": f"{sidecar.eod_token} ({sidecar.eod_id})" if sidecar.append_eod else "none appended",
    }
