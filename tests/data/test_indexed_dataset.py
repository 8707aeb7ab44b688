"""The indexed dataset against an independent reader and writer of the layout, and against a slow obvious reference."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.megatron_index import read_megatron, write_megatron

from retemper.engine.data.dataset_writer import IndexedDatasetWriter
from retemper.engine.data.index_format import dataset_prefix
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.errors import UserError

SEQUENCES = st.lists(st.integers(0, 127), min_size=1, max_size=6)
DOCUMENTS = st.lists(st.lists(SEQUENCES, max_size=3), max_size=7)


def flat(sequences: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(sequences))


def leftovers(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, code=st.sampled_from([1, 2, 3, 4, 5, 8]), modes=st.booleans())
def test_reads_what_megatron_writes(tmp_path_factory, documents, code, modes):
    prefix = tmp_path_factory.mktemp("d") / "x"
    write_megatron(prefix, documents, code, modes)
    dataset = IndexedDataset(prefix)
    dataset.verify()
    sequences = [sequence for document in documents for sequence in document]
    assert [sequence.tolist() for sequence in dataset] == sequences
    assert (len(dataset), dataset.num_sequences) == (len(sequences), len(sequences))
    assert (dataset.num_documents, dataset.num_tokens) == (len(documents), len(flat(sequences)))
    assert dataset.dtype.itemsize == {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[code]
    assert dataset.sequence_lengths.tolist() == [len(sequence) for sequence in sequences]
    assert dataset.document_indices.tolist() == [0, *itertools.accumulate(len(document) for document in documents)]


@settings(max_examples=60, deadline=None)
@given(documents=DOCUMENTS, dtype=st.sampled_from(["<u2", "<i4"]))
def test_megatron_reads_what_the_writer_writes(tmp_path_factory, documents, dtype):
    prefix = tmp_path_factory.mktemp("d") / "x"
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(flat(document), np.int64), [len(sequence) for sequence in document])
    written = read_megatron(prefix)
    assert written.documents == documents
    assert written.code == {"<u2": 8, "<i4": 4}[dtype]
    assert leftovers(prefix.parent) == ["x.bin", "x.idx"]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), sequences=st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=12))
def test_ranges_and_boundaries_equal_the_obvious_reference(tmp_path_factory, data, sequences):
    """Sequences of length zero, which Megatron-LM's tools can leave, included."""
    prefix = tmp_path_factory.mktemp("d") / "x"
    write_megatron(prefix, [[sequence] for sequence in sequences], data.draw(st.sampled_from([1, 4, 8])))
    dataset = IndexedDataset(prefix)
    stream = flat(sequences)
    starts = [sum(map(len, sequences[:i])) for i in range(len(sequences))]
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert dataset.tokens(start, stop).tolist() == stream[start:stop]
    assert dataset.tokens(start, stop).dtype == np.int64
    boundaries = dataset.boundaries(start, stop)
    assert boundaries.tolist() == sorted({position for position in starts if start < position < stop})
    assert boundaries.dtype == np.int64
    assert dataset.next_boundary(start) == min((p for p in starts if p >= start), default=len(stream))
    assert [dataset.sequence_start(i) for i in range(len(sequences) + 1)] == [*starts, len(stream)]


def test_out_of_range_is_an_index_error(tmp_path):
    write_megatron(tmp_path / "x", [[[1, 2]], [[3]]], 4)
    dataset = IndexedDataset(tmp_path / "x")
    for call in (
        lambda: dataset[2],
        lambda: dataset[-1],
        lambda: dataset.tokens(0, 4),
        lambda: dataset.tokens(2, 1),
        lambda: dataset.boundaries(-1, 2),
        lambda: dataset.sequence_start(3),
    ):
        with pytest.raises(IndexError):
            call()


def test_prefix_may_carry_a_suffix(tmp_path):
    write_megatron(tmp_path / "v1.2", [[[1, 2]]], 4)
    for name in ("v1.2", "v1.2.bin", "v1.2.idx"):
        assert IndexedDataset(tmp_path / name).prefix == str(tmp_path / "v1.2")
    assert dataset_prefix("a/b.jsonl") == "a/b.jsonl"


def _tokens_in_child(dataset: IndexedDataset, queue: multiprocessing.Queue) -> None:
    queue.put(dataset.tokens(0, 3).tolist())


def test_survives_pickling_and_fork(tmp_path):
    write_megatron(tmp_path / "x", [[[1, 2]], [[3]]], 4)
    dataset = IndexedDataset(tmp_path / "x")
    assert pickle.loads(pickle.dumps(dataset)).tokens(0, 3).tolist() == [1, 2, 3]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_tokens_in_child, args=(dataset, queue))
    child.start()
    assert queue.get(timeout=20) == [1, 2, 3]
    child.join()


def _patch(path: Path, offset: int, content: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)


# Three sequences (34 + 12 x 3 = 70) in three documents (8 x 4 = 32): 102 bytes of index, 24 bytes of int32 tokens.
DAMAGES = {
    "magic": (lambda i, b: _patch(i, 0, b"TNTIDX\0\0"), "x.idx", "MMIDIDX"),
    "version": (lambda i, b: _patch(i, 9, struct.pack("<Q", 2)), "x.idx", "version 2"),
    "dtype": (lambda i, b: _patch(i, 17, b"\x07"), "x.idx", "dtype code 7"),
    "count": (lambda i, b: _patch(i, 18, struct.pack("<Q", 2**40)), "x.idx", "102 bytes, but 34 . 12 x 1099511627776"),
    "index cut in the header": (lambda i, b: os.truncate(i, 20), "x.idx", "20 bytes, less than the header's 34"),
    "index cut": (
        lambda i, b: os.truncate(i, 94),
        "x.idx",
        "94 bytes, but 34 . 12 x 3 sequences . 8 x 4 document indices = 102",
    ),
    "index empty": (lambda i, b: os.truncate(i, 0), "x.idx", "begins with b''"),
    "index too long": (lambda i, b: i.write_bytes(i.read_bytes() + b"\0"), "x.idx", "103 bytes"),
    "tokens cut": (
        lambda i, b: os.truncate(b, 20),
        "x.bin",
        "20 bytes, but .*x.idx ends at 20 . 1 tokens x 4 bytes = 24",
    ),
    "tokens empty": (lambda i, b: os.truncate(b, 0), "x.bin", "0 bytes, but"),
    "tokens too long": (lambda i, b: os.truncate(b, 28), "x.bin", "28 bytes, but"),
    "first pointer": (lambda i, b: _patch(i, 46, struct.pack("<q", 4)), "x.idx", "points to byte 4, not 0"),
    "first document": (lambda i, b: _patch(i, 70, struct.pack("<q", 1)), "x.idx", "1 .. 3, but must run from 0"),
    "last document": (lambda i, b: _patch(i, 94, struct.pack("<q", 2)), "x.idx", "0 .. 2, but must run from 0"),
    "no tokens file": (lambda i, b: b.unlink(), "x.bin", "no such file"),
    "no index": (lambda i, b: i.unlink(), "x.idx", "no such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_on_opening(tmp_path, damage):
    write_megatron(tmp_path / "x", [[[1, 2, 3]], [[4, 5]], [[6]]], 4)
    inflict, file, message = DAMAGES[damage]
    inflict(tmp_path / "x.idx", tmp_path / "x.bin")
    with pytest.raises(UserError, match=message) as caught:
        IndexedDataset(tmp_path / "x")
    assert str(caught.value).startswith(str(tmp_path / file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "offset, content, message",
    [
        (54, struct.pack("<q", 8), "sequence 1 of length 2 points to byte 8, but .* end at byte 12"),
        (34, struct.pack("<i", 2), "sequence 1 of length 2 points to byte 12, but .* end at byte 8"),
        (38, struct.pack("<i", -2), "sequence 1 of length -2"),
        (78, struct.pack("<q", 3), "document index 2 is 2, less than"),
    ],
)
def test_verify_finds_damage_inside(tmp_path, monkeypatch, offset, content, message):
    monkeypatch.setattr("retemper.engine.data.indexed_dataset.CHUNK", 1)  # errors across chunks too
    write_megatron(tmp_path / "x", [[[1, 2, 3]], [[4, 5]], [[6]]], 4)
    IndexedDataset(tmp_path / "x").verify()
    _patch(tmp_path / "x.idx", offset, content)
    with pytest.raises(UserError, match=message):
        IndexedDataset(tmp_path / "x").verify()
