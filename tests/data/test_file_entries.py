"""Numbers read from files: how much is read, and where a place is found, against NumPy's own search."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.megatron_index import write_megatron

from retemper.engine.data import file_entries
from retemper.engine.data.index_format import write_index
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.errors import UserError


@pytest.fixture
def reads(monkeypatch):
    """(bytes) of every read of a file, as they come."""
    sizes: list[int] = []
    pread = os.pread

    def counting(descriptor, size, offset):
        sizes.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counting)
    return sizes


def test_a_window_is_one_read_of_tokens_and_few_of_the_index(tmp_path, reads):
    """Documents of very different lengths, in an odd number, so that the int64 arrays are unaligned."""
    lengths = np.random.default_rng(0).lognormal(1.0, 1.2, size=200_001).astype(np.int64) + 1
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum()))
    write_index(tmp_path / "x.idx", "<u2", lengths)
    dataset = IndexedDataset(tmp_path / "x")
    reads.clear()
    starts = np.cumsum(lengths) - lengths
    for start in range(0, dataset.num_tokens - 50, dataset.num_tokens // 200):
        expected = starts[(starts > start) & (starts < start + 50)]
        assert dataset.boundaries(start, start + 50).tolist() == expected.tolist()
    assert len(reads) <= 200 * 3 and max(reads) <= 4096  # bisection takes 17 and more
    reads.clear()
    dataset.tokens(1000, 1050)
    assert reads == [100]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), distances=st.lists(st.sampled_from([0, 1, 2, 7, 1000, 10**9]), max_size=60))
def test_searching_equals_numpys(tmp_path_factory, data, distances):
    """In blocks of four entries, eight searches after one another, at places between, before and behind entries; what
    is remembered is as much as fits in one, in six, or in all entries."""
    path = tmp_path_factory.getbasetemp() / "entries"
    values = np.cumsum(distances, dtype=np.int64)
    path.write_bytes(b"xxx" + values.astype("<i8").tobytes())
    end = int(values[-1]) + data.draw(st.sampled_from([0, 5])) if len(values) else 0
    entries = file_entries.AscendingEntries(path, "<i8", 3, len(values), end)
    places = st.builds(lambda value, by: value + by, st.sampled_from([0, *values.tolist()]), st.integers(-1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_entries, "_BLOCK", 4)
        patch.setattr(file_entries, "_SEEN", data.draw(st.sampled_from([1, 6, 1000])))
        for low, high in data.draw(st.lists(st.tuples(places, places), min_size=8, max_size=8)):
            assert entries.first_at_least(low) == int(np.searchsorted(values, low))
            found = entries.between(low, high)
            assert found.tolist() == [value for value in values.tolist() if low <= value < high]
            assert found.dtype == np.int64


@pytest.mark.parametrize(
    "scales", [[8.0], [5.0, 11.0], [5.0, 9.0, 6.0, 8.0, 4.0, 10.0, 7.0]], ids=["one", "two regions", "seven regions"]
)
def test_regions_of_other_lengths_are_learnt(tmp_path, reads, scales):
    """Corpora that were joined one behind the other: the first search may take twice the reads of a bisection by
    blocks, and after some hundred two or three are enough again."""
    generator = np.random.default_rng(0)
    lengths = np.concatenate([generator.lognormal(scale, 1.2, 700_000 // len(scales)) for scale in scales])
    values = np.cumsum(lengths.astype(np.int64) + 1)
    values.astype("<i8").tofile(tmp_path / "entries")
    end = int(values[-1])
    entries = file_entries.AscendingEntries(tmp_path / "entries", "<i8", 0, len(values), end)
    counts = []
    for value in generator.integers(0, end, 1000).tolist():
        reads.clear()
        assert entries.first_at_least(value) == int(np.searchsorted(values, value))
        counts.append(len(reads))
    assert max(counts) <= 2 * np.log2(700_000 / 512) + 2
    assert np.mean(counts[500:]) < 2.5


def test_a_disordered_index_gives_wrong_places_but_an_end(tmp_path):
    """Opening looks at the ends only, and verify() at the rest: a search must not run on for ever, or out of bounds."""
    values = np.random.default_rng(0).integers(-(2**62), 2**62, size=5_000)
    (tmp_path / "entries").write_bytes(values.astype("<i8").tobytes())
    entries = file_entries.AscendingEntries(tmp_path / "entries", "<i8", 0, len(values), 10**6)
    for value in range(0, 10**6, 10**4):
        assert 0 <= entries.first_at_least(value) <= len(values)
        assert len(entries.between(value, value + 5)) <= len(values)


def test_threads_may_search_at_once(tmp_path):
    values = np.cumsum(np.random.default_rng(0).integers(0, 1000, size=300_000))
    values.astype("<i8").tofile(tmp_path / "entries")
    entries = file_entries.AscendingEntries(tmp_path / "entries", "<i8", 0, len(values), int(values[-1]))
    wanted = np.random.default_rng(1).integers(0, int(values[-1]), 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(entries.first_at_least, wanted)) == np.searchsorted(values, wanted).tolist()


def test_a_file_that_is_cut_while_it_is_open_is_an_error_of_one_line(tmp_path):
    write_megatron(tmp_path / "x", [[[1, 2, 3]], [[4, 5]], [[6]]], 4)
    dataset = IndexedDataset(tmp_path / "x")
    os.truncate(tmp_path / "x.bin", 9)
    assert dataset.tokens(0, 2).tolist() == [1, 2]
    with pytest.raises(UserError, match=r"x\.bin: ends at byte 9, but was longer when it was opened"):
        dataset.tokens(0, 6)


def test_long_reads_are_put_together(tmp_path, monkeypatch):
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: pread(descriptor, min(size, 5), offset))
    write_megatron(tmp_path / "x", [[[1, 2, 3]], [[4, 5]], [[6]]], 4)
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.tokens(0, 6).tolist() == [1, 2, 3, 4, 5, 6]
    assert dataset.boundaries(0, 6).tolist() == [3, 5]
