"""A sidecar with a value in every field."""

from __future__ import annotations

from retemper.engine.data.sidecar import InputSource, Sidecar

SIDECAR = Sidecar(
    tokenizer="acme/tiny",
    tokenizer_sha256="ab" * 32,
    vocab_size=400,
    append_eod=True,
    eod_token="<|endoftext|>",
    eod_id=0,
    sources=(InputSource("天/*.jsonl", 2, 100, 2, 3, 9, 11, {"no token": 1}),),
    options={"dedup": "exact"},
)
