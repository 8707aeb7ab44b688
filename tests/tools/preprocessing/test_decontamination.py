"""Decontamination refuses the documents that a slow comparison of word n-grams refuses."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from oracles.word_ngrams import ngrams_of, shares_ngram

from retemper.tools.preprocessing import ngrams
from retemper.tools.preprocessing.cleaning import decontamination
from retemper.tools.preprocessing.cleaning.decontamination import HashSet, NgramFilter
from retemper.tools.preprocessing.dedup import minhash

WORDS = ("a", "b", "c", "d", "é", "É", "ß", "SS", "don't", "x-y", "3.14", "天", "地玄", "かな", "กา", "\u0e49ข")
"""Few, so that n-grams meet by chance; some are several words or parts of words."""
POEM = "床前明月光。疑是地上霜。举头望明月。低头思故乡。"


@pytest.fixture(params=[60, 1 << 17])
def block(request, monkeypatch) -> int:
    """Characters hashed at once: texts are longer than some of these, or not."""
    for module in (ngrams, minhash, decontamination):
        monkeypatch.setattr(module, "BLOCK", request.param)
    return request.param


def random_text(draw: random.Random, longest: int) -> str:
    words = draw.choices(WORDS, k=draw.randrange(longest))
    return "".join(word + draw.choice([" ", "  ", ", ", "\n", ""]) for word in words)


def pasted(draw: random.Random, texts: list[str]) -> str:
    """A text with a part of one of ``texts`` in it, in other case and punctuation."""
    source = draw.choice(texts).split()
    first = draw.randrange(len(source) + 1)
    part = " ; ".join(source[first : first + draw.randrange(16)])
    return random_text(draw, 6) + " " + draw.choice([str, str.upper, str.title])(part) + " " + random_text(draw, 6)


@pytest.mark.parametrize("n", [1, 3, 8, 9, 13])
def test_documents_are_refused_as_by_comparing_all_ngrams(block, n):
    draw = random.Random(n)
    held_out = [random_text(draw, longest) for longest in (2, 4, 9, 12, 12, 14, 40) for _ in range(2)]
    if block > 100:
        # As a whole text without words, and one of many blocks.
        held_out += ["...", "", random_text(draw, 200)]
    ngrams = NgramFilter.build(held_out, n)
    assert ngrams.contaminated_batch([]).tolist() == []
    texts = [pasted(draw, held_out) for _ in range(150)] + [random_text(draw, 40) for _ in range(50)]
    texts += ["", "?!", *held_out, *(f"{text.upper()} a" for text in held_out), *(f"a {text}" for text in held_out)]
    expected = [shares_ngram(text, held_out, n) for text in texts]
    assert ngrams.contaminated_batch(texts).tolist() == expected
    assert [ngrams.contaminated(text) for text in texts[:40]] == expected[:40]
    assert n <= 3 or 20 < sum(expected) < 240
    for text, refused in zip(texts, expected, strict=True):
        watch = ngrams.watch()
        edges = [0, *sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(6))), len(text)]
        assert (any(watch.add(text[a:b]) for a, b in itertools.pairwise(edges)) or watch.end()) == refused, text


def test_thirteen_words_are_needed_and_enough():
    words = [f"w{i}" for i in range(40)]
    ngrams = NgramFilter.build([" ".join(words)])
    assert ngrams.num_ngrams == 28
    assert not ngrams.contaminated("start " + " ".join(words[5:17]) + " end")
    assert ngrams.contaminated("start " + " ".join(words[5:18]) + " end")
    assert ngrams.contaminated("START: " + ", ".join(words[27:]).upper())


def test_text_without_spaces_counts_its_characters():
    # 13 words are 26 of these.
    poem = POEM + "朝辞白帝彩云间。千里江陵一日还。"
    ngrams = NgramFilter.build([poem])
    letters = [c for c in poem if c.isalpha()]
    assert ngrams.contaminated("他说" + "".join(letters[2:28]) + "吗")
    assert not ngrams.contaminated("他说" + "".join(letters[2:27]) + "吗")
    assert ngrams.contaminated("。".join(letters))
    # 20 characters, as long as ten words, are looked for as a whole.
    short = NgramFilter.build([POEM])
    assert short.contaminated("李白的诗。" + POEM + "很美。")
    assert not short.contaminated("李白的诗。" + POEM[:-2] + "很美。")
    assert not NgramFilter.build(["明月光"]).contaminated(POEM)


def test_a_document_is_not_two_documents():
    words = [f"w{i}" for i in range(13)]
    ngrams = NgramFilter.build([" ".join(words)])
    assert ngrams.contaminated_batch([" ".join(words[:7]), " ".join(words[7:])]).tolist() == [False, False]
    assert NgramFilter.build([" ".join(words[:7]), " ".join(words[7:])]).contaminated(" ".join(words)) is False


def test_a_filter_is_the_same_from_its_file(tmp_path):
    draw = random.Random(1)
    held_out = [random_text(draw, 30) for _ in range(20)]
    ngrams = NgramFilter.build(iter(held_out), 9)
    ngrams.save(tmp_path / "filter")
    loaded = NgramFilter.load(tmp_path / "filter")
    assert (loaded.fingerprint, loaded.ngram, loaded.num_ngrams) == (ngrams.fingerprint, 9, ngrams.num_ngrams)
    texts = [pasted(draw, held_out) for _ in range(100)]
    assert loaded.contaminated_batch(texts).tolist() == ngrams.contaminated_batch(texts).tolist()
    assert NgramFilter.build(reversed(held_out), 9).fingerprint == ngrams.fingerprint
    assert NgramFilter.build(held_out[1:], 9).fingerprint != ngrams.fingerprint


def test_a_long_held_out_text_of_few_words_is_one_all_the_same(block):
    if block > 100:
        pytest.skip("no text of the test is longer than that")
    text = "one two three" + "." * 100
    assert NgramFilter.build([text]).contaminated("One, two three!")
    assert not NgramFilter.build([text]).contaminated("One, two three, four")


def test_num_ngrams_are_different_ngrams():
    draw = random.Random(5)
    texts = [random_text(draw, 60) for _ in range(30)]
    grams = {gram for text in texts for gram in ngrams_of(text, 2)}
    texts = [text for text in texts if any(True for _ in ngrams_of(text, 2))]
    assert NgramFilter.build(texts, 2).num_ngrams == len(grams)


@pytest.mark.parametrize("size", [0, 1, 7, 5000])
def test_hash_sets_are_sets(size):
    draw = np.random.default_rng(size)
    members = draw.integers(0, 2**64, size, dtype=np.uint64)
    members[: size // 3] = members[size // 2 : size // 2 + size // 3]
    # Beside the members: neighbours that differ in the lowest bit, and the ends of the range.
    asked = np.concatenate([members, members ^ np.uint64(1), np.array([0, 2**64 - 1], np.uint64)])
    asked = np.concatenate([asked, draw.integers(0, 2**64, 5000, dtype=np.uint64)])
    reference = set(members.tolist())
    expected = [index for index, value in enumerate(asked.tolist()) if value in reference]
    found = HashSet(members)
    assert len(found) == len(reference)
    assert found.find(asked).tolist() == expected
