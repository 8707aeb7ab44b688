"""The demonstration's corpora and its tokenizer: repeatable, held apart, and lossless."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.normalizers import NFC
from transformers import AutoTokenizer

from retemper.tools.demo.bpe import SPECIAL_TOKENS, train_tokenizer
from retemper.tools.demo.corpora import (
    CorpusPart,
    Module,
    ProseFilter,
    build_corpora,
    docstrings,
    parse_modules,
    strip_docstrings,
)

CAP = 700_000
"""Bytes per corpus: more than the language reference's topics alone, so that docstrings are met too."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CorpusPart]:
    return build_corpora(tmp_path_factory.mktemp("corpora"), max_bytes=CAP)


@pytest.fixture(scope="module")
def tokenizer_folder(corpora: dict[str, CorpusPart], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    assert (
        train_tokenizer([corpora["general.train"].path, corpora["domain.train"].path], folder, vocab_size=1500) == 1500
    )
    return folder


def read(split: CorpusPart) -> list[dict[str, str]]:
    return [json.loads(line) for line in split.path.read_text(encoding="utf-8").splitlines()]


def paragraphs(documents: list[dict[str, str]]) -> set[str]:
    """The long paragraphs of documents, white space aside."""
    found = (" ".join(part.split()) for document in documents for part in document["text"].split("\n\n"))
    return {part for part in found if len(part) >= 60}


def found_docstrings(source: str) -> Iterator[str]:
    """Every docstring of ``source``, found by visiting every node."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_same_bytes_in_another_process(corpora: dict[str, CorpusPart], tmp_path: Path, hash_seed: str) -> None:
    """In a process of its own, where Python's salted ``hash()`` gives other values."""
    call = f"build_corpora(pathlib.Path({str(tmp_path)!r}), {CAP})"
    script = f"import pathlib; from retemper.tools.demo.corpora import build_corpora; {call}"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
    for name, split in corpora.items():
        assert split.path.name == f"{name}.jsonl"
        assert split.path.read_bytes() == (tmp_path / split.path.name).read_bytes()


def test_sizes_are_reported_and_capped(corpora: dict[str, CorpusPart]) -> None:
    for split in corpora.values():
        documents = read(split)
        assert split.num_documents == len(documents) > 0
        assert split.num_bytes == sum(len(document["text"].encode()) for document in documents)
    for name in ("general", "domain"):
        train, held_out = (corpora[f"{name}.{side}"].num_bytes for side in ("train", "validation"))
        assert 0.9 * CAP < train + held_out <= CAP
        assert 0.01 < held_out / (train + held_out) < 0.15


def test_sources_name_no_folder_of_this_machine(corpora: dict[str, CorpusPart]) -> None:
    kinds = {name: {document["source"].split("/")[0] for document in read(s)} for name, s in corpora.items()}
    assert kinds["general.train"] == {"pydoc_data", "stdlib"}
    assert kinds["domain.train"] == kinds["domain.validation"] == {"stdlib"}


def test_training_text_holds_no_validation_text(corpora: dict[str, CorpusPart]) -> None:
    documents = {name: read(split) for name, split in corpora.items()}
    for name in ("general", "domain"):
        train, held_out = documents[f"{name}.train"], documents[f"{name}.validation"]
        assert {d["text"] for d in train}.isdisjoint(d["text"] for d in held_out)
        assert {d["source"] for d in train}.isdisjoint(d["source"] for d in held_out)
    assert paragraphs(documents["general.train"]).isdisjoint(paragraphs(documents["general.validation"]))
    assert paragraphs(documents["domain.train"]).isdisjoint(paragraphs(documents["general.validation"]))
    assert paragraphs(documents["general.train"]).isdisjoint(paragraphs(documents["domain.validation"]))


def test_domain_is_code_without_docstrings(corpora: dict[str, CorpusPart]) -> None:
    for document in read(corpora["domain.train"]) + read(corpora["domain.validation"]):
        assert not list(found_docstrings(document["text"])), document["source"]


CODE = '''"""Module."""
from __future__ import annotations

class Empty(Exception):
    """Only words."""


class Box:
    """A box: höher.\x0c

    Second paragraph."""

    size = "not a docstring"  # é

    def one(self): "Short."

    def two(self):
        "One line."; return 'ü'

    async def three(self):
        """Three."""  # a comment stays
        if self:
            def inner():
                r"""Raw \\d."""
                return 1
        return """kept"""
'''


def test_strip_docstrings_removes_these_alone() -> None:
    stripped = strip_docstrings(Module("code.py", CODE, ast.parse(CODE)))
    expected = '''from __future__ import annotations

class Empty(Exception):
    pass


class Box:

    size = "not a docstring"  # é

    def one(self): pass

    def two(self):
        pass; return 'ü'

    async def three(self):
        pass  # a comment stays
        if self:
            def inner():
                return 1
        return """kept"""
'''
    assert stripped == expected
    compile(stripped, "code.py", "exec")


def test_docstrings_finds_every_one_in_order() -> None:
    assert docstrings(ast.parse(CODE)) == [
        "Module.",
        "Only words.",
        "A box: höher.\x0c\n\nSecond paragraph.",
        "Short.",
        "One line.",
        "Three.",
        "Raw \\d.",
    ]
    argparse = Path(ast.__file__).with_name("argparse.py").read_text(encoding="utf-8")
    assert sorted(docstrings(ast.parse(argparse))) == sorted(found_docstrings(argparse))


def test_prose_keeps_a_long_paragraph_once() -> None:
    prose, long = ProseFilter(), "A paragraph that is long enough not to be met by chance a second time."
    assert prose.unseen(f"Examples\n\n{long}\n\n>>> 1 + 1\n2\n\nThe end.") == f"Examples\n\n{long}\n\nThe end."
    assert prose.unseen(f"Examples\n\n    {long}\n\nNew.") == "Examples\n\nNew."


def test_parse_modules_passes_over_what_is_no_text_to_learn_from(tmp_path: Path) -> None:
    for name, content in {
        "good.py": b"x = 1\n",
        "package/deep.py": b"y = 2\n",
        "test/case.py": b"z = 3\n",
        "_sysconfigdata_machine.py": b"build = {}\n",
        "python2.py": b"print 'x'\n",
        "latin.py": b"name = '\xe9'\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    assert {module.source for module in parse_modules(tmp_path, "lib")} == {"lib/good.py", "lib/package/deep.py"}


def test_tokenizer_is_the_same_again(corpora: dict[str, CorpusPart], tokenizer_folder: Path, tmp_path: Path) -> None:
    train_tokenizer([corpora["general.train"].path, corpora["domain.train"].path], tmp_path, vocab_size=1500)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes()


def test_tokenizer_round_trips_any_text_through_transformers(tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    every_character = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    blocks = [every_character[start : start + 4096] for start in range(0, len(every_character), 4096 * 16)]
    spaces = ["", " ", "\n", "  two  \n\n\n\ttabs\r\n ", "a , b . don't isn 't ?", "<|endoftext|>x<|im_start|> y"]
    for text in [*spaces, *blocks, "cafe\u0301 👩\u200d👩\u200d👧 ﷽ 日本語 \x00\x7f"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == NFC().normalize_str(text)
        assert all(0 <= token < 1500 for token in ids)


def test_tokenizer_is_the_same_beside_a_qwen2_model(tokenizer_folder: Path, tmp_path: Path) -> None:
    """transformers builds another class there; it must cut text as ``tokenizer.json`` says."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    text = "def f(x):\n    return x + 123  # cafe\u0301, it's <|endoftext|>\n\n\n\tend  "
    expected = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).encode(text).ids
    for folder in (tokenizer_folder, tmp_path):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.encode(text) == expected
        assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [0, 1, 2]
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
