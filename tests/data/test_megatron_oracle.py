"""The indexed dataset against Megatron-LM's own reader and writer, from the PyPI package megatron-core."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError
from retemper.tools.preprocessing.dataset_writer import FileRange, IndexedDatasetWriter, best_dtype
from retemper.tools.preprocessing.merging.merge import MergeOptions, merge

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Apex and Transformer Engine, which it wants for other things
        from megatron.core.datasets import indexed_dataset as megatron
except ImportError as error:
    pytest.skip(
        f"megatron-core cannot be imported ({error}); pip install --no-deps megatron-core==0.16.1",
        allow_module_level=True,
    )

IDS = {
    "uint16": st.integers(0, 2**16 - 1),
    "int32": st.integers(0, 2**31 - 1),
    **{name: st.integers(0, 127) for name in ("uint8", "int8")},
    "int16": st.integers(0, 2**15 - 1),
    "int64": st.integers(0, 2**53),
}
Documents = list[list[list[int]]]


@st.composite
def corpora(draw: st.DrawFn, least: int = 1) -> tuple[str, Documents]:
    """A dtype, and documents of several sequences of at least ``least`` tokens, of one, or of none."""
    dtype = draw(st.sampled_from(sorted(IDS)))
    sequences = st.lists(IDS[dtype], min_size=least, max_size=6)
    return dtype, draw(st.lists(st.lists(sequences, max_size=3), max_size=8))


def flat(document: list[list[int]]) -> list[int]:
    return [token for sequence in document for token in sequence]


def write_ours(prefix: Path, documents: Documents, dtype: str) -> None:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(flat(document), np.int64), [len(sequence) for sequence in document])


def write_theirs(prefix: Path, documents: Documents, dtype: str, by_item: bool = False) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=getattr(np, dtype))
    for document in documents:
        if by_item:
            for sequence in document:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64))
            builder.end_document()
        else:
            builder.add_document(flat(document), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")


def files(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def documents_of(dataset: megatron.IndexedDataset | IndexedDataset) -> Documents:
    edges = itertools.pairwise(dataset.document_indices.tolist())
    return [[dataset[i].tolist() for i in range(*edge)] for edge in edges]


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), by_item=st.booleans())
def test_both_write_the_same_bytes(tmp_path_factory, corpus, by_item):
    folder, (dtype, documents) = tmp_path_factory.mktemp("d"), corpus
    write_ours(folder / "ours", documents, dtype)
    write_theirs(folder / "theirs", documents, dtype, by_item)
    assert files(folder / "ours") == files(folder / "theirs")


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(), data=st.data())
def test_megatron_reads_ours(tmp_path_factory, corpus, data):
    """Token for token and document for document, whole sequences and parts of them, mapped and through reads."""
    prefix, (dtype, documents) = tmp_path_factory.mktemp("d") / "x", corpus
    write_ours(prefix, documents, dtype)
    assert megatron.IndexedDataset.exists(str(prefix))
    for mapped in (True, False):
        if mapped and not any(documents):
            continue  # Megatron-LM cannot map an empty file
        theirs = megatron.IndexedDataset(str(prefix), mmap=mapped)
        assert documents_of(theirs) == documents
        assert theirs.index.dtype == np.dtype(dtype)
        sequences = [sequence for document in documents for sequence in document]
        assert theirs.sequence_lengths.tolist() == [len(sequence) for sequence in sequences]
        if sequences:
            index = data.draw(st.integers(0, len(sequences) - 1))
            start = data.draw(st.integers(0, len(sequences[index]) - 1))
            assert theirs.get(index, start).tolist() == IndexedDataset(prefix)[index][start:].tolist()


@settings(max_examples=60, deadline=None)
@given(corpus=corpora(least=0), by_item=st.booleans())
def test_we_read_megatrons(tmp_path_factory, corpus, by_item):
    """Sequences without a token included, which its writer leaves."""
    prefix, (dtype, documents) = tmp_path_factory.mktemp("d") / "x", corpus
    write_theirs(prefix, documents, dtype, by_item)
    ours = IndexedDataset(prefix)
    assert ours.in_file_order and not ours.remarks
    assert documents_of(ours) == documents
    assert ours.tokens(0, ours.num_tokens).tolist() == flat([flat(document) for document in documents])
    assert (ours.dtype.name, ours.num_documents) == (dtype, len(documents))


@settings(max_examples=40, deadline=None)
@given(corpus=corpora(least=0), cut=st.integers(0, 8))
def test_both_join_to_the_same_bytes(tmp_path_factory, corpus, cut):
    """tools/merge.py and ``IndexedDatasetBuilder.add_index``, on datasets that Megatron-LM wrote."""
    folder, (dtype, documents) = tmp_path_factory.mktemp("d"), corpus
    builder = megatron.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=getattr(np, dtype))
    for name, part in (("a", documents[:cut]), ("b", documents[cut:])):
        write_theirs(folder / name, part, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron.gc, "collect", lambda: 0)  # after each dataset: a second in a process with torch
        for name in "ab":
            builder.add_index(str(folder / name))
    builder.finalize(str(folder / "theirs.idx"))
    merge(MergeOptions([str(folder / "a"), str(folder / "b")], str(folder / "ours")))
    assert files(folder / "ours") == files(folder / "theirs")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floating_point_is_refused(tmp_path, dtype):
    """Megatron-LM's format has it; token ids are none."""
    write_theirs(tmp_path / "x", [[[1, 2]]], dtype)
    with pytest.raises(UserError, match=r"x.idx: dtype code [67] is not valid for a token dataset"):
        IndexedDataset(tmp_path / "x")


def test_megatron_takes_no_notice_of_mask_metadata_and_sidecar(tmp_path):
    """A dataset with everything beside it, joined of two."""
    for name, first in (("a", 1), ("b", 7)):
        with IndexedDatasetWriter(tmp_path / name, np.uint16, mask=True, metadata=True) as writer:
            tokens = np.arange(first, first + 5)
            writer.add_documents(tokens, [3, 0, 2], mask=tokens % 2, metadata=[b"{}", b'{"n": 1}', b"{}"])
            writer.sidecar = Sidecar("acme/tiny", "ab" * 32, 400, True, "<|endoftext|>", 0, (), {"chat": True})
    merge(MergeOptions([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out")))
    ours = IndexedDataset(tmp_path / "out")
    assert ours.loss_mask(0, 10).tolist() == [True, False, True, False, True, True, False, True, False, True]
    expected: Documents = [[[1, 2, 3]], [], [[4, 5]], [[7, 8, 9]], [], [[10, 11]]]
    assert documents_of(megatron.IndexedDataset(str(tmp_path / "out"))) == documents_of(ours) == expected


def test_documents_at_once_and_from_files_are_theirs_too(tmp_path):
    documents: Documents = [[[5, 6]], [], [[7]], [[8, 9, 300]], []]
    tokens = np.array([5, 6, 7, 8, 9, 300], np.uint16)
    tokens.tofile(tmp_path / "tokens")
    write_theirs(tmp_path / "theirs", documents, "uint16")
    with IndexedDatasetWriter(tmp_path / "ours", np.uint16) as writer:
        writer.add_documents(tokens[:2], [2, 0])
        writer.add_ranges(FileRange(tmp_path / "tokens", 4, 12), np.array([1, 3, 0]))
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


@pytest.mark.parametrize("vocab_size", [1, 65499, 65500, 65536, 151_669])
def test_the_dtype_is_megatrons_choice(vocab_size):
    assert best_dtype(vocab_size) == np.dtype(megatron.DType.optimal_dtype(vocab_size))


@settings(max_examples=40, deadline=None)
@given(corpus=corpora(), data=st.data())
def test_both_read_an_index_that_was_filtered_or_permuted(tmp_path_factory, corpus, data):
    """Written by Megatron-LM's own writer over the former .bin; afterwards merge.py puts it in order."""
    folder, (dtype, documents) = tmp_path_factory.mktemp("d"), corpus
    write_theirs(folder / "x", documents, dtype)
    whole = megatron.IndexedDataset(str(folder / "x"), mmap=any(documents))
    numbers = st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=10) if len(whole) else st.just([])
    chosen = data.draw(numbers)
    index = megatron._IndexWriter(str(folder / "x.idx"), whole.index.dtype)
    lengths, pointers = whole.index.sequence_lengths[chosen], whole.index.sequence_pointers[chosen]
    with index as writer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_sequence_pointers", lambda lengths: pointers.tolist())
        writer.write(lengths.tolist(), None, list(range(len(chosen) + 1)))
    theirs = megatron.IndexedDataset(str(folder / "x"), mmap=any(documents))
    try:
        ours = IndexedDataset(folder / "x")
    except UserError as error:
        assert (chosen == list(range(len(chosen))) and "belongs to another dataset" in str(error)) or "dtype" in str(
            error
        )
        return
    expected = [theirs[number].tolist() for number in range(len(theirs))]
    assert [sequence.tolist() for sequence in ours] == expected
    assert ours.tokens(0, ours.num_tokens).tolist() == flat(expected)
    merge(MergeOptions([str(folder / "x")], str(folder / "merged")))
    merged = IndexedDataset(folder / "merged")
    assert merged.in_file_order and [sequence.tolist() for sequence in merged] == expected
    assert documents_of(megatron.IndexedDataset(str(folder / "merged"), mmap=bool(expected))) == documents_of(ours)
