"""tools/extend_vocab.py on tokenizers of sentencepiece: its own files, tokenizer.json made from them, and both."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
import vocabulary_models as models
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from retemper.tools import extend_vocab as command
from retemper.tools.tokenizer.handle import load_tokenizer
from retemper.tools.vocabulary.splitting import WordSplitter

SIZE = models.NUM_PIECES
KINDS = ["json+model bpe", "json bpe", "model bpe", "json+model unigram", "json unigram", "model unigram"]
TEXTS = [*map(models.domain_text, range(500, 560)), "  two  spaces ", "p53 53 2024", "🙂🙂 線粒體 x"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return models.write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="module")
def pairs(corpus, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Folders before and after, by kind."""
    found = {}
    for kind in KINDS:
        root = tmp_path_factory.mktemp("kind")
        before, after = models.write_model(root / "before", kind), root / "after"
        arguments = ["--num-tokens", "30", "--min-count", "5", "--corpus", str(corpus)]
        command.main(["--model", str(before), "--output", str(after), *arguments])
        found[kind] = before, after
    return found


def report(folder: Path) -> dict:
    return json.loads((folder / "vocabulary.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_stay_and_texts_come_back(pairs, kind):
    before, after = pairs[kind]
    old, new = (load_tokenizer(folder, backend="reference") for folder in (before, after))
    found = report(after)
    assert (old.vocab_size, new.vocab_size) == (SIZE, SIZE + found["num_new_tokens"])
    assert found["num_new_tokens"] == 30 or ("unigram" in kind and found["num_new_tokens"] > 12)
    first = old.encode_flat(["x"])[0].tolist()
    for token in range(3, SIZE):
        assert old.decode([*first, token]) == new.decode([*first, token]) or "\ufffd" in new.decode([token])
    saved = 0
    for text in TEXTS:
        one, other = (handle.encode_flat([text])[0].tolist() for handle in (old, new))
        assert new.decode(other) == old.decode(one)
        assert len(other) <= len(one) or "unigram" in kind
        saved += len(one) - len(other)
    assert saved > 300
    assert found["gain"]["fewer_tokens"] > 0.2


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "json+model" in kind])
def test_both_files_give_the_same_ids(pairs, kind):
    _, after = pairs[kind]
    fast = Tokenizer.from_file(str(after / "tokenizer.json"))
    slow = sentencepiece.SentencePieceProcessor(model_file=str(after / "tokenizer.model"))
    assert slow.GetPieceSize() == fast.get_vocab_size() == SIZE + report(after)["num_new_tokens"]
    used: set[int] = set()
    for text in TEXTS:
        ids = slow.EncodeAsIds(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids, text
        used.update(ids)
    assert len([token for token in used if token >= SIZE]) > 10


def test_words_are_those_of_sentencepiece():
    """Pieces begin at spaces, hold one script, and no two digits where the vocabulary has none of two."""
    apart, together = WordSplitter(["▁a", "1"]), WordSplitter(["▁a", "12"])
    for text, words in {
        "▁ribo▁some": ["▁ribo", "▁some"],
        "▁▁x▁": ["▁▁x", "▁"],
        "▁线粒体abc.▁p": ["▁线粒体", "abc", ".", "▁p"],
        "a▁12": ["a", "▁", "1", "2"],
    }.items():
        assert apart(text) == words
    odd = "\n▁\u200d\ue000b\t  ▁▁\u3000。é"
    assert "".join(apart(odd)) == odd
    assert together("a▁12") == ["a", "▁12"]


def test_both_files_say_the_same(pairs, tmp_path):
    """tokenizer.json is what converting the new tokenizer.model gives: every way to a piece, pieces by their scores."""
    before, after = pairs["json+model bpe"][0], tmp_path / "after"
    corpus = tmp_path / "corpus.jsonl"
    text = "ribo some ribosome polyribosome awesome " * 20
    corpus.write_text("".join(json.dumps({"text": text + "the " * number}) + "\n" for number in range(30)))
    arguments = ["--num-tokens", "100", "--min-count", "5", "--corpus", str(corpus)]
    command.main(["--model", str(before), "--output", str(after), *arguments])
    converted = models.sentencepiece_json((after / "tokenizer.model").read_bytes())["model"]
    found = json.loads((after / "tokenizer.json").read_text())["model"]
    assert found["vocab"] == converted["vocab"]
    ways = [Counter(map(tuple, model["merges"])) for model in (found, converted)]
    assert ways[0] == ways[1]
    new = Counter("".join(way) for way in ways[1] if found["vocab"]["".join(way)] >= SIZE)
    assert max(new.values()) > 1  # such as ▁ribo + some, and ▁ + ribosome
    assert [*dict.fromkeys(map("".join, found["merges"]))] == [*dict.fromkeys(map("".join, converted["merges"]))]
    _, after = pairs["json+model unigram"]
    converted = models.sentencepiece_json((after / "tokenizer.model").read_bytes())["model"]
    found = json.loads((after / "tokenizer.json").read_text())["model"]
    assert [piece for piece, _ in found["vocab"]] == [piece for piece, _ in converted["vocab"]]
    scores = [[score for _, score in model["vocab"]] for model in (found, converted)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["json+model bpe", "json bpe"])
def test_transformers_gives_the_same_ids(pairs, kind):
    _, after = pairs[kind]
    theirs, ours = AutoTokenizer.from_pretrained(after), Tokenizer.from_file(str(after / "tokenizer.json"))
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_characters_without_a_token_get_one(pairs, kind):
    """They were bytes, three for each."""
    by_text = {token["text"].strip(): token for token in report(pairs[kind][1])["tokens"]}
    found = [token for text, token in by_text.items() if "线" in text]
    assert found and all(len(token["subtokens"]) >= 3 * len(token["text"].strip()) for token in found)


@pytest.mark.parametrize("kind", ["model bpe", "model unigram"])
def test_scores(pairs, kind):
    """Of a BPE below all old ones, so that old merges come first; of a unigram model among them."""
    old, new = (
        sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
        for folder in pairs[kind]
    )
    assert [piece.SerializeToString() for piece in new.pieces[:SIZE]] == [p.SerializeToString() for p in old.pieces]
    scores = [piece.score for piece in old.pieces if piece.type == 1]
    added = [piece.score for piece in new.pieces[SIZE:]]
    if "bpe" in kind:
        assert max(added) < min(scores) and added == sorted(added, reverse=True)
    else:
        assert min(scores) - 3 < min(added) and min(scores) < max(added) < 0 and len(set(added)) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_listed_tokens(kind, tmp_path):
    before, listed = models.write_model(tmp_path / "before", kind), tmp_path / "list.txt"
    listed.write_text(" ribosome\ncytochrome b\n", encoding="utf-8")
    command.main(["--model", str(before), "--tokens", str(listed), "--output", str(tmp_path / "after")])
    handle = load_tokenizer(tmp_path / "after", backend="reference")
    by_text = {token["text"]: token["id"] for token in report(tmp_path / "after")["tokens"]}
    assert by_text[" ribosome"] in handle.encode_flat(["the ribosome sat"])[0]
    assert by_text["cytochrome b"] in handle.encode_flat(["the cytochrome b sat"])[0]
    assert handle.decode(handle.encode_flat(["the ribosome sat"])[0]) == "the ribosome sat"


def test_added_tokens_above_the_pieces(corpus, tmp_path, capsys):
    """tokenizer.json keeps their ids; the .model beside it could not, and is left out."""
    before = models.write_model(tmp_path / "before", "json+model bpe")
    tokenizer = Tokenizer.from_file(str(before / "tokenizer.json"))
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(before / "tokenizer.json"))
    arguments = ["--num-tokens", "10", "--min-count", "5", "--corpus", str(corpus)]
    command.main(["--model", str(before), "--output", str(tmp_path / "after"), *arguments])
    assert "left out tokenizer.model" in capsys.readouterr().out
    assert not (tmp_path / "after" / "tokenizer.model").exists()
    new = Tokenizer.from_file(str(tmp_path / "after" / "tokenizer.json"))
    assert new.token_to_id("<pad>") == SIZE and report(tmp_path / "after")["first_new_id"] == SIZE + 1
