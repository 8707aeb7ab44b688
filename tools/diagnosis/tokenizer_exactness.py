"""Check that a tokenizer is exact: the fast encoder, and transformers when the model is served."""

from __future__ import annotations

from ...engine.tokenizer.probes import EDGES, PROBES
from ..tokenizer.handle import TokenizerHandle, load_tokenizer
from .finding import Finding, note, ok

GROUP = "Tokenizer"


def check_tokenizer(name: str) -> list[Finding]:
    """Return findings on the tokenizer ``name``, a folder, a file or a name on the Hub.

    Raises:
        UserError: it cannot be loaded.
    """
    handle = load_tokenizer(name)
    facts = f"{handle.kind} with {handle.vocab_size:,} ids in {handle.file}"
    findings = [ok(GROUP, "file", facts), *(note(GROUP, "file", line.removeprefix("note: ")) for line in handle.notes)]
    if handle.fallback_reason is not None:
        findings.append(note(GROUP, "fast encoder", f"not used: {handle.fallback_reason}; the ids are the same"))
    else:
        findings.append(_fast(handle))
    served = handle.serving_note()
    if served is None:
        findings.append(ok(GROUP, "serving", "AutoTokenizer of transformers gives the same ids"))
    else:
        findings.append(note(GROUP, "serving", served))
    return findings


def _fast(handle: TokenizerHandle) -> Finding:
    texts, encoder = [*EDGES, *PROBES], handle.encoder
    difference = handle.check_fast_path(texts)
    if difference is None:
        return ok(GROUP, "fast encoder", f"{encoder} gives the ids of the reference on {len(texts)} texts")
    return note(GROUP, "fast encoder", f"{difference}; preprocess finds this as well, and uses the reference")
