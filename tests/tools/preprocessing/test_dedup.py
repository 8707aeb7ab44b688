"""Deduplication keeps the first of equal or similar documents, whatever memory there is and however they are cut."""

from __future__ import annotations

import itertools
import os
import random
import tracemalloc

import numpy as np
import pytest
import xxhash
from oracles.word_ngrams import shingles_of

from retemper.engine.errors import UserError
from retemper.tools.preprocessing import ngrams
from retemper.tools.preprocessing.cleaning import decontamination
from retemper.tools.preprocessing.dedup import duplicates, key_groups, minhash
from retemper.tools.preprocessing.dedup.duplicates import first_occurrences, near_duplicates, unite
from retemper.tools.preprocessing.dedup.key_groups import KeyGroups
from retemper.tools.preprocessing.dedup.minhash import MinHasher, choose_bands

rensa = pytest.importorskip("rensa", reason="--dedup minhash needs rensa")
datasketch = pytest.importorskip("datasketch", reason="the oracle of near-duplicates is datasketch")


@pytest.fixture(autouse=True)
def few_files(monkeypatch):
    """Thousands of small files would take most of the time. Their number makes no difference to a result."""
    monkeypatch.setattr(key_groups, "_BUCKET_BITS", 5)


def random_cuts(draw: random.Random, count: int) -> list[tuple[int, int]]:
    edges = [0, *sorted(draw.randrange(count + 1) for _ in range(draw.randrange(8))), count]
    return list(itertools.pairwise(edges))


# -------------------------------------------------------------------------------------------------------------------
# Exact duplicates


def first_of_each(items: list) -> list[bool]:
    """By a set."""
    seen: set = set()
    return [not (item in seen or seen.add(item)) for item in items]


@pytest.mark.parametrize("memory", [1, 3000, 20_000, 1 << 28])
@pytest.mark.parametrize("different", [1, 40, 100_000])
def test_the_first_of_equal_digests_is_kept(tmp_path, memory, different):
    draw = random.Random(memory + different)
    count = 500 if memory > 1 else 25
    texts = [str(draw.randrange(different)) for _ in range(count)]
    digests = np.frombuffer(b"".join(xxhash.xxh3_128_digest(t.encode()) for t in texts), ">u8").reshape(-1, 2)
    table = np.zeros(count, [("other", "<i4"), ("digest", "<u8", (2,))])
    table["digest"] = digests
    for _ in range(2):
        cuts = random_cuts(draw, count)
        parts = list(first_occurrences((table["digest"][a:b] for a, b in cuts), tmp_path, memory))
        assert [len(part) for part in parts] == [b - a for a, b in cuts]
        assert np.concatenate(parts).tolist() == first_of_each(texts)
        assert not os.listdir(tmp_path)


@pytest.mark.parametrize("memory", [1, 3000, 1 << 28])
@pytest.mark.parametrize("same_word", [0, 1])
def test_both_words_of_a_digest_count(tmp_path, memory, same_word):
    """Digests that agree in a word, as no hash does, are still told apart."""
    draw = np.random.default_rng(memory)
    digests = draw.integers(0, 40, (200 if memory > 1 else 20, 2)).astype(np.uint64)
    digests[:, same_word] = 5 << 60
    parts = first_occurrences([digests[:70], digests[70:]], tmp_path, memory)
    assert np.concatenate(list(parts)).tolist() == first_of_each([tuple(row) for row in digests.tolist()])


def test_no_documents_are_no_duplicates(tmp_path):
    empty = np.empty((0, 2), np.uint64)
    assert list(first_occurrences([], tmp_path)) == []
    assert [part.tolist() for part in first_occurrences([empty, empty], tmp_path)] == [[], []]


def test_an_iteration_that_ends_early_leaves_nothing(tmp_path):
    digests = np.random.default_rng(0).integers(0, 2**64, (500, 2), dtype=np.uint64)
    answers = first_occurrences([digests, digests], tmp_path, 1000)
    assert next(answers).all()
    answers.close()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("bits", [5, 10])
@pytest.mark.parametrize("different", [10, 1 << 40])
def test_exact_deduplication_takes_bounded_memory(tmp_path, monkeypatch, different, bits):
    """As many digests as take ten times the memory, all different or nearly all the same."""
    monkeypatch.setattr(key_groups, "_BUCKET_BITS", bits)
    draw = np.random.default_rng(0)
    memory, count, parts = 1 << 19, 5000, 16
    numbers = draw.integers(0, different, (parts, count), dtype=np.uint64)

    def digests():
        for part in numbers:
            words = (part + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
            yield np.stack([words, part], axis=1)

    tracemalloc.start()
    kept = sum(int(part.sum()) for part in first_occurrences(digests(), tmp_path, memory))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept == len(np.unique(numbers))
    # One array of digests is held beside.
    assert peak < 1.5 * memory + 4 * 16 * count


def test_pairs_lead_from_the_first_to_all_others(tmp_path):
    """Of each key: the pairs make one tree, with the smallest index at its root, in any order of arrival."""
    draw = np.random.default_rng(1)
    keys = draw.integers(0, 60, 300).astype(np.uint64)
    order = draw.permutation(300)
    for memory in (3000, 10_000, 1 << 20):
        groups = KeyGroups(tmp_path / "keys", 1, memory)
        hashed = (keys * np.uint64(0x9E3779B97F4A7C15))[order, None]
        found = [
            pair
            for chunk in (*groups.add(hashed[:200], order[:200]), *groups.add(hashed[200:], order[200:]), *groups.end())
            for pair in zip(chunk[0].tolist(), chunk[1].tolist(), strict=True)
        ]
        assert all(a < b and keys[a] == keys[b] for a, b in found)
        firsts = {int(np.flatnonzero(keys == key)[0]) for key in keys}
        assert {b for _, b in found} == set(range(300)) - firsts
        assert not (tmp_path / "keys").exists()


# -------------------------------------------------------------------------------------------------------------------
# Near-duplicates

WORDS = [f"word{i}" for i in range(3000)]


def jaccard(one: set, other: set) -> float:
    return len(one & other) / len(one | other) if one | other else 0.0


def edited(draw: random.Random, words: list[str], changes: int) -> list[str]:
    words = list(words)
    for _ in range(changes):
        words[draw.randrange(len(words))] = draw.choice(WORDS)
    return words


def make_corpus(draw: random.Random, families: int) -> list[str]:
    """Texts of 30 to 300 words, each with some versions of it that are changed more or less; in any order."""
    texts = []
    for _ in range(families):
        words = draw.choices(WORDS, k=draw.randrange(30, 300))
        versions = [edited(draw, words, int(len(words) * draw.choice([0, 0.01, 0.02, 0.05]))) for _ in range(3)]
        texts += [draw.choice([" ", "\n", ", "]).join(version) for version in (words, *versions)]
    draw.shuffle(texts)
    return texts


def clusters_of(count: int, pairs: list[tuple[int, int]]) -> list[bool]:
    """Whether each is the first of those that it is linked to, by search."""
    neighbours: list[set[int]] = [set() for _ in range(count)]
    for a, b in pairs:
        neighbours[a].add(b)
        neighbours[b].add(a)
    first = [True] * count
    for start in range(count):
        reached, todo = {start}, [start]
        while todo:
            for other in neighbours[todo.pop()] - reached:
                reached.add(other)
                todo.append(other)
        first[start] = min(reached) == start
    return first


@pytest.mark.parametrize("permutations", [64, 128])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_are_chosen_as_datasketch_chooses_them(threshold, permutations):
    lsh = datasketch.MinHashLSH(threshold, permutations)
    assert choose_bands(threshold, permutations) == (lsh.b, lsh.r)


def test_documents_agree_in_a_band_as_often_as_their_jaccard_similarity_says():
    draw = random.Random(0)
    hasher = MinHasher(0.7)
    pairs, true = [], []
    for _ in range(2000):
        words = draw.choices(WORDS, k=draw.randrange(60, 250))
        other = edited(draw, words, draw.randrange(1 + len(words) // 6))
        grams = [set(zip(*(side[i:] for i in range(5)), strict=False)) for side in (words, other)]
        true.append(jaccard(*grams))
        pairs.append((" ".join(words), " ".join(other)))
    true = np.array(true)
    bands = [hasher.bands_batch(side) for side in zip(*pairs, strict=True)]
    agree = (bands[0] == bands[1]).any(axis=1)
    for low in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        here = (true >= low) & (true < low + 0.1)
        expected = hasher.probability(true[here])
        assert here.sum() > 50
        # Five standard deviations.
        tolerance = 5 * np.sqrt((expected * (1 - expected)).sum()) / here.sum()
        assert abs(agree[here].mean() - expected.mean()) <= tolerance + 0.01, low
    assert agree[true == 1].all()


def test_values_of_signatures_are_independent_and_agree_as_often_as_the_similarity():
    """The means and the variance of the estimate that MinHash with independent permutations has."""
    hasher = MinHasher()
    draw = np.random.default_rng(0)
    for similarity in (0.2, 0.5, 0.9):
        shared, own = int(300 * similarity), int(300 * (1 - similarity) / 2)
        estimates = []
        for _ in range(200):
            grams = draw.integers(0, 2**64, shared + 2 * own, dtype=np.uint64)
            sides = np.concatenate([grams[: shared + own], grams[:shared], grams[shared + own :]])
            matrix = hasher._signature(sides, np.array([0, shared + own, 2 * (shared + own)], np.uint64), 128, 1)
            one, other = np.array(matrix.to_rows())
            estimates.append((one == other).mean())
        true = shared / (shared + 2 * own)
        deviation = np.sqrt(true * (1 - true) / 128)
        assert abs(np.mean(estimates) - true) < 5 * deviation / np.sqrt(200)
        assert 0.7 * deviation < np.std(estimates) < 1.3 * deviation


def test_duplicates_are_those_of_brute_force_and_as_many_as_datasketch_finds(tmp_path):
    draw = random.Random(4)
    texts = make_corpus(draw, 60)
    grams = [shingles_of(text, 5) for text in texts]
    similar = {(a, b): jaccard(grams[a], grams[b]) for a, b in itertools.combinations(range(len(texts)), 2)}
    threshold = 0.7
    hasher = MinHasher(threshold)
    (keep,) = near_duplicates([hasher.bands_batch(texts)], tmp_path)
    # What is left has nothing very similar before it; what is gone has something that is not dissimilar, or is linked
    # to it.
    for (_, later), similarity in similar.items():
        assert not (keep[later] and similarity > 0.95)
    linked = clusters_of(len(texts), [pair for pair, similarity in similar.items() if similarity > 0.4])
    assert (keep | ~np.array(linked)).all()
    theirs = datasketch.MinHashLSH(threshold, 128)
    found = []
    for number, text_grams in enumerate(grams):
        sketch = datasketch.MinHash(128)
        sketch.update_batch([" ".join(gram).encode() for gram in text_grams])
        found += [(int(other), number) for other in theirs.query(sketch)]
        theirs.insert(str(number), sketch)
    their_keep = np.array(clusters_of(len(texts), found))
    true_keep = np.array(
        clusters_of(len(texts), [pair for pair, similarity in similar.items() if similarity > threshold])
    )
    assert 60 <= true_keep.sum() < 150
    ours, others = (abs(int((kept != true_keep).sum())) for kept in (keep, their_keep))
    assert ours <= others + 8, (ours, others)
    assert ours < 0.1 * len(texts)


@pytest.mark.parametrize("memory", [1, 5000, 1 << 28])
def test_clusters_are_those_of_a_search_for_any_memory_and_cut(tmp_path, memory):
    draw = np.random.default_rng(memory)
    for different in (3, 50, 300):
        count = 20 if memory == 1 else 200
        bands = draw.integers(0, different, (count, 3)).astype(np.uint64)
        pairs = [
            (a, b)
            for a, b in itertools.combinations(range(count), 2)
            if ((bands[a] == bands[b]) & (bands[a] != 0)).any()
        ]
        expected = clusters_of(count, pairs)
        for seed in range(2):
            cuts = random_cuts(random.Random(seed), count)
            parts = list(near_duplicates((bands[a:b] for a, b in cuts), tmp_path, memory))
            assert [len(part) for part in parts] == [b - a for a, b in cuts]
            assert np.concatenate(parts).tolist() == expected
        assert not os.listdir(tmp_path)


def test_a_band_agrees_with_the_same_band_only(tmp_path):
    bands = np.array([[1, 2], [2, 1], [0, 0], [0, 0], [1, 3]], np.uint64)
    assert np.concatenate(list(near_duplicates([bands], tmp_path))).tolist() == [True, True, True, True, False]


def test_long_chains_are_one_cluster(tmp_path):
    """Documents that are each linked to the next one only, in an order that is bad for trees."""
    count = 3000
    order = np.random.default_rng(0).permutation(count)
    bands = np.zeros((count, 2), np.uint64)
    for step, (one, other) in enumerate(itertools.pairwise(order)):
        bands[[one, other], step % 2] = step + 1
    keep = np.concatenate(list(near_duplicates(np.array_split(bands, 7), tmp_path, 50_000)))
    assert np.flatnonzero(keep).tolist() == [0]


def test_sets_are_joined_as_a_search_joins_them():
    draw = np.random.default_rng(2)
    for _ in range(100):
        count = int(draw.integers(2, 40))
        parents = np.arange(count, dtype=np.uint32)
        pairs = np.sort(draw.integers(0, count, (2, int(draw.integers(1, 40)))), axis=0)
        pairs = pairs[:, pairs[0] < pairs[1]]
        half = pairs.shape[1] // 2
        unite(parents, *pairs[:, :half])
        unite(parents, *pairs[:, half:])
        expected = clusters_of(count, list(zip(*pairs.tolist(), strict=True)))
        assert (parents == np.arange(count)).tolist() == expected


def test_signatures_do_not_depend_on_the_batch():
    draw = random.Random(5)
    texts = ["", "...", "one", "one two", *make_corpus(draw, 10), "天地玄黄宇宙洪荒" * 3]
    hasher = MinHasher()
    expected = [hasher.bands(text).tolist() for text in texts]
    assert hasher.bands_batch(texts).tolist() == expected
    assert hasher.bands_batch(texts[::-1]).tolist() == expected[::-1]
    assert hasher.bands_batch([]).shape == (0, hasher.num_bands)
    assert not hasher.bands("").any()
    assert not hasher.bands("?!").any()
    assert hasher.bands("One, two!").tolist() == hasher.bands("one two").tolist() != hasher.bands("one").tolist()


@pytest.mark.parametrize("block", [60, 1 << 17])
def test_pieces_have_the_bands_of_the_whole(monkeypatch, block):
    draw = random.Random(block)
    texts = [
        "",
        " ",
        "one two",
        "e\u0301 one",
        *make_corpus(draw, 4),
        *("".join(draw.choices("天地ab. e\u0301", k=300))),
    ]
    hasher = MinHasher()
    expected = hasher.bands_batch(texts).tolist()
    for module in (ngrams, minhash, decontamination):
        monkeypatch.setattr(module, "BLOCK", block)
    assert hasher.bands_batch(texts).tolist() == expected
    for text, bands in zip(texts, expected, strict=True):
        pieces = [text[a:b] for a, b in random_cuts(draw, len(text))]
        assert hasher.bands_of_pieces(iter(pieces)).tolist() == bands
    assert hasher.bands_of_pieces([]).tolist() == [0] * hasher.num_bands


def test_what_decides_the_bands_is_in_the_fingerprint():
    makers = [MinHasher(), MinHasher(0.7), MinHasher(num_permutations=64), MinHasher(ngram=4), MinHasher(seed=2)]
    assert len({maker.fingerprint for maker in makers}) == len(makers)
    assert len({tuple(maker.bands("a b c d e f g h").tolist()) for maker in makers}) == len(makers)


def test_too_many_documents_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_DOCUMENTS", 10)
    assert len(list(near_duplicates([np.zeros((10, 1), np.uint64)], tmp_path))) == 1
    with pytest.raises(UserError, match="more than 10 documents"):
        list(near_duplicates([np.zeros((5, 1), np.uint64), np.zeros((6, 1), np.uint64)], tmp_path))


def test_another_rensa_is_refused(monkeypatch):
    monkeypatch.setattr(minhash, "_RENSA_ALGORITHM", 99)
    with pytest.raises(UserError, match="version 2, not 99: pip install"):
        MinHasher()
