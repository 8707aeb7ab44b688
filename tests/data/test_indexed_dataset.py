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
from forked import LIMIT_SECONDS
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.megatron_index import read_megatron, write_megatron

from retemper.engine.data.index_format import dataset_prefix
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.errors import UserError
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

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
    assert dataset.in_file_order and not dataset.remarks
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
    assert queue.get(timeout=LIMIT_SECONDS) == [1, 2, 3]
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
    "first pointer": (lambda i, b: _patch(i, 46, struct.pack("<q", -4)), "x.idx", "length 3 points to byte -4, which"),
    "pointer beyond the file": (
        lambda i, b: _patch(i, 54, struct.pack("<q", 20)),
        "x.idx",
        "sequence 1 of length 2 points to byte 20, which is not inside .*x.bin of 24 bytes",
    ),
    "pointer near the largest": (
        lambda i, b: _patch(i, 54, struct.pack("<q", 2**63 - 4)),
        "x.idx",
        "sequence 1 of length 2 points to byte 9223372036854775804, which is not inside",
    ),
    "pointer inside a token": (
        lambda i, b: _patch(i, 54, struct.pack("<q", 6)),
        "x.idx",
        "sequence 1 of length 2 points to byte 6, which is not a multiple of 4",
    ),
    "negative length": (lambda i, b: _patch(i, 38, struct.pack("<i", -2)), "x.idx", "sequence 1 of length -2 points"),
    "negative length, pointers to match": (
        lambda i, b: _patch(i, 34, struct.pack("<iiiqqq", 4, -1, 3, 0, 16, 12)),
        "x.idx",
        "sequence 1 of length -1 points",
    ),
    "pointers that do not match the lengths": (
        lambda i, b: _patch(i, 54, struct.pack("<qq", 16, 24)),
        "x.bin",
        "24 bytes, but .* ends at 24 . 1 tokens",
    ),
    "huge length": (
        lambda i, b: _patch(i, 38, struct.pack("<i", 2**31 - 1)),
        "x.idx",
        "sequence 1 of length 2147483647",
    ),
    "dtype code of smaller tokens": (lambda i, b: _patch(i, 17, b"\x08"), "x.idx", "means 2 bytes a token, .* 4 bytes"),
    "dtype code of larger tokens": (
        lambda i, b: _patch(i, 17, b"\x05"),
        "x.bin",
        "24 bytes, but .* tokens x 8 bytes = 28",
    ),
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


# --------------------------------------------------------------------------------------------------------------------
# Indexes that are not in file order, and document indices that fit no sequence


def write_scattered(prefix: Path, stream: list[int], places: list[tuple[int, int]], code: int = 4) -> None:
    """An index of sequences (first token, length) over a .bin of the tokens ``stream``."""
    write_megatron(prefix, [[stream[at : at + length]] for at, length in places], code)
    width = {1: 1, 4: 4, 5: 8, 8: 2}[code]
    pointers = b"".join(struct.pack("<q", width * at) for at, _ in places)
    _patch(Path(f"{prefix}.idx"), 34 + 4 * len(places), pointers)
    Path(f"{prefix}.bin").write_bytes(np.array(stream, f"u{width}").tobytes())


@settings(max_examples=100, deadline=None)
@given(data=st.data(), size=st.integers(1, 40), code=st.sampled_from([1, 4, 5, 8]))
def test_an_index_that_is_not_in_file_order_is_read_sequence_by_sequence(tmp_path_factory, data, size, code):
    """Filtered, permuted, repeated, overlapping: one stream in the order of the index, boundaries and mask with it."""
    stream = list(range(size))
    place = st.integers(0, size).flatmap(lambda at: st.tuples(st.just(at), st.integers(0, size - at)))
    places = data.draw(st.lists(place, min_size=2, max_size=9))
    prefix = tmp_path_factory.mktemp("d") / "x"
    write_scattered(prefix, stream, places, code)
    Path(f"{prefix}.mask.bin").write_bytes(bytes(token % 3 == 0 for token in stream))
    ends = list(itertools.accumulate(length for _, length in places))
    in_order = all(at == end for (at, _), end in zip(places, [0, *ends], strict=False))
    if in_order and ends[-1] != size:
        return  # of another .bin: refused
    try:
        dataset = IndexedDataset(prefix)
    except UserError as error:
        # By chance the pointers of tokens of another size.
        widths = {b - a for a, b in itertools.pairwise(at for at, _ in places)}
        assert "dtype code" in str(error) and widths
        return
    assert dataset.in_file_order == in_order == (not dataset.remarks)
    sequences = [stream[at : at + length] for at, length in places]
    expected = flat(sequences)
    assert [sequence.tolist() for sequence in dataset] == sequences
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    starts = [0, *ends[:-1]]
    assert dataset.num_tokens == len(expected)
    assert dataset.tokens(start, stop).tolist() == expected[start:stop]
    assert dataset.loss_mask(start, stop).tolist() == [token % 3 == 0 for token in expected[start:stop]]
    assert dataset.boundaries(start, stop).tolist() == sorted({at for at in starts if start < at < stop})
    assert dataset.next_boundary(start) == min((at for at in starts if at >= start), default=len(expected))
    assert [dataset.sequence_start(i) for i in range(len(places) + 1)] == [*starts, len(expected)]


def test_many_scattered_sequences(tmp_path):
    """More than the blocks that their beginnings are found by."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 6, 5000)
    starts = np.cumsum(lengths) - lengths
    order = generator.permutation(5000)[:4500]
    stream = generator.integers(0, 250, lengths.sum())
    write_scattered(
        tmp_path / "x", stream.tolist(), list(zip(starts[order].tolist(), lengths[order].tolist(), strict=True))
    )
    dataset = IndexedDataset(tmp_path / "x")
    expected = np.concatenate([stream[starts[i] : starts[i] + lengths[i]] for i in order])
    begins = np.cumsum(lengths[order]) - lengths[order]
    assert dataset.tokens(0, dataset.num_tokens).tolist() == expected.tolist()
    for start in generator.integers(0, len(expected) - 3000, 40).tolist():
        stop = start + int(generator.integers(0, 3000))
        assert dataset.tokens(start, stop).tolist() == expected[start:stop].tolist()
        assert (
            dataset.boundaries(start, stop).tolist() == np.unique(begins[(begins > start) & (begins < stop)]).tolist()
        )
    assert "4,500 sequences do not begin in .bin at the end of the previous one" in dataset.remarks[0]


@pytest.mark.parametrize(
    ("indices", "reason"),
    [
        ([0], "runs from 0 to 0, not from 0 to 3"),
        ([0, 1], "runs from 0 to 1, not from 0 to 3"),
        ([1, 2, 3], "runs from 1 to 3"),
        ([0, 1, 4], "runs from 0 to 4"),
        ([0, 3, 2, 3], "falls to 2 at entry 2"),
        ([0, -1, 3], "falls to -1 at entry 1"),
        ([], "is empty"),
    ],
)
def test_document_indices_that_fit_no_sequence_are_ignored(tmp_path, indices, reason):
    """Training reads sequences only; Megatron-LM left the list at [0] when it merged, before March 2021."""
    write_megatron(tmp_path / "x", [[[1, 2, 3]], [[4, 5]], [[6]]], 4)
    index = (tmp_path / "x.idx").read_bytes()
    index = index[:26] + struct.pack("<Q", len(indices)) + index[34:70] + struct.pack(f"<{len(indices)}q", *indices)
    (tmp_path / "x.idx").write_bytes(index)
    dataset = IndexedDataset(tmp_path / "x")
    assert [sequence.tolist() for sequence in dataset] == [[1, 2, 3], [4, 5], [6]]
    assert (dataset.num_documents, dataset.document_indices.tolist()) == (3, [0, 1, 2, 3])
    assert dataset.document_edges(1, 3).tolist() == [1, 2, 3]
    assert len(dataset.remarks) == 1 and reason in dataset.remarks[0]


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (38, struct.pack("<i", -2), "sequence 1 of length -2"),
        (70, struct.pack("<q", 16), "some sequences do not begin .* though most do; .*merge.py"),
        (110, struct.pack("<q", 4), "its list of documents falls to 3 at entry 3"),
        (110, struct.pack("<q", 3), None),
    ],
)
def test_a_very_large_index_is_checked_behind_the_opening(tmp_path, monkeypatch, offset, content, message):
    """Blocks of one sequence, of which opening sees the first and the last."""
    monkeypatch.setattr("retemper.engine.data.indexed_dataset.CHECKED_ON_OPENING", 2)
    monkeypatch.setattr("retemper.engine.data.index_check.CHECKED_AT_ONCE", 1)
    monkeypatch.setattr("retemper.engine.data.index_check._SPREAD_BLOCKS", 2)
    write_megatron(tmp_path / "x", [[[1, 2, 3]], [[4, 5]], [[6]], [[7]], [[8]]], 4)
    _patch(tmp_path / "x.idx", offset, content)
    dataset = IndexedDataset(tmp_path / "x")
    if message is None:
        dataset.finish_check()
        return
    with pytest.raises(UserError, match=message):
        dataset.finish_check()
    if "merge" in message:  # which reads it as it is
        assert not IndexedDataset(tmp_path / "x", check_whole=True).in_file_order
