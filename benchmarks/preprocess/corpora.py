"""Make the corpora of the benchmark: the user's documents, copies of them, their beginning, and a very long
document.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import orjson

from ...engine.errors import UserError


class BenchmarkCorpus(NamedTuple):
    """A JSONL file and its size."""

    path: Path
    documents: int
    text_bytes: int
    """Size of the documents' text in UTF-8."""


def read_texts(path: Path, key: str) -> Iterator[str]:
    """Yield the text of each line.

    Raises:
        UserError: the file cannot be read, or a line has no text: the benchmark needs a corpus without errors.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    text = orjson.loads(line)[key]
                except (orjson.JSONDecodeError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise UserError(f"{path}:{number}: not a JSON object with a string under {key!r}; see --json-key")
                yield text
    except OSError as error:
        raise UserError(f"--input {path}: {error.strerror}; name one plain .jsonl file") from error


def describe(path: Path, key: str) -> BenchmarkCorpus:
    """Count documents and bytes of text.

    Raises:
        UserError: as :func:`read_texts`, or there is no text.
    """
    documents = size = 0
    for text in read_texts(path, key):
        documents += 1
        size += len(text.encode())
    if size == 0:
        raise UserError(f"--input {path}: no text; name a file that has some")
    return BenchmarkCorpus(path, documents, size)


def repeated(corpus: BenchmarkCorpus, times: int, folder: Path) -> BenchmarkCorpus:
    """Return ``corpus`` written ``times`` times in a row; ``corpus`` itself for once."""
    if times == 1:
        return corpus
    path = folder / f"{times}x-{corpus.path.name}"
    with open(path, "wb") as copy:
        for _ in range(times):
            with open(corpus.path, "rb") as file:
                shutil.copyfileobj(file, copy, 8 << 20)
            if not _ends_with_newline(corpus.path):
                copy.write(b"\n")
    return BenchmarkCorpus(path, times * corpus.documents, times * corpus.text_bytes)


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def beginning(corpus: BenchmarkCorpus, key: str, text_bytes: float, folder: Path) -> BenchmarkCorpus:
    """Return the first documents of ``corpus``, up to the one that reaches ``text_bytes``; itself if that is all of
    it.
    """
    if text_bytes >= corpus.text_bytes:
        return corpus
    path = folder / f"first-{text_bytes:.0f}-{corpus.path.name}"
    documents = size = 0
    with open(corpus.path, "rb") as file, open(path, "wb") as copy:
        for line in file:
            if line.isspace():
                continue
            copy.write(line)
            documents += 1
            size += len(orjson.loads(line)[key].encode())
            if size >= text_bytes:
                break
    return BenchmarkCorpus(path, documents, size)


def write_long_document(path: Path, key: str, size: int) -> BenchmarkCorpus:
    """Write one line with a text of about ``size`` bytes: with escapes, CJK and emoji, spaces and line ends."""
    draw = random.Random(0)
    blocks = [_block(draw) for _ in range(8)]
    text_bytes = 0
    with open(path, "wb") as file:
        file.write(b'{"id": 1, ' + json.dumps(key).encode() + b': "')
        while text_bytes < size:
            block_bytes, block = draw.choice(blocks)
            file.write(block)
            text_bytes += block_bytes
        file.write(b'", "end": true}\n')
    return BenchmarkCorpus(path, 1, text_bytes)


_SENTENCE = "rain fell over old stone roofs and nobody saw naïve Straße éa 天色如洗 万里无云 🙂 👩\u200d👩\u200d👧"
_WORDS = _SENTENCE.split()


def _block(draw: random.Random) -> tuple[int, bytes]:
    """Return the UTF-8 size of a text of about 100 kB, and its form between the quotes of a JSON string.

    One half has every character beyond ASCII escaped, as some writers do, including surrogate pairs.
    """
    words = [*_WORDS, '"', "\\", "\t", "\n"]
    text = " ".join("".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(4_000)) + "\n"
    escaped = json.dumps(text)[1:-1]
    plain = json.dumps(text, ensure_ascii=False)[1:-1]
    return 2 * len(text.encode()), (plain + escaped).encode()


def write_documents(path: Path, key: str, size: int) -> BenchmarkCorpus:
    """Write documents of mixed lengths, 1 to some 10,000 words, until there are about ``size`` bytes of them."""
    draw = random.Random(1)
    texts = [" ".join(draw.choices(_WORDS, k=int(draw.lognormvariate(5, 1.5)) + 1)) for _ in range(500)]
    content = "".join(json.dumps({key: text}, ensure_ascii=False) + "\n" for text in texts).encode()
    times = max(1, size // len(content))
    with open(path, "wb") as file:
        for _ in range(times):
            file.write(content)
    return BenchmarkCorpus(path, times * len(texts), times * sum(len(text.encode()) for text in texts))
