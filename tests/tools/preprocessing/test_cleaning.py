"""Cleaning: what is removed and normalized is what unicodedata says, for whole texts and for any pieces."""

from __future__ import annotations

import itertools
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from retemper.tools.preprocessing import ngrams
from retemper.tools.preprocessing.cleaning.cleaner import Cleaner
from retemper.tools.preprocessing.cleaning.decontamination import NgramFilter
from retemper.tools.preprocessing.cleaning.normalization import _BOUNDARY, PieceNormalizer
from retemper.tools.preprocessing.cleaning.steps import strip_control
from retemper.tools.preprocessing.options import PreprocessOptions

ALPHABETS = {
    "ascii": "ab \n\t\r",
    "accents": "e\u0301\u0327\u0300a o\u0308",
    "marks out of order": "a\u0316\u0301\u0327\u0300\u0315",
    "hangul": "\u1100\u1161\u11a8\u1112\uac00 ",
    "indic": "\u09c7\u09be\u09d7 \u0b47\u0b56\u0b3e",
    "singletons": "\u212b\u2126\uf900\u0958x",
    "no boundary": "\u0301\u1161\u11a8\u3099",
    "control": "a\x00\x1f\x7f\x80\x9f\x85\xa0\xc2\u0301\x1b\x0b\x0c\t\n\r",
    "surrogates": "a\ud800\udfff\u0301",
    "chinese": "天地\u3099か\u3099。",
}
HELD_OUT = "the quick brown fox jumps over the lazy dog and never comes back again at all"


def cut(draw: random.Random, text: str, times: int) -> list[str]:
    edges = [0, *sorted(draw.randrange(len(text) + 1) for _ in range(times)), len(text)]
    return [text[first:last] for first, last in itertools.pairwise(edges)]


def random_texts(name: str, count: int = 150, longest: int = 30) -> list[str]:
    draw = random.Random(name)
    return ["".join(draw.choices(ALPHABETS[name], k=draw.randrange(longest))) for _ in range(count)]


def without_control(text: str) -> str:
    return "".join(c for c in text if c in "\t\n\r" or unicodedata.category(c) != "Cc")


def joined(cleaner: Cleaner, pieces: list[str]) -> tuple[str, str | None]:
    """The text and reason of pieces; after a reason nothing may come."""
    text, reason = "", None
    for piece, why in cleaner.clean_pieces(pieces):
        assert reason is None
        text, reason = text + piece, why
    return text, reason


def test_every_control_character_is_removed_and_no_other():
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if code < 0x3000 or code % 97 == 0:
            text = f"x{character}y"
            assert strip_control(text) == without_control(text), hex(code)


def test_a_clean_text_is_not_copied():
    text = "naïve «café» Ånd 天地\ud800\t\r\n"
    assert strip_control(text) is text


def test_boundaries_compose_with_nothing_before_them():
    """What is in front of such a character is the same, normalized alone or with it."""
    boundaries = [chr(code) for code in range(0x110000) if _BOUNDARY.match(chr(code))]
    assert len(boundaries) > 20_000
    before = ["e", "\u1100", "\uac00", "\u09c7", "か", "\u0327"]
    for character in boundaries:
        assert unicodedata.combining(character) == 0
        assert unicodedata.normalize("NFC", character) == character
    for text in before:
        for character in boundaries[::7]:
            assert unicodedata.normalize("NFC", text + character) == text + character


@pytest.mark.parametrize("name", ALPHABETS)
def test_normalized_pieces_are_the_normalized_whole(name):
    draw = random.Random(name)
    for text in random_texts(name):
        normalizer = PieceNormalizer()
        ready = [normalizer.add(piece) for piece in cut(draw, text, draw.randrange(6))]
        assert "".join(ready) + normalizer.end() == unicodedata.normalize("NFC", text)


def test_a_normalizer_holds_little_of_what_it_can_cut():
    normalizer = PieceNormalizer()
    for _ in range(100):
        normalizer.add("e\u0301 天" * 100)
        assert sum(map(len, normalizer._held)) < 10


def asked_for(held_out: Path | None = None, **options: Any) -> Cleaner:
    return Cleaner(PreprocessOptions(["-"], **options), held_out)


@pytest.mark.parametrize("name", ALPHABETS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("strip", [True, False])
def test_cleaned_texts_are_what_unicodedata_says(name, normalize, strip):
    cleaner = asked_for(normalize="nfc" if normalize else "none", strip_control=strip, min_chars=12)
    texts = random_texts(name)
    draw = random.Random(name)
    for text, (cleaned, reason) in zip(texts, cleaner.clean_batch(texts), strict=True):
        expected = without_control(text) if strip else text
        expected = unicodedata.normalize("NFC", expected) if normalize else expected
        assert cleaned == expected
        assert reason == ("below --min-chars" if len(expected) < 12 else None)
        assert cleaner.clean(text) == (cleaned, reason)
        assert joined(cleaner, cut(draw, text, draw.randrange(6))) == (cleaned, reason)


def test_only_what_is_asked_is_done():
    assert not asked_for().active
    assert all(asked_for(**option).active for option in ({"normalize": "nfc"}, {"strip_control": True}))
    assert asked_for(min_chars=1).active
    assert asked_for().clean("e\u0301\x00") == ("e\u0301\x00", None)
    assert asked_for().clean_batch([]) == []


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held-out"
    NgramFilter.build([HELD_OUT]).save(path)
    return path


def test_contamination_is_seen_in_the_cleaned_text(held_out):
    spoiled = "so the QUICK, brown fox jum\x00ps over the lazy dog; and never comes back again"
    assert asked_for(held_out).clean(spoiled)[1] is None
    cleaner = asked_for(held_out, strip_control=True)
    assert cleaner.clean(spoiled)[1] == "shares an n-gram with --held-out"


@pytest.mark.parametrize("min_chars", [0, 80, 10_000])
def test_pieces_have_the_reason_of_the_whole(held_out, monkeypatch, min_chars):
    cleaner = asked_for(held_out, normalize="nfc", strip_control=True, min_chars=min_chars)
    draw = random.Random(min_chars)
    words = HELD_OUT.split()
    seen = set()
    for _ in range(60):
        first = draw.randrange(6)
        text = " ".join(draw.choices(words, k=draw.randrange(12)) + words[first : first + draw.randrange(9, 16)])
        text += draw.choice([" yes", "\x00", " e\u0301"])
        cleaned, reason = cleaner.clean(text)
        seen.add(reason)
        with monkeypatch.context() as patch:
            # So that pieces are looked at as they come, not all in the end.
            patch.setattr(ngrams, "BLOCK", 40)
            got, why = joined(cleaner, cut(draw, text, draw.randrange(8)))
        assert why == reason
        # What is left out is not read to its end.
        assert got == cleaned if reason is None else cleaned.startswith(got)
    assert len(seen) == (1 if min_chars == 10_000 else 2 if min_chars == 0 else 3)
