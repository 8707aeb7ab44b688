"""Hashed n-grams are equal where the n-grams of a slow reference are, however a long text is cut."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
from oracles.word_ngrams import kind_of, ngrams_of, shingles_of

from retemper.engine.data.splitmix import mix64, mix64_of
from retemper.tools.preprocessing import ngrams
from retemper.tools.preprocessing.cleaning import decontamination
from retemper.tools.preprocessing.dedup import minhash
from retemper.tools.preprocessing.ngrams import LongUnits, Units, units_of

ALPHABETS = {
    "latin": "ab B.\n",
    "accents": "eE\u0301\u0327 é'-",
    "chinese": "天地玄黄。\U00020000",
    "japanese": "かカ\u3099ー天 ",
    "thai": "กา\u0e49ข ",
    "mixed": "ab 天ก1.か\u0301",
    "korean": "\u1100\u1161\u11a8 한글",
    "invisible": "ab\u200d\u00ad\ufe0f\U000e0041 \u200b天",
    "emoji": "🙂a\U000e0100 b",
    "folding": "ßẞSsİiﬁf i\u0307\u017f ",
    "surrogates": "a\ud800 b\udfff",
}
NAMES = {"separator": 0, "ignored": 255, "word": 4, "half": 2, "quarter": 1}


def random_text(draw: random.Random, alphabet: str, size: int) -> str:
    return "".join(draw.choice(alphabet) for _ in range(size))


def hashes_of(units: Units, n: int, whole: bool = True) -> list[list[int]]:
    """Of each text."""
    starts, stops, offsets = units.ngrams(n, whole)
    hashes = units.spans(starts, stops).tolist()
    return [hashes[a:b] for a, b in zip(offsets.tolist(), offsets[1:].tolist(), strict=False)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of some characters, so that short texts are long."""

    def set_block(size: int) -> None:
        for module in (ngrams, minhash, decontamination):
            monkeypatch.setattr(module, "BLOCK", size)

    return set_block


def test_each_character_is_what_the_name_of_its_folded_form_says():
    weights = ngrams._tables()[1]
    wrong = []
    for code in range(0x110000):
        if unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs"):
            folded = chr(code).casefold()
            expected = NAMES[kind_of(folded)] if len(folded) == 1 else ngrams._EXPANDED
            if weights[code] != expected:
                wrong.append(hex(code))
    assert not wrong


def test_all_characters_are_folded_as_python_folds_them():
    every = [chr(code) for code in range(0x20000) if unicodedata.category(chr(code)) != "Cs"]
    text = "".join(f"x{character}y." for character in every)
    folded = unicodedata.normalize("NFC", text).casefold()
    found = [
        ngrams._hash_codes(ngrams._codes(part), np.array([len(part)])).hashes.tolist()
        for part in (unicodedata.normalize("NFC", text), folded)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ALPHABETS)
@pytest.mark.parametrize("block", [40, 1 << 17])
def test_hashes_are_equal_where_ngrams_are(small_blocks, name, block):
    small_blocks(block)
    draw = random.Random(name)
    texts = [random_text(draw, ALPHABETS[name], draw.randrange(40)) for _ in range(300)]
    gram_of: dict[int, tuple[str, ...]] = {}
    hash_of: dict[tuple[str, ...], int] = {}
    for n in (1, 2, 5):
        found: list[list[int]] = []
        for first, stop, units in units_of(texts):
            assert first == len(found)
            found += hashes_of(units, n)
            assert len(found) == stop
        for text, hashes in zip(texts, found, strict=True):
            grams = list(ngrams_of(text, n)) or list(shingles_of(text, n))
            assert len(hashes) == len(grams)
            for hashed, gram in zip(hashes, grams, strict=True):
                assert gram_of.setdefault(hashed, gram) == gram
                assert hash_of.setdefault(gram, hashed) == hashed


def test_texts_longer_than_a_block_are_left_to_the_caller(small_blocks):
    small_blocks(10)
    texts = ["", "a" * 11, "a b", "b" * 9, "c" * 9, "d" * 11, "d" * 11, "", ""]
    ranges = [(first, stop, len(units.offsets) - 1) for first, stop, units in units_of(texts)]
    assert [(first, stop, stop - first) for first, stop, _ in ranges] == ranges
    covered = [index for first, stop, _ in ranges for index in range(first, stop)]
    assert covered == [0, 2, 3, 4, 7, 8]


@pytest.mark.parametrize("name", ALPHABETS)
def test_a_long_text_has_the_same_ngrams_for_any_cut(small_blocks, name):
    draw = random.Random(name)
    for _ in range(60):
        text = random_text(draw, ALPHABETS[name], draw.randrange(1, 400))
        if max(map(len, shingles_of(text, 1)), default=0) == 0:
            continue
        n = draw.choice([1, 2, 5])
        small_blocks(1 << 17)
        ((_, _, units),) = units_of([text])
        (expected,) = hashes_of(units, n, whole=False)
        small_blocks(draw.choice([50, 64, 300]))
        longest = max(len(word) for gram in shingles_of(text, 1) for word in gram)
        if longest > 50:
            continue
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(8)))
        long = LongUnits(n)
        found: list[int] = []
        for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True):
            for part in long.add(text[first:last]):
                found += hashes_of(part, n, whole=False)[0]
        for part in long.end():
            found += hashes_of(part, n, whole=False)[0]
        assert found == expected
        if not expected:
            assert hashes_of(long.carried, n) == hashes_of(units, n)


def test_a_word_longer_than_a_block_takes_bounded_memory(small_blocks):
    small_blocks(64)
    long = LongUnits(5)
    held = []
    for _ in range(200):
        for _ in long.add("a" * 50):
            pass
        held.append(len(long._word) + len(long._text) + sum(map(len, long._normalizer._held)))
    assert max(held) <= 3 * 64
    assert sum(len(units.hashes) for units in long.end()) > 0


def test_mix64_is_splitmix64():
    # The first outputs of SplitMix64 with the seed 1234567, as published with Vigna's C code.
    states = 1234567 + np.arange(1, 6, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert mix64(states).tolist() == expected
    assert mix64_of(int(states[0])) == mix64_of(int(states[0]) - 2**64) == expected[0]
