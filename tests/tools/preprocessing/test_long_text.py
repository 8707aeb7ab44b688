"""Records that do not fit in memory: read in pieces they are what json and str say, and encode to the same ids."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
import sentencepiece
from oracles.tiny_tokenizer import sample_text, train_tiny_tokenizer
from tokenizers import Tokenizer

from retemper.tools.preprocessing.records import long_text
from retemper.tools.preprocessing.records.errors import MalformedError, Where
from retemper.tools.preprocessing.records.json_values import WantedKeys
from retemper.tools.preprocessing.records.long_text import LongText, encode_in_pieces, read_long_json

WHERE = Where("a.jsonl", "line", 1)
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
        assert "".join(LongText(str(path), 1, len(raw) - 1, True, WHERE).pieces()) == text
        path.write_bytes(text.encode())
        assert "".join(LongText(str(path), 0, path.stat().st_size, False, WHERE).pieces()) == text


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
        assert joined(read_long_json(path, WantedKeys(()), WHERE)) == record


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "' + b"a" * 100, "without its closing quote"),
        (b'{"text": "' + b"a" * 100 + b'" ', "not valid JSON"),
        (b'{"text": "' + b"a" * 100 + b'\xff"}', "not valid UTF-8"),
        (b'{"text": "' + b"a" * 100 + b'\\ud800"}', "surrogate"),
        (b'{"text": "' + b"a" * 100 + b'\\q"}', "not valid JSON"),
        (b'{"text": "' + b"a\n" * 100 + b'"}', "not valid JSON"),
        (b"[" + b"1," * 2000 + b"1]", "outside its longest strings"),
    ],
)
def test_what_is_wrong_with_a_long_record_is_said(tmp_path, small_limits, content, reason):
    small_limits(100)
    path = tmp_path / "record"
    path.write_bytes(content)
    with pytest.raises(MalformedError, match=reason):
        joined(read_long_json(path, WantedKeys(()), WHERE))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"text": "' + b"a" * 100 + b'", "text": "b"}', "the key 'text' twice in one object"),
        (b'{"text": "a", "b": {"text": "' + b"a" * 100 + b'", "text": 1}}', "the key 'text' twice in one object"),
        (b'{"' + b"k" * 100 + b'": 1}', "a key of more than"),
        (b'{"text": "a", "other": "' + b"a" * 100 + b'\xff"}', "byte 0xff at byte 125 of the line"),
        (b'{"text": "' + b"\x80" * 500 + b'"}', "byte 0x80 at byte 11 of the line"),
    ],
)
def test_long_records_are_looked_at_as_strictly_as_short_ones(tmp_path, small_limits, content, reason):
    small_limits(7)
    path = tmp_path / "record"
    path.write_bytes(content)
    with pytest.raises(MalformedError, match=reason):
        read_long_json(path, WantedKeys(("text",)), WHERE)


def test_a_long_record_may_be_nested_as_deeply_as_a_short_one(tmp_path, small_limits, monkeypatch):
    small_limits(100)
    monkeypatch.setattr(long_text, "LONG_BYTES", 5000)
    path = tmp_path / "record"
    path.write_bytes(b'{"text": "' + b"a" * 100 + b'", "n": ' + b"[" * 990 + b"]" * 990 + b"}")
    record = read_long_json(path, WantedKeys(("text",)), WHERE)
    assert joined(record["text"]) == "a" * 100


def test_a_text_that_is_cut_off_in_a_character_is_refused(tmp_path, small_limits):
    small_limits(10)
    path = tmp_path / "text"
    path.write_bytes("天天天天天".encode()[:-1])
    with pytest.raises(MalformedError, match="UTF-8") as error:
        list(LongText(str(path), 0, path.stat().st_size, False, WHERE).pieces())
    assert error.value.kind == "invalid UTF-8"


def in_pieces(text: str, size: int, encode) -> list[tuple[str, list[int]]]:
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    return [(piece, ids.tolist()) for piece, ids in encode_in_pieces(parts, lambda part: np.array(encode(part)))]


def check_pieces(text: str, encode, least: int) -> None:
    pieces = in_pieces(text, 2000, encode)
    assert len(pieces) >= least
    assert "".join(piece for piece, _ in pieces) == text
    assert [token for _, ids in pieces for token in ids] == list(encode(text))


def test_ids_of_the_pieces_are_the_ids_of_the_whole(tmp_path):
    tokenizer = Tokenizer.from_file(str(train_tiny_tokenizer(tmp_path) / "tokenizer.json"))
    text = " \n\n".join(sample_text(seed, 300) for seed in range(40)) + "   "
    check_pieces(text, lambda part: tokenizer.encode(part, add_special_tokens=False).ids, 10)


@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_sentencepiece_too_whose_tokens_depend_on_where_a_text_begins(dummy_prefix, model_type):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([sample_text(seed, 100) for seed in range(40)]),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        model_type=model_type,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    text = " \n\n".join(sample_text(seed, 300) for seed in range(20)) + "   "
    assert dummy_prefix == processor.id_to_piece(processor.encode("cat")[0]).startswith("▁")
    check_pieces(text, processor.encode, 10)


SCRIPTS = {
    "Russian": "Мороз и солнце; день чудесный! Ещё ты дремлешь, друг прелестный. ",
    "Arabic": "كان يا ما كان في قديم الزمان ",
    "Hindi": "यह एक लंबा पाठ है जिसे टुकड़ों में काटा जाता है ",
    "Korean": "나는 오늘 학교에 갔다. 그리고 책을 읽었다 ",
    "Japanese": "吾輩は猫である。名前はまだ無い。",
    "lines of Chinese": "天地玄黃宇宙洪荒\n",
    "a log": "2024-01-01 12:00:00,123 4711 99 -- 0x1f\n",
    "numbers": "1,2.5,-3,4\n",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_text_of_many_scripts_can_be_cut(script):
    check_pieces(SCRIPTS[script] * 300, lambda part: list(part.encode()), 3)


def test_a_tokenizer_that_merges_over_every_place_is_never_cut(monkeypatch):
    monkeypatch.setattr(long_text, "_MAX_UNCUT", 5000)
    # One token for a text, whatever it is.
    text = "word\n" * 900
    assert in_pieces(text, 2000, lambda part: [hash(part)]) == [(text, [hash(text)])]
    with pytest.raises(MalformedError, match="not natural text"):
        in_pieces("word\n" * 2000, 9000, lambda part: [hash(part)])


def test_a_text_without_places_to_cut_is_refused(monkeypatch):
    monkeypatch.setattr(long_text, "_MAX_UNCUT", 5000)
    with pytest.raises(MalformedError, match="not natural text"):
        in_pieces("a" * 12_000, 4000, lambda part: list(part.encode()))
