"""The shuffle of documents: a permutation that only the seed decides, in bounded memory, disk and number of files."""

from __future__ import annotations

import itertools
import os
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from retemper.tools.preprocessing.dataset.shuffle import ExternalShuffle, ShuffledDocuments
from retemper.tools.preprocessing.dataset_writer import FileRange

COLUMNS = ("tokens", "metadata")


def make_documents(count: int, seed: int = 0) -> list[tuple[bytes, bytes]]:
    """Some empty, most short, one in a hundred long."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(0, 60, count) * np.where(draw.random(count) < 0.01, 100, 1)
    return [(draw.bytes(int(size)), b"%d\n" % number) for number, size in enumerate(sizes)]


def reference_order(count: int, seed: int) -> list[int]:
    """By SplitMix64's finalizer in Python's integers."""

    def mixed(word: int) -> int:
        word %= 2**64
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        return word ^ word >> 31

    key = mixed(seed + 0x9E3779B97F4A7C15)
    return sorted(range(count), key=lambda number: mixed(number + key))


def add(shuffle: ExternalShuffle, documents: list[tuple[bytes, bytes]], path: Path | None = None, **rest) -> None:
    """Give documents, from memory or from a file in which other bytes come first."""
    lengths = {name: np.array([len(d[i]) for d in documents], np.int64) for i, name in enumerate(COLUMNS)}
    data: dict = {name: b"".join(d[i] for d in documents) for i, name in enumerate(COLUMNS)}
    if path is not None:
        for name in COLUMNS:
            file = path.with_suffix(f".{name}")
            file.write_bytes(b"head" + data[name] + b"tail")
            data[name] = FileRange(file, 4, 4 + len(data[name]))
    shuffle.add(lengths, data, **rest)


def documents_in(chunk: ShuffledDocuments) -> list[tuple[bytes, bytes]]:
    columns = []
    for name in COLUMNS:
        ends = np.cumsum(chunk.lengths[name]).tolist()
        content = bytes(chunk.data[name])
        assert len(content) == (ends[-1] if ends else 0)
        columns.append([content[a:b] for a, b in itertools.pairwise([0, *ends])])
    return list(zip(*columns, strict=True))


def shuffled(folder: Path, documents, seed=1, cuts=(), memory=4096, total=None, files=False):
    total = sum(len(a) + len(b) for a, b in documents) if total is None else total
    edges = [0, *cuts, len(documents)]
    with ExternalShuffle(folder / "buckets", seed, total, COLUMNS, memory) as shuffle:
        for first, last in itertools.pairwise(edges):
            add(shuffle, documents[first:last], folder / "input" if files else None)
        result = [document for chunk in shuffle.drain() for document in documents_in(chunk)]
    assert not (folder / "buckets").exists()
    return result


@pytest.mark.parametrize("seed", [0, 1, -5, 2**70 + 3])
def test_the_order_is_that_of_the_keys(tmp_path, seed):
    documents = make_documents(1500)
    assert shuffled(tmp_path, documents, seed) == [documents[i] for i in reference_order(1500, seed)]


@pytest.mark.parametrize("memory", [4, 1000, 50_000, 1 << 30])
@pytest.mark.parametrize(
    ("files", "total"),
    [
        (False, 0),
        (False, None),
        (False, 1 << 23),
        (True, None),
        pytest.param(True, 0, marks=pytest.mark.slow),
        pytest.param(True, 1 << 23, marks=pytest.mark.slow),
    ],
)
def test_only_the_seed_decides_the_order(tmp_path, memory, files, total):
    documents = make_documents(300)
    draw = np.random.default_rng(memory)
    cuts = sorted(draw.integers(0, 301, 12).tolist())
    expected = [documents[i] for i in reference_order(300, 7)]
    assert shuffled(tmp_path, documents, 7, cuts, memory, total, files) == expected


def test_documents_left_out_take_no_place(tmp_path):
    documents = make_documents(400)
    keep = np.random.default_rng(3).random(400) < 0.5
    kept = [d for d, wanted in zip(documents, keep, strict=True) if wanted]
    with ExternalShuffle(tmp_path / "a", 5, 10_000, COLUMNS, 2000) as shuffle:
        add(shuffle, documents[:150], keep=keep[:150])
        add(shuffle, documents[150:], keep=keep[150:])
        result = [document for chunk in shuffle.drain() for document in documents_in(chunk)]
    assert result == shuffled(tmp_path, kept, 5) != kept


def test_data_may_change_after_they_were_given(tmp_path):
    buffer = bytearray(b"abcdef")
    with ExternalShuffle(tmp_path / "a", 0, 10) as shuffle:
        for letter in b"xyz":
            buffer[:] = bytes([letter]) * 6
            shuffle.add({"tokens": np.array([6])}, {"tokens": memoryview(buffer)})
        (chunk,) = shuffle.drain()
        assert sorted(bytes(chunk.data["tokens"])) == sorted(b"xyz" * 6)


def test_an_order_is_as_good_as_any():
    """Each document falls in each tenth of the order about equally often, whatever its neighbours do."""
    places = np.array([np.argsort(reference_order(200, seed)) for seed in range(300)])
    tenths = np.stack([(places // 20 == t).sum(axis=0) for t in range(10)])
    # Of 2000 counts around 30 with a deviation of 5.2 none is 6 deviations off.
    assert np.abs(tenths - 30).max() < 31
    together = np.corrcoef(places[:, :-1].ravel(), places[:, 1:].ravel())[0, 1]
    assert abs(together) < 0.03


def test_nothing_in_is_nothing_out(tmp_path):
    assert shuffled(tmp_path, []) == []
    assert shuffled(tmp_path, [(b"", b"")] * 3) == [(b"", b"")] * 3


def test_lengths_that_do_not_fit_are_refused(tmp_path):
    with ExternalShuffle(tmp_path / "a", 0, 10) as shuffle, pytest.raises(ValueError, match=r"5 bytes.*sum to 4"):
        shuffle.add({"tokens": np.array([1, 3])}, {"tokens": b"abcde"})


def test_memory_disk_and_open_files_are_bounded(tmp_path):
    memory, part, parts = 1 << 20, 1 << 20, 12
    path = tmp_path / "input"
    path.write_bytes(np.random.default_rng(0).bytes(part))
    lengths = {"tokens": np.full(1024, 1024)}
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd"))) if os.path.isdir("/proc/self/fd") else 200
    tracemalloc.start()
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
    try:
        with ExternalShuffle(tmp_path / "buckets", 0, part * parts, memory_bytes=memory) as shuffle:
            for _ in range(parts):
                shuffle.add(lengths, {"tokens": FileRange(path, 0, part)})
            left = []
            for chunk in shuffle.drain():
                assert len(chunk.data["tokens"]) <= memory // 4
                left.append(sum(entry.stat().st_size for entry in os.scandir(tmp_path / "buckets")))
            # All of it is on the disk in the beginning, the last bucket at most in the end.
            assert left == sorted(left, reverse=True)
            assert left[0] > 0.9 * part * parts > 10 * left[-1]
            assert not os.listdir(tmp_path / "buckets")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1.5 * memory


def test_a_document_larger_than_memory_is_not_held(tmp_path):
    memory, size = 1 << 20, 24 << 20
    path = tmp_path / "input"
    content = np.random.default_rng(0).bytes(size)
    path.write_bytes(b"ab" + content + b"cd")
    tracemalloc.start()
    with ExternalShuffle(tmp_path / "buckets", 0, size, memory_bytes=memory) as shuffle:
        shuffle.add({"tokens": np.array([1, 1, size, 2])}, {"tokens": FileRange(path, 0, size + 4)})
        tokens = (chunk.data["tokens"] for chunk in shuffle.drain())
        found = [part == memoryview(content) for part in tokens if len(part) == size]
    assert tracemalloc.get_traced_memory()[1] < 2 * memory
    tracemalloc.stop()
    assert found == [True]
