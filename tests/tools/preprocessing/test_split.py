"""Splits by content and limits of sources: documents stay where they are, and shares are met."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import xxhash

from retemper.engine.errors import UserError
from retemper.tools.preprocessing.dataset.split import DocumentSplit, within_limit


def digests_of(texts: list[str]) -> np.ndarray:
    """As the workers make them."""
    return np.frombuffer(b"".join(xxhash.xxh3_128_digest(t.encode()) for t in texts), ">u8").reshape(-1, 2)


TEXTS = [f"document {number}" for number in range(40_000)]


def mixed(word: int) -> int:
    """SplitMix64's finalizer, in Python's integers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


@pytest.mark.parametrize(
    "shares",
    [["0.98", "0.02"], ["0.5", "0.25", "0.25"], ["0.333333333", "0.333333333", "0.333333334"], ["1e-3", ".999"]],
)
def test_sides_are_cumulative_shares_of_a_hash(shares):
    split = DocumentSplit.parse(",".join(f"n{i}={share}" for i, share in enumerate(shares)))
    digests = digests_of(TEXTS[:5000])
    edges = [sum(map(Fraction, shares[: i + 1])) for i in range(len(shares) - 1)]
    expected = [sum(Fraction(mixed(int(word)), 2**64) >= edge for edge in edges) for word in digests[:, 1]]
    assert split.side(digests).tolist() == expected
    assert split.side(digests).dtype == np.int8


def test_shares_are_met_and_say_nothing_about_other_samples():
    digests = digests_of(TEXTS)
    sides = DocumentSplit.parse("train=0.7,valid=0.2,test=0.1").side(digests)
    assert np.allclose(np.bincount(sides) / len(TEXTS), [0.7, 0.2, 0.1], atol=0.01)
    # A corpus that was sampled by a plain hash of its texts is split like any other.
    for word in (0, 1):
        sample = sides[digests[:, word] < 2**60]
        assert len(sample) > 2000
        assert np.allclose(np.bincount(sample) / len(sample), [0.7, 0.2, 0.1], atol=0.04)


def test_documents_stay_on_their_side_as_the_corpus_grows():
    split = DocumentSplit.parse("train=0.9,valid=0.1")
    small = dict(zip(TEXTS[:1000], split.side(digests_of(TEXTS[:1000])).tolist(), strict=True))
    grown = TEXTS[::-1]
    large = dict(zip(grown, split.side(digests_of(grown)).tolist(), strict=True))
    assert {text: large[text] for text in small} == small
    assert set(small.values()) == {0, 1}


def test_earlier_sides_do_not_depend_on_later_shares():
    digests = digests_of(TEXTS)
    two = DocumentSplit.parse("train=0.9,valid=0.1").side(digests)
    more = DocumentSplit.parse("train=0.9,valid=0.02,test=0.0799999999,rest=0.0000000001").side(digests)
    assert ((two == 0) == (more == 0)).all()
    # A share that grows takes from its neighbour only.
    grown = DocumentSplit.parse("train=0.95,valid=0.05").side(digests)
    assert (grown[two == 0] == 0).all()


def test_extreme_words_have_a_side():
    split = DocumentSplit.parse("a=1e-19,b=0.9999999999999999999")
    assert split.bounds == (1, 2**64 - 1)  # ceil(1.8) words
    assert DocumentSplit.parse("a=0.5,b=0.5000000005").bounds == (2**63 - 1, 2**64 - 1)
    assert DocumentSplit.parse("a=1,b=1e-10").bounds == (2**64 - 1, 2**64 - 1)
    assert DocumentSplit.parse("a=0.5,b=0.4999999995").bounds == (2**63 - 1, 2**64 - 1)
    # A bound is the largest word of its side.
    word = np.array([[0, 5]], np.uint64)
    assert DocumentSplit(("a", "b"), (mixed(5), 2**64 - 1)).side(word).tolist() == [0]
    assert DocumentSplit(("a", "b"), (mixed(5) - 1, 2**64 - 1)).side(word).tolist() == [1]
    # mix64 maps zero to zero.
    assert split.side(np.zeros((1, 2), np.uint64)).tolist() == [0]
    assert split.side(np.empty((0, 2), np.uint64)).shape == (0,)


def test_many_digits_are_exact():
    # In floating point 0.1 + 0.2 is above 0.3.
    split = DocumentSplit.parse("a=0.1,b=0.2,c=0.7")
    assert split.names == ("a", "b", "c")
    assert split.bounds[1] == -(-3 * 2**64 // 10) - 1


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("train=0.98", "1 name(s)"),
        ("train=0.98,valid=0.03", "sum to 1.01"),
        ("train=0.98,valid=0.0199", "sum to 0.9999"),
        ("a=0.5,b=0.500000002", "sum to 1.000000002"),
        ("a=0.5,a=0.5", "'a' twice"),
        ("a=1.5,b=-0.5", "'1.5'"),
        ("a=1,b=0", "'0'"),
        ("a=1,b=-1e-12", "'-1e-12'"),
        ("a=nan,b=1", "'nan'"),
        ("a=0.5,b=half", "'half'"),
        ("a=1e-999999999,b=1", "'1e-999999999'"),
        ("a=1,b=", "''"),
        ("a/b=0.5,c=0.5", "'a/b'"),
        ("ä=0.5,c=0.5", "'ä'"),
        ("=0.5,c=0.5", "''"),
        ("a=0.5,,b=0.5", "name=share"),
        ("train,valid", "name=share"),
        ("", "name=share"),
        (",".join(f"n{i}=0.0078125" for i in range(128)), "128 name(s)"),
    ],
)
def test_nonsense_is_refused(argument, said):
    with pytest.raises(UserError, match="--split") as raised:
        DocumentSplit.parse(argument)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_spaces_do_not_matter():
    assert DocumentSplit.parse(" train = 0.98, valid= 0.02") == DocumentSplit.parse("train=0.98,valid=0.02")


@pytest.mark.parametrize("seed", range(20))
def test_the_first_documents_of_each_source_are_kept(seed):
    draw = np.random.default_rng(seed)
    count, limit = int(draw.integers(0, 300)), int(draw.integers(1, 40))
    sources, keep = draw.integers(0, 4, count).astype(np.int32), draw.random(count) < 0.7
    taken = [0] * 4
    expected = []
    for source, kept in zip(sources.tolist(), keep.tolist(), strict=True):
        expected.append(kept and taken[source] < limit)
        taken[source] += expected[-1]
    cuts = [0, *sorted(draw.integers(0, count + 1, 5).tolist()), count]
    counts = np.zeros(4, np.int64)
    parts = [within_limit(sources[a:b], keep[a:b], limit, counts) for a, b in itertools.pairwise(cuts)]
    assert np.concatenate(parts).tolist() == expected
    assert counts.tolist() == taken
