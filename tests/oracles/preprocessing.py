"""What tests of the preprocess command share: made-up corpora, the ids that they must give, a run in this process."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from retemper.engine.data.sidecar import Sidecar
from retemper.tools.preprocessing.options import PreprocessOptions
from retemper.tools.preprocessing.pipeline import PreprocessReport, preprocess

GOOD = b'{"text": "fine"}\n'


def jsonl(texts: list[str], **keys: object) -> bytes:
    """A line of JSONL for each of ``texts``, with ``keys`` besides."""
    return b"".join(json.dumps({**keys, "text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def plain_ids(folder: Path, texts: list[str], end: list[int] | None = None) -> list[list[list[int]]]:
    """What the dataset must hold: for each text one document of one sequence, encoded by plain ``tokenizers``."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return [[tokenizer.encode(text, add_special_tokens=False).ids + ([0] if end is None else end)] for text in texts]


def report(tokenizer: Path, folder: Path, *inputs: Path | str, **options: object) -> PreprocessReport:
    """Preprocess to ``folder``/out. By default as a large input: in worker processes, with the fast tokenizer."""
    settings = {"workers": 1, "encoder": "fast", "output_prefix": str(folder / "out"), **options}
    paths = [str(path) for path in inputs]
    return preprocess(PreprocessOptions(paths, str(tokenizer), **settings))  # type: ignore[arg-type]


def run(tokenizer: Path, folder: Path, *inputs: Path | str, **options: object) -> Sidecar:
    """The same; the one dataset's sidecar."""
    (sidecar,) = report(tokenizer, folder, *inputs, **options).sidecars.values()
    return sidecar
