"""tools/extend_vocab.py on input that is large, damaged or odd: bounded memory, and one line for each fault."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from weakref import WeakSet

import pytest
import vocabulary_models as models
import xxhash
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from retemper.engine.errors import run_command
from retemper.tools import extend_vocab as command
from retemper.tools.tokenizer.handle import load_tokenizer
from retemper.tools.vocabulary import command as steps
from retemper.tools.vocabulary.corpus import CorpusSample
from retemper.tools.vocabulary.options import ExtendOptions
from retemper.tools.vocabulary.token_list import read_list
from retemper.tools.vocabulary.tokenizer_json import BpeJson

LEARN = ["--num-tokens", "20", "--min-count", "5"]
BOUND = 20_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return models.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """Models by kind of their tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    kinds = ["byte-level", "json unigram", "model bpe", "model unigram"]
    return {kind: models.write_model(root / kind.replace(" ", "-"), kind) for kind in kinds}


def report(folder: Path) -> dict:
    return json.loads((folder / "vocabulary.json").read_text())


@pytest.fixture
def refused(capfd, tmp_path):
    """The one line on stderr of a command that leaves no output."""

    def check(*arguments: object) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: command.main([*map(str, arguments), "--output", str(tmp_path / "refused")]))
        lines = capfd.readouterr().err.splitlines()
        assert exit_.value.code == 1 and len(lines) == 1 and not list(tmp_path.glob("*refused*"))
        return lines[0]

    return check


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def digest(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def test_a_sample_is_bounded_and_comes_from_everywhere():
    draw = random.Random(0)
    texts = [f"{number} " + "x" * draw.randrange(50) for number in range(4_000)]
    sample, given = CorpusSample(BOUND), 0
    for number, text in enumerate(texts, 1):
        sample.add(text)
        given += len(text)
        assert sum(map(len, sample.texts)) <= BOUND
        assert given > BOUND or sample.texts == texts[:number]
    assert sample.one_in == 8  # 120,000 characters
    assert sample.texts == [text for text in texts if digest(text) // 10 % 8 == 0]
    for odd in (["x" * (BOUND + 1), "y"], ["y", "x" * (BOUND + 1)], ["z" * 100] * 1_000):
        sample = CorpusSample(BOUND)
        for text in odd:
            sample.add(text)
        assert len(sample.texts) == 1 or 0 < sum(map(len, sample.texts)) <= BOUND


class Document(str):
    """A text that can be seen to be there."""


class Words:
    """A tokenizer that only cuts text."""

    def words(self, text: str) -> list[str]:
        return text.split()


@pytest.mark.parametrize("some_held_out", [True, False])
def test_documents_do_not_stay_in_memory(some_held_out, monkeypatch):
    """4 million characters; of those of all documents that are there at once, no more than the bound and two."""
    there: WeakSet[Document] = WeakSet()
    most, length = 0, 1_000

    def read_documents(*_: object):
        nonlocal most
        number = 0
        for _ in range(4_000):
            while True:
                number += 1
                text = Document(f"{number} ".ljust(length - 10, "a") + f" b{number % 7}".rjust(10))
                if some_held_out or digest(text) % 10:
                    break
            there.add(text)
            most = max(most, sum(map(len, there)))
            yield text

    monkeypatch.setattr(steps, "read_documents", read_documents)
    monkeypatch.setattr(steps, "_MEASURED_CHARACTERS", BOUND)
    found = steps._read(ExtendOptions("model", "output", ["corpus"]), Words())
    assert BOUND / 4 < sum(map(len, found.measured)) <= BOUND
    assert most <= BOUND + 2 * length
    what = (
        "held-out tenth of the corpus" if some_held_out else "corpus itself, since it is too small to hold out a part"
    )
    one_in = int(found.what.removeprefix(f"{what}, one in ").removesuffix(" of its documents"))
    assert one_in >= (16 if some_held_out else 128)
    # All is learned from, and the curve is of what is measured.
    assert sum(count for word, count in found.words.items() if word.startswith("b")) == (
        pytest.approx(3_600, rel=0.05) if some_held_out else 4_000
    )
    assert found.held_out_words == Counter(word for text in found.measured for word in text.split())


def test_the_report_says_what_was_measured(bases, corpus, tmp_path, monkeypatch, capsys):
    arguments = ["--model", str(bases["byte-level"]), "--corpus", str(corpus), *LEARN]
    command.main([*arguments, "--output", str(tmp_path / "whole")])
    whole = report(tmp_path / "whole")
    monkeypatch.setattr(steps, "_MEASURED_CHARACTERS", whole["gain"]["before"]["characters"])
    command.main([*arguments, "--output", str(tmp_path / "same")])
    assert report(tmp_path / "same") == whole and whole["gain"]["text"] == "held-out tenth of the corpus"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert digest(texts[0]) % 10 != 0 < whole["gain"]["documents"] == sum(digest(text) % 10 == 0 for text in texts)
    monkeypatch.setattr(steps, "_MEASURED_CHARACTERS", whole["gain"]["before"]["characters"] - 1)
    command.main([*arguments, "--output", str(tmp_path / "part")])
    part = report(tmp_path / "part")
    assert part["tokens"] == whole["tokens"]
    assert 0 < part["gain"]["documents"] < whole["gain"]["documents"]
    assert part["gain"]["text"].startswith("held-out tenth of the corpus, one in ")
    assert f"{part['gain']['text']}: {part['gain']['documents']:,} documents" in capsys.readouterr().out
    curve = part["held_out_tokens_by_number_of_new_tokens"]
    assert (curve[0], curve[-1]) == (part["gain"]["before"]["tokens"], part["gain"]["after"]["tokens"])


# ---------------------------------------------------------------------------------------------------------------------
# Damaged files


@pytest.mark.parametrize(
    ("kind", "name", "content", "words"),
    [
        ("byte-level", "vocab.json", b'{"a": 1', "cannot be read as JSON: Expecting"),
        ("byte-level", "vocab.json", b"[1]", "holds a list instead of an object"),
        ("byte-level", "merges.txt", b"#version\n\xff\xfe", "cannot be read: 'utf-8' codec"),
        ("model bpe", "added_tokens.json", b'{"a": ', "cannot be read as JSON: Expecting"),
        ("model bpe", "added_tokens.json", b'["a"]', "holds a list instead of an object"),
        ("model unigram", "tokenizer_config.json", b'{"added_tokens_decoder": {"a": {}}}', "must be ids"),
        ("model unigram", "tokenizer_config.json", b'{"added_tokens_decoder": 3}', "must be ids"),
    ],
)
def test_damaged_files_beside_the_tokenizer(kind, name, content, words, bases, corpus, refused, tmp_path):
    folder = shutil.copytree(bases[kind], tmp_path / "model")
    (folder / name).write_bytes(content)
    line = refused("--model", folder, "--corpus", corpus, *LEARN)
    assert f"{folder / name}: " in line and words in line and "get it again from the model's source" in line


def changed(base: Path, folder: Path, change: Callable[[dict], object]) -> Path:
    """A copy with another tokenizer.json, which the library reads."""
    shutil.copytree(base, folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    Tokenizer.from_file(str(path))
    return folder


@pytest.mark.parametrize("change", [lambda model: model.pop("unk_id"), lambda model: model.update(unk_id=None)])
def test_a_unigram_model_needs_an_unknown_token(change, bases, corpus, refused, tmp_path):
    folder = changed(bases["json unigram"], tmp_path / "model", lambda content: change(content["model"]))
    line = refused("--model", folder, "--corpus", corpus, *LEARN)
    assert f"{folder / 'tokenizer.json'}: a unigram model without model.unk_id" in line


def test_ids_that_the_library_does_not_read_are_refused(bases, corpus, refused, tmp_path):
    folder = changed(bases["byte-level"], tmp_path / "gap", lambda content: content["added_tokens"][-1].update(id=364))
    read = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<think>")
    line = refused("--model", folder, "--corpus", corpus, *LEARN)
    assert f"added token '<think>' has id 364 in the file, but the tokenizers library reads it as {read};" in line
    # What the line advises helps.
    Tokenizer.from_file(str(folder / "tokenizer.json")).save(str(folder / "tokenizer.json"))
    command.main(["--model", str(folder), "--corpus", str(corpus), "--output", str(tmp_path / "new"), *LEARN])
    assert Tokenizer.from_file(str(tmp_path / "new" / "tokenizer.json")).token_to_id("<think>") == read
    folder = changed(
        bases["json unigram"], tmp_path / "other", lambda content: content["added_tokens"][1].update(content="<bos>")
    )
    line = refused("--model", folder, "--corpus", corpus, *LEARN)
    assert (
        f"added token '<bos>' has id 1 in the file, but the tokenizers library reads it as {models.NUM_PIECES}" in line
    )


# ---------------------------------------------------------------------------------------------------------------------
# Lists


def test_lists_of_other_editors(tmp_path, refused, bases):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeffone\r\n two \u2028three\x0b\r\n\r\nfour\rfive\n\ufeffsix".encode())
    assert [token.text for token in read_list(str(path))] == ["one", " two \u2028three\x0b", "four\rfive", "\ufeffsix"]
    path.write_bytes(b"one\r\ntwo\none\n")
    assert "line 3 repeats 'one' of line 1" in refused("--model", bases["byte-level"], "--tokens", path)
    path.write_bytes("\ufeff".encode())
    assert "holds no token" in refused("--model", bases["byte-level"], "--tokens", path)


@pytest.mark.parametrize("kind", ["json unigram", "model bpe", "model unigram"])
def test_one_piece_listed_in_two_ways(kind, bases, tmp_path, capsys):
    path = tmp_path / "list.txt"
    path.write_text(" ribosome\n\u2581ribosome\n", encoding="utf-8")
    command.main(["--model", str(bases[kind]), "--tokens", str(path), "--output", str(tmp_path / "new")])
    assert "'\u2581ribosome' is a token already" in capsys.readouterr().out
    whole = [token["piece"] for token in report(tmp_path / "new")["tokens"] if token["kind"] != "part"]
    assert whole == ["\u2581ribosome"]


def test_one_phrase_listed_in_two_ways(tmp_path):
    """A tokenizer.model beside the tokenizer.json could not hold both."""
    folder = models.write_model(tmp_path / "model", "json+model bpe")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = BpeJson(files, folder / "tokenizer.json").take(["New York", "New\u2581York"])
    assert [(token.text, token.kind) for token in found.tokens] == [("New York", "added")]
    assert "'New\u2581York' is a token already" in found.notes
    SentencePieceProcessor(model_proto=found.files["tokenizer.model"])


# ---------------------------------------------------------------------------------------------------------------------
# Files of old


def test_a_model_without_its_type(bases, corpus, refused, tmp_path):
    """As GPT-2's tokenizer.json on the Hub: no type, and merges as text."""

    def of_old(content: dict) -> None:
        del content["model"]["type"]
        content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]

    folder = changed(bases["byte-level"], tmp_path / "old", of_old)
    for model, output in ((folder, "new"), (bases["byte-level"], "expected")):
        command.main(["--model", str(model), "--corpus", str(corpus), "--output", str(tmp_path / output), *LEARN])
    found, expected = report(tmp_path / "new"), report(tmp_path / "expected")
    assert found["tokens"] == expected["tokens"] and found["gain"] == expected["gain"]
    content = json.loads((tmp_path / "new" / "tokenizer.json").read_text())["model"]
    assert "type" not in content and all(isinstance(merge, str) for merge in content["merges"])
    texts = [*map(models.domain_text, range(500, 520)), "<|im_start|>a"]
    new, same = (load_tokenizer(tmp_path / name).encode_flat(texts)[0].tolist() for name in ("new", "expected"))
    assert new == same and max(new) >= found["first_new_id"]
    piece = {"vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
    piece["max_input_chars_per_word"] = 100
    folder = changed(bases["byte-level"], tmp_path / "piece", lambda content: content.update(model=piece))
    assert "a WordPiece model cannot be extended" in refused("--model", folder, "--corpus", corpus)
