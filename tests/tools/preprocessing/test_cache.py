"""``preprocess --cache-folder``: datasets that are named by what they are made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from retemper.engine.errors import UserError
from retemper.tools import preprocess
from retemper.tools.preprocessing import cache


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files with sixty documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, numbers in (("a.jsonl", range(40)), ("b.jsonl", range(40, 60))):
        lines = [json.dumps({"text": f"document {number} of the corpus", "body": str(number)}) for number in numbers]
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def cached(tmp_path: Path, tiny_tokenizer: Path):
    """Run the command with a cache; return the prefixes that it reports."""

    def run(*words: object, tokenizer: Path = tiny_tokenizer) -> list[str]:
        report = tmp_path / "report.json"
        known = ["--tokenizer", tokenizer, "--cache-folder", tmp_path / "cache", "--report", report, "--workers", 1]
        preprocess.main([str(word) for word in ("--input", *words, *known)])
        return [one["prefix"] for one in json.loads(report.read_text())["datasets"]]

    return run


def made_again(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Calls of the function that tokenizes."""
    calls: list[object] = []
    original = cache.preprocess
    monkeypatch.setattr(cache, "preprocess", lambda options: (calls.append(options), original(options))[1])
    return calls


def test_a_text_is_tokenized_once_whatever_its_name(corpus, cached, monkeypatch, tiny_tokenizer):
    calls = made_again(monkeypatch)
    [first] = cached(corpus)
    plain = corpus.parent / "plain"
    preprocess.main(["--input", str(corpus), "--output-prefix", str(plain), "--tokenizer", str(tiny_tokenizer)])
    for end in (".bin", ".idx"):
        assert Path(first + end).read_bytes() == Path(f"{plain}{end}").read_bytes()
    moved = corpus.rename(corpus.with_name("moved"))
    assert cached(moved) == [first]
    assert len(calls) == 1


def test_contents_options_and_tokenizer_make_other_datasets(corpus, cached, tmp_path, tiny_tokenizer):
    found = [
        cached(corpus),
        cached(corpus, "--json-key", "body"),
        cached(corpus, "--no-append-eod"),
        cached(corpus / "b.jsonl", corpus / "a.jsonl"),
        cached(corpus, "--held-out", corpus / "b.jsonl"),
    ]
    other = Path(shutil.copytree(tiny_tokenizer, tmp_path / "other"))
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(content))
    found.append(cached(corpus, tokenizer=other))
    with (corpus / "a.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    found.append(cached(corpus))
    assert len({prefix for [prefix] in found}) == len(found)


def test_parts_are_joined_to_the_dataset_of_one_call(corpus, cached, tmp_path):
    split = ("--split", "train=0.7,valid=0.3")
    whole = [Path(prefix) for prefix in cached(corpus, *split)]
    expected = {path.name: path.read_bytes() for path in whole[0].parent.glob("dataset.*.[bi]*")}
    shutil.rmtree(tmp_path / "cache")
    parts = cached(corpus, *split, "--shard", "0/2") + cached(corpus, *split, "--shard", "1/2")
    assert len(parts) == 4
    joined = cached(corpus, *split)
    assert joined == [str(prefix) for prefix in whole]
    assert {path.name: path.read_bytes() for path in whole[0].parent.glob("dataset.*.[bi]*")} == expected
    assert not list(whole[0].parent.glob("*shard*"))


def test_an_interrupted_dataset_is_made_again(corpus, cached, monkeypatch):
    calls = made_again(monkeypatch)
    [prefix] = cached(corpus)
    expected = Path(f"{prefix}.bin").read_bytes()
    Path(prefix).with_name("complete.json").unlink()
    Path(f"{prefix}.bin").write_bytes(b"damaged")
    assert cached(corpus) == [prefix]
    assert len(calls) == 2 and Path(f"{prefix}.bin").read_bytes() == expected


def test_hashes_of_large_files_are_remembered_until_they_change(corpus, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_REMEMBERED_BYTES", 1)
    [first] = cached(corpus)
    monkeypatch.setattr(cache, "record_file", None)  # is not called again
    assert cached(corpus) == [first]
    monkeypatch.undo()
    monkeypatch.setattr(cache, "_REMEMBERED_BYTES", 1)
    text = (corpus / "a.jsonl").read_text()
    (corpus / "a.jsonl").write_text(text.replace("document 1 ", "document 9 "))
    assert cached(corpus) != [first]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("-",), "--input -"),
        (("corpus", "--output-prefix", "x"), "--output-prefix x"),
        (("corpus", "--held-out", "missing.txt"), "--held-out missing.txt"),
    ],
)
def test_what_cannot_be_cached_is_refused(corpus, cached, monkeypatch, words, named):
    monkeypatch.chdir(corpus.parent)
    with pytest.raises(UserError, match=named):
        cached(*words)
    assert not (corpus.parent / "cache" / "datasets").exists()
