"""Numbers read from files: how much is read, and where a place is found, against NumPy's own search."""

from __future__ import annotations

import os

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


@settings(max_examples=100, deadline=None)
@given(data=st.data(), distances=st.lists(st.sampled_from([0, 1, 2, 7, 1000, 10**9]), max_size=60))
def test_searching_equals_bisection(tmp_path_factory, data, distances):
    """In blocks of four entries and after three guesses by bisection; at places between, before and behind them."""
    path = tmp_path_factory.getbasetemp() / "entries"
    values = np.cumsum(distances, dtype=np.int64)
    path.write_bytes(b"xxx" + values.astype("<i8").tobytes())
    entries = file_entries.FileEntries(path, "<i8", 3, len(values))
    wanted = data.draw(st.sampled_from([0, *values.tolist()])) + data.draw(st.integers(-1, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_entries, "_BLOCK", 4)
        patch.setattr(file_entries, "_GUESSES", 3)
        end = int(values[-1]) + 5 if len(values) else 0
        assert file_entries.first_at_least(entries, wanted, end) == int(np.searchsorted(values, wanted))
        stop = data.draw(st.sampled_from([0, *values.tolist()])) + data.draw(st.integers(-1, 1))
        found = file_entries.entries_between(entries, wanted, stop, end)
    assert found.tolist() == [value for value in values.tolist() if wanted <= value < stop]
    assert found.dtype == np.int64


def test_a_disordered_index_gives_wrong_places_but_an_end(tmp_path):
    """Opening looks at the ends only, and verify() at the rest: a search must not run on for ever, or out of bounds."""
    values = np.random.default_rng(0).integers(-(2**62), 2**62, size=5_000)
    (tmp_path / "entries").write_bytes(values.astype("<i8").tobytes())
    entries = file_entries.FileEntries(tmp_path / "entries", "<i8", 0, len(values))
    for value in range(0, 10**6, 10**4):
        assert 0 <= file_entries.first_at_least(entries, value, 10**6) <= len(values)
        assert len(file_entries.entries_between(entries, value, value + 5, 10**6)) <= len(values)


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
