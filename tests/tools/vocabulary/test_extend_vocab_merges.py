"""Byte-pair encoding that goes on from given merges, beside a reference that counts everything anew for each merge."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from retemper.tools.vocabulary.pair_merges import (
    FIRST_UNKNOWN,
    NO_RIGHT,
    Merge,
    PairCorpus,
    code_of,
    learn_merges,
    replay,
)


def naive(words, counts, first: int, number: int, least: int, cost: dict[int, int], texts: dict[int, str]):
    """(left, right, count) of each merge, and how many tokens are left. No text is made twice."""
    words, texts = [list(word) for word in words], dict(texts)
    merges = []
    for token in range(first, first + number):
        pairs: Counter[tuple[int, int]] = Counter()
        unknown: Counter[int] = Counter()
        for word, count in zip(words, counts, strict=True):
            # Overlapping pairs count as they stand, as they do everywhere else.
            for left, right in itertools.pairwise(word):
                if left >= 0 and right >= 0:
                    pairs[left, right] += count
            for symbol in word:
                if symbol < 0:
                    unknown[symbol] += count
        made_before = {text for token, text in texts.items() if token >= first}
        pairs = Counter({p: n for p, n in pairs.items() if texts[p[0]] + texts[p[1]] not in made_before})
        options = [(-count, *pair) for pair, count in pairs.items() if count >= least]
        options += [(-count * max(1, cost[s] - 1), s, NO_RIGHT) for s, count in unknown.items() if count >= least]
        if not options:
            break
        _, left, right = min(options)
        made = 0
        for number_of_word, word in enumerate(words):
            out: list[int] = []
            while word:
                if right == NO_RIGHT and word[0] == left:
                    out.append(token)
                    word = word[1:]
                elif right != NO_RIGHT and word[:2] == [left, right]:
                    out.append(token)
                    word = word[2:]
                else:
                    out.append(word[0])
                    word = word[1:]
                    continue
                made += counts[number_of_word]
            words[number_of_word] = out
        texts[token] = texts[left] + ("" if right == NO_RIGHT else texts[right])
        merges.append((left, right, made))
    sizes = [sum(cost.get(symbol, 1) for symbol in word) for word in words]
    return merges, sum(size * count for size, count in zip(sizes, counts, strict=True))


def random_words(seed: int, unknown: int) -> tuple[list[list[int]], list[int]]:
    draw = random.Random(seed)
    symbols = [*range(4), *(FIRST_UNKNOWN - i for i in range(unknown))]
    words = {tuple(draw.choice(symbols) for _ in range(draw.randint(1, 9))) for _ in range(60)}
    return [list(word) for word in sorted(words)], [draw.randint(1, 5) for _ in words]


def texts_of(unknown: int) -> dict[int, str]:
    return {i: "abcd"[i] for i in range(4)} | {FIRST_UNKNOWN - i: "xyz"[i] for i in range(unknown)}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("unknown", "least"), [(0, 1), (0, 6), (3, 1)])
def test_as_if_counted_anew_for_each_merge(seed, unknown, least):
    words, counts = random_words(seed, unknown)
    cost = {FIRST_UNKNOWN - i: (3, 1, 2)[i] for i in range(unknown)}
    expected, total = naive(words, counts, 100, 60, least, cost, texts_of(unknown))
    corpus = PairCorpus(words, counts, least, cost)
    found = learn_merges(corpus, 100, 60, texts_of(unknown), set(), lambda text: True, least)
    assert [(merge.left, merge.right, merge.count) for merge in found] == expected
    assert corpus.total == total
    assert len(expected) > 20


@pytest.mark.parametrize("seed", range(4))
def test_totals_are_those_of_the_words(seed):
    words, counts = random_words(seed, 0)
    merges = learn_merges(PairCorpus(words, counts), 100, 12, texts_of(0), set(), lambda text: True, 1)
    others, other_counts = random_words(seed + 100, 0)
    expected = [sum(len(word) * count for word, count in zip(others, other_counts, strict=True))]
    for merge in merges:
        for number, word in enumerate(others):
            out: list[int] = []
            while word:
                hit = word[:2] == [merge.left, merge.right]
                out.append(merge.token if hit else word[0])
                word = word[2:] if hit else word[1:]
            others[number] = out
        expected.append(sum(len(word) * count for word, count in zip(others, other_counts, strict=True)))
    assert replay(PairCorpus(*random_words(seed + 100, 0)), merges) == expected


def test_ties_go_to_the_smaller_ids_and_overlaps_to_the_left():
    corpus = PairCorpus([[3, 1], [0, 2], [0, 1]], [2, 2, 2])
    assert [(m.left, m.right) for m in learn_merges(corpus, 9, 3, texts_of(0), set(), lambda text: True, 1)] == [
        (0, 1),
        (0, 2),
        (3, 1),
    ]
    corpus = PairCorpus([[0, 0, 0, 0, 0]], [1])
    assert corpus.merge(0, 0, 7) == (2, [code_of(7, 0), code_of(7, 7)])
    assert corpus.total == 3


def test_texts_that_are_taken_or_not_allowed_are_left_alone():
    words, counts = [[0, 1, 2], [0, 1]], [3, 3]
    found = learn_merges(PairCorpus(words, counts), 9, 5, texts_of(0), {"ab"}, lambda text: len(text) < 3, 1)
    assert found == [Merge(1, 2, 9, 3)]
