"""Records that do not fit in memory: read in pieces they are what json and str say, and encode to the same ids."""

from __future__ import annotations

import json
import random

import pytest
from oracles.tiny_tokenizer import sample_text, train_tiny_tokenizer
from tokenizers import Tokenizer

from retemper.tools.ingest import long_text
from retemper.tools.ingest.json_records import WantedKeys
from retemper.tools.ingest.long_text import LongText, cut_for_encoding, read_long_json
from retemper.tools.ingest.records import MalformedError

ALPHABETS = ["\\", '\\"\n', "🙂", "天é", '\\"\né天🙂a \x00', "a b\n"]


@pytest.fixture
def small_limits(monkeypatch):
    """Limits of some bytes, so that short texts are long."""

    def set_limits(piece: int) -> None:
        monkeypatch.setattr(long_text, "_PIECE_BYTES", piece)
        monkeypatch.setattr(long_text, "_LONG_STRING", 50)
        monkeypatch.setattr(long_text, "LONG_BYTES", 2000)
        monkeypatch.setattr(long_text, "_SCAN_BYTES", 4096)

    return set_limits


def joined(value: object) -> object:
    """``value`` with its long texts read."""
    if isinstance(value, LongText):
        return "".join(value.pieces())
    if isinstance(value, dict):
        return {key: joined(item) for key, item in value.items()}
    return [joined(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("alphabet", ALPHABETS)
@pytest.mark.parametrize("escaped", [True, False])
def test_pieces_of_a_json_string_are_the_string(tmp_path, small_limits, alphabet, escaped):
    draw = random.Random(alphabet)
    path = tmp_path / "string"
    for _ in range(40):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 3000)))
        raw = json.dumps(text, ensure_ascii=escaped).encode()
        path.write_bytes(raw)
        small_limits(draw.choice([13, 100, 1000]))
        assert "".join(LongText(str(path), 1, len(raw) - 1, is_json=True).pieces()) == text
        path.write_bytes(text.encode())
        assert "".join(LongText(str(path), 0, path.stat().st_size, is_json=False).pieces()) == text


def test_long_objects_are_what_json_reads(tmp_path, small_limits):
    draw = random.Random(0)
    path = tmp_path / "record"
    for _ in range(200):
        record = {
            "text": "".join(draw.choice(ALPHABETS[4]) for _ in range(draw.randrange(9000))),
            "nested": {"list": ["y" * draw.randrange(100), None, 1.5, ["z" * 60]]},
            'a "quoted" \\ key': "z" * draw.randrange(200),
        }
        record = {key: record[key] for key in draw.sample(list(record), 3)}
        path.write_text(json.dumps(record, ensure_ascii=draw.random() < 0.5), encoding="utf-8")
        small_limits(draw.choice([64, 300]))
        assert joined(read_long_json(path, WantedKeys(()))) == record


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "' + b"a" * 100, "without its closing quote"),
        (b'{"text": "' + b"a" * 100 + b'" ', "not valid JSON"),
        (b'{"text": "' + b"a" * 100 + b'\xff"}', "not valid UTF-8"),
        (b'{"text": "' + b"a" * 100 + b'\\ud800"}', "surrogate"),
        (b'{"text": "' + b"a" * 100 + b'\\q"}', "not valid JSON"),
        (b'{"text": "' + b"a\n" * 100 + b'"}', "not valid JSON"),
        (b"[" + b"1," * 2000 + b"1]", "besides its longest strings"),
    ],
)
def test_what_is_wrong_with_a_long_record_is_said(tmp_path, small_limits, content, reason):
    small_limits(100)
    path = tmp_path / "record"
    path.write_bytes(content)
    with pytest.raises(MalformedError, match=reason):
        joined(read_long_json(path, WantedKeys(())))


def test_a_text_that_is_cut_off_in_a_character_is_refused(tmp_path, small_limits):
    small_limits(10)
    path = tmp_path / "text"
    path.write_bytes("天天天天天".encode()[:-1])
    with pytest.raises(MalformedError, match="UTF-8") as error:
        list(LongText(str(path), 0, path.stat().st_size, is_json=False).pieces())
    assert error.value.kind == "invalid UTF-8"


def test_ids_of_the_pieces_are_the_ids_of_the_whole(tmp_path):
    tokenizer = Tokenizer.from_file(str(train_tiny_tokenizer(tmp_path) / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    text = " \n\n".join(sample_text(seed, 300) for seed in range(40)) + "   "
    parts = [text[start : start + 2000] for start in range(0, len(text), 2000)]
    pieces = list(cut_for_encoding(iter(parts), encode))
    assert len(pieces) > 10
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in encode(piece)] == encode(text)


def test_a_tokenizer_that_depends_on_what_was_before_is_never_cut(monkeypatch):
    monkeypatch.setattr(long_text, "_MAX_UNCUT", 5000)

    def encode(text: str) -> list[int]:
        # As with sentencepiece's dummy prefix, each text begins with a token of its own.
        return [0, *text.encode()]

    text = "word\n" * 900
    assert list(cut_for_encoding(iter([text[:2000], text[2000:]]), encode)) == [text]
    with pytest.raises(MalformedError, match="tokens surely end"):
        list(cut_for_encoding(iter(["word\n" * 2000]), encode))


def test_a_text_without_places_to_cut_is_refused(monkeypatch):
    monkeypatch.setattr(long_text, "_MAX_UNCUT", 5000)
    with pytest.raises(MalformedError, match="tokens surely end"):
        list(cut_for_encoding(iter(["a" * 4000] * 3), lambda text: list(text.encode())))
