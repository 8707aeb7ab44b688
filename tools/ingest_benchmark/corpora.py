"""The corpora of the benchmark: the documents of the user's, copies of it, its beginning, and a single long document."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import orjson

from ...engine.errors import UserError


class Corpus(NamedTuple):
    """A JSONL file and what it holds."""

    path: Path
    documents: int
    text_bytes: int
    """Of the documents' text in UTF-8."""


def read_texts(path: Path, key: str) -> Iterator[str]:
    """The text of each line.

    Raises:
        UserError: the file cannot be read, or a line has no text: a benchmark wants a corpus without faults.
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
                    raise UserError(f"{path}:{number}: no JSON object with a string under {key!r}; name it with --json-key")
                yield text
    except OSError as error:
        raise UserError(f"--input {path}: {error.strerror}") from error


def describe(path: Path, key: str) -> Corpus:
    """Count documents and bytes of text.

    Raises:
        UserError: as :func:`read_texts`, or there is no text.
    """
    documents = size = 0
    for text in read_texts(path, key):
        documents += 1
        size += len(text.encode())
    if size == 0:
        raise UserError(f"--input {path}: no text")
    return Corpus(path, documents, size)


def repeated(corpus: Corpus, times: int, folder: Path) -> Corpus:
    """``corpus`` written ``times`` times in a row; itself when that is once."""
    if times == 1:
        return corpus
    path = folder / f"{times}x-{corpus.path.name}"
    with open(path, "wb") as copy:
        for _ in range(times):
            with open(corpus.path, "rb") as file:
                shutil.copyfileobj(file, copy, 8 << 20)
            if not _ends_with_newline(corpus.path):
                copy.write(b"\n")
    return Corpus(path, times * corpus.documents, times * corpus.text_bytes)


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def beginning(corpus: Corpus, key: str, text_bytes: int, folder: Path) -> Corpus:
    """The first documents of ``corpus``, up to the one that reaches ``text_bytes``; itself when that is all of it."""
    if text_bytes >= corpus.text_bytes:
        return corpus
    path = folder / f"first-{text_bytes}-{corpus.path.name}"
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
    return Corpus(path, documents, size)


def long_document(path: Path, key: str, size: int) -> None:
    """Write one line of about ``size`` bytes: a document with escapes, CJK and emoji, spaces and line ends."""
    draw = random.Random(0)
    blocks = [_block(draw) for _ in range(8)]
    with open(path, "wb") as file:
        written = file.write(b'{"id": 1, ' + json.dumps(key).encode() + b': "')
        while written < size:
            written += file.write(draw.choice(blocks))
        file.write(b'", "end": true}\n')


def _block(draw: random.Random) -> bytes:
    """About 1 MB of what may stand between the quotes of a JSON string."""
    words = ["rain", "fell", "over", "Straße", "naïve", "roofs", "天色如洗，", "万里无云。", "🙂", "👩‍👩‍👧", '"', "\\", "\t", "\n", "éa"]
    text = " ".join("".join(draw.choices(words, k=draw.randint(1, 3))) for _ in range(100_000)) + "\n"
    raw = text.encode()
    escaped = json.dumps(text)[1:-1].encode()
    plain = json.dumps(text, ensure_ascii=False)[1:-1].encode()
    # Half with every character beyond ASCII escaped, as some writers do: pairs of escapes that make one character.
    assert len(raw) <= len(plain) <= len(escaped)
    return plain + escaped


def documents_file(path: Path, key: str, size: int) -> None:
    """Write documents of mixed lengths until there are ``size`` bytes of them."""
    draw = random.Random(1)
    words = ["rain", "fell", "over", "the", "old", "stone", "roofs", "naïve", "天色如洗", "🙂", "and", "nobody", "saw\n"]
    lines = [
        json.dumps({key: " ".join(draw.choices(words, k=int(draw.lognormvariate(5, 1.5)) + 1))}, ensure_ascii=False)
        for _ in range(5_000)
    ]
    content = ("\n".join(lines) + "\n").encode()
    with open(path, "wb") as file:
        for _ in range(max(1, size // len(content))):
            file.write(content)
