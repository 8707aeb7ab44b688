"""Writing indexed datasets and their sidecars, against an independent reader of the layout."""

from __future__ import annotations

import errno
import itertools
import json
import mmap
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.megatron_index import read_megatron, write_megatron
from sidecars import SIDECAR

from retemper.engine.data import index_format
from retemper.engine.data.index_format import write_index
from retemper.engine.data.indexed_dataset import IndexedDataset
from retemper.engine.data.sidecar import Sidecar
from retemper.engine.errors import UserError
from retemper.tools.preprocessing import dataset_writer, hashed_file
from retemper.tools.preprocessing.dataset_writer import FileArray, FileRange, IndexedDatasetWriter, best_dtype


def flat(sequences: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(sequences))


def leftovers(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def file_range(path: Path, content: bytes, before: bytes = b"", after: bytes = b"") -> FileRange:
    """``content``, as a part of a larger file."""
    path.write_bytes(before + content + after)
    return FileRange(path, len(before), len(before) + len(content))


def contents(prefix: Path, *ends: str) -> list[bytes]:
    return [prefix.with_name(prefix.name + end).read_bytes() for end in ends]


def test_documents_at_once_and_ranges_equal_documents_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(index_format, "ENTRIES_AT_ONCE", 2)
    documents = [[5, 6], [], [7], [8, 9, 300], []]
    lengths = np.array([len(document) for document in documents])
    tokens = np.array(flat(documents))
    with IndexedDatasetWriter(tmp_path / "one", "<u2") as writer:
        for document in documents:
            writer.add_document(document)
    with IndexedDatasetWriter(tmp_path / "many", "<u2") as writer:
        writer.add_documents(tokens[:3], lengths[:3])
        shard = file_range(writer.scratch / "shard", tokens[3:].astype("<u2").tobytes(), b"before", b"after")
        writer.add_ranges(shard, lengths[3:])
    assert (writer.num_documents, writer.num_sequences, writer.num_tokens, writer.max_token_id) == (5, 3, 6, 300)
    assert read_megatron(tmp_path / "one").documents == [[d] if d else [] for d in documents]
    assert contents(tmp_path / "one", ".bin", ".idx") == contents(tmp_path / "many", ".bin", ".idx")


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.lists(st.lists(st.lists(st.integers(0, 127), max_size=4), max_size=3), max_size=5), max_size=4),
    code=st.sampled_from([1, 2, 3, 4, 5, 8]),
    chunk=st.integers(1, 4),
    block=st.sampled_from([8, 16, 1 << 20]),
)
def test_ranges_with_ends_are_taken_as_they_are(tmp_path_factory, parts, code, chunk, block):
    """Documents of several sequences, of none, and sequences of no token, read from files a chunk at a time."""
    folder = tmp_path_factory.mktemp("d")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_format, "ENTRIES_AT_ONCE", chunk)
        patch.setattr(hashed_file, "_BLOCK_BYTES", block)
        with IndexedDatasetWriter(folder / "all", index_format.DTYPES[code]) as writer:
            for number, documents in enumerate(parts):
                write_megatron(folder / str(number), documents, code)
                dataset = IndexedDataset(folder / str(number))
                count = dataset.num_sequences
                lengths = FileArray(dataset.idx_path, "<i4", 34, count)
                ends = FileArray(dataset.idx_path, "<i8", 34 + 12 * count + 8)
                assert lengths[0:count].tolist() == dataset.sequence_lengths.tolist()
                assert ends[0 : len(ends)].tolist() == dataset.document_indices[1:].tolist()
                writer.add_ranges(FileRange(dataset.bin_path, 0, os.path.getsize(dataset.bin_path)), lengths, ends=ends)
    write_megatron(folder / "expected", list(itertools.chain(*parts)), code)
    assert contents(folder / "all", ".bin", ".idx") == contents(folder / "expected", ".bin", ".idx")
    assert writer.max_token_id == max((max(s, default=-1) for p in parts for d in p for s in d), default=-1)


def test_ranges_that_do_not_fit_are_refused(tmp_path):
    tokens = np.arange(4, dtype="<u2").tobytes()
    path = tmp_path / "part"
    for lengths, ends, mask, message in (
        ([3], None, None, "part: 8 bytes, but its documents' lengths sum to 6 bytes"),
        ([4], [2], None, "end at sequence 2, but there are 1 lengths"),
        ([4], [], None, "end at sequence 0, but there are 1 lengths"),
        ([4], None, 3, "part: 3 bytes, but its documents' lengths sum to 4 bytes"),
    ):
        with pytest.raises(ValueError, match=message), IndexedDatasetWriter(tmp_path / "x", "<u2", mask=True) as writer:
            writer.add_ranges(
                file_range(path, tokens),
                np.array(lengths),
                ends=None if ends is None else np.array(ends, np.int64),
                mask=None if mask is None else FileRange(path, 0, mask),
            )
    with (
        pytest.raises(ValueError, match="part: 8 bytes, but its documents' lengths sum to 10 bytes"),
        IndexedDatasetWriter(tmp_path / "x", "<u2") as writer,
    ):
        writer.add_ranges(FileRange(path, 0, 10), np.array([5]))  # past the end of the file
    assert leftovers(tmp_path) == ["part"]


def test_mask_and_metadata_stand_beside_the_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(index_format, "ENTRIES_AT_ONCE", 2)
    part = file_range(tmp_path / "tokens", np.array([4, 5, 6], "<i4").tobytes())
    mask = file_range(tmp_path / "mask", b"\1\0\0", b"xx", b"y")
    metadata = file_range(tmp_path / "metadata", b'{"n":6}\n{"n":7}\n', b"[]\n", b"rest")
    with IndexedDatasetWriter(tmp_path / "x", "<i4", mask=True, metadata=True) as writer:
        writer.add_documents(
            [1, 2, 3], [2, 0, 1], mask=[False, True, 256], metadata=[b'{"n":1}', b"{}", '{"ü":3}'.encode()]
        )
        writer.add_ranges(part, np.array([1, 2]), mask=mask, metadata=metadata)
        writer.add_ranges(part, np.array([0, 3]))  # without: ones, and empty objects
        writer.add_document([9, 9])
        writer.sidecar = SIDECAR
    assert leftovers(tmp_path) == [
        "mask",
        "metadata",
        "tokens",
        "x.bin",
        "x.idx",
        "x.json",
        "x.mask.bin",
        "x.metadata.jsonl",
    ]
    written, lines = contents(tmp_path / "x", ".mask.bin", ".metadata.jsonl")
    assert list(written) == [0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]
    assert lines.decode().split("\n") == ['{"n":1}', "{}", '{"ü":3}', '{"n":6}', '{"n":7}', "{}", "{}", "{}", ""]
    assert read_megatron(tmp_path / "x").documents == [[[1, 2]], [], [[3]], [[4]], [[5, 6]], [], [[4, 5, 6]], [[9, 9]]]
    sidecar = Sidecar.read(tmp_path / "x")
    assert sidecar.mask_xxh3_128 == xxhash.xxh3_128_hexdigest(written)
    assert sidecar.metadata_xxh3_128 == xxhash.xxh3_128_hexdigest(lines)
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.has_loss_mask
    assert dataset.loss_mask(1, 6).tolist() == [True, True, True, False, False]
    with pytest.raises(IndexError):
        dataset.loss_mask(0, 12)
    # Replaced by a dataset without them, neither stays.
    with IndexedDatasetWriter(tmp_path / "x", "<i4", overwrite=True) as writer:
        writer.add_document([1])
    assert leftovers(tmp_path) == ["mask", "metadata", "tokens", "x.bin", "x.idx"]
    assert not IndexedDataset(tmp_path / "x").has_loss_mask
    assert IndexedDataset(tmp_path / "x").loss_mask(0, 1) is None


@pytest.mark.parametrize(
    "extra", [{"mask": [1]}, {"mask": [1, 0, 1]}, {"metadata": [b"{}"]}, {"metadata": [b"{}", b"{\n}"]}]
)
def test_mask_and_metadata_that_do_not_fit_are_refused(tmp_path, extra):
    with (
        pytest.raises(ValueError, match=r"a mask of shape|lines of metadata for 2 documents"),
        IndexedDatasetWriter(tmp_path / "x", "<u2", mask="mask" in extra, metadata="metadata" in extra) as writer,
    ):
        writer.add_documents([1, 2], [1, 1], **extra)
    assert leftovers(tmp_path) == []


def test_a_mask_of_another_dataset_is_refused(tmp_path):
    write_megatron(tmp_path / "x", [[[1, 2, 3]]], 4)
    (tmp_path / "x.mask.bin").write_bytes(b"\1\1")
    with pytest.raises(UserError, match=r"x.mask.bin: 2 bytes, but .*x.bin holds 3 tokens"):
        IndexedDataset(tmp_path / "x")


def _unsupported(number: int):
    def call(*arguments, **keywords):
        raise OSError(number, os.strerror(number))

    return call


def _a_little(source: int, target: int, count: int, offset: int) -> int:
    return os.write(target, os.pread(source, min(count, 99), offset))


COPY_CALLS: dict[str, dict] = {
    "as here": {},
    "copies a little at a time": {"copy_file_range": _a_little},
    "no copy_file_range": {"copy_file_range": _unsupported(errno.EXDEV)},
    "copy_file_range copies nothing": {"copy_file_range": lambda *arguments: 0},
    "neither": {"copy_file_range": _unsupported(errno.ENOSYS), "sendfile": _unsupported(errno.EINVAL)},
    "macOS": {"copy_file_range": None, "sendfile": _unsupported(errno.ENOTSOCK)},
    "Windows": {"copy_file_range": None, "sendfile": None},
}


@pytest.mark.parametrize("platform", COPY_CALLS)
@pytest.mark.parametrize("block", [2 * mmap.PAGESIZE, 64 << 20])
def test_ranges_are_copied_on_every_platform(tmp_path, monkeypatch, platform, block):
    """Ranges that begin and end within pages, across the blocks in which they are hashed, the largest id anywhere."""
    for name, call in COPY_CALLS[platform].items():
        if call is None:
            monkeypatch.delattr(os, name, raising=False)
        else:
            monkeypatch.setattr(os, name, call, raising=False)
    monkeypatch.setattr(hashed_file, "_BLOCK_BYTES", block)
    count = 5 * mmap.PAGESIZE
    rng = np.random.default_rng(0)
    for at in (0, block // 4 - 1, block // 4, count - 1):
        if at >= count:
            continue
        tokens = rng.integers(0, 1000, count).astype("<i4")
        tokens[at] = 70_000
        part = file_range(tmp_path / "part", tokens.tobytes(), b"x" * 4099, b"\xff" * 4099)
        seen: list[bytes] = []
        with IndexedDatasetWriter(tmp_path / "x", "<i4", overwrite=True) as writer:
            writer.add_document([1])
            writer.add_ranges(
                replace(part, on_block=lambda view, seen=seen: seen.append(bytes(view))), np.array([count])
            )
            writer.add_document([2])
            writer.sidecar = SIDECAR
        expected = np.concatenate([[1], tokens, [2]]).astype("<i4").tobytes()
        assert (tmp_path / "x.bin").read_bytes() == expected
        assert b"".join(seen) == tokens.tobytes()
        sidecar = Sidecar.read(tmp_path / "x")
        assert (sidecar.max_token_id, sidecar.tokens) == (70_000, count + 2)
        assert sidecar.bin_xxh3_128 == xxhash.xxh3_128_hexdigest(expected)


@pytest.mark.parametrize(
    ("name", "number"), [("copy_file_range", errno.ENOSPC), ("copy_file_range", errno.EIO), ("fsync", errno.ENOSPC)]
)
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, name, number):
    part = file_range(tmp_path / "part", b"\1\0\2\0")
    monkeypatch.setattr(os, name, _unsupported(number))
    with pytest.raises(OSError, match=os.strerror(number)), IndexedDatasetWriter(tmp_path / "x", "<u2") as writer:
        writer.add_ranges(part, np.array([2]))
    assert leftovers(tmp_path) == ["part"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_is_full_on_closing_leaves_nothing(tmp_path):
    """What is still buffered cannot be written when the files are closed; the folder goes nevertheless."""
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "x", "<u2") as writer:
        full = os.open("/dev/full", os.O_WRONLY)
        writer.add_document([1])
        os.dup2(full, writer._lengths.fileno())
        os.close(full)
        raise RuntimeError
    assert leftovers(tmp_path) == []


def test_a_file_that_shrinks_while_it_is_copied_is_noticed(tmp_path, monkeypatch):
    part = file_range(tmp_path / "part", b"\1\0\2\0")
    monkeypatch.setattr(os.path, "getsize", lambda path: 4)
    os.truncate(part.path, 2)
    with pytest.raises(OSError, match="became shorter"), IndexedDatasetWriter(tmp_path / "x", "<u2") as writer:
        writer.add_ranges(part, np.array([2]))
    assert leftovers(tmp_path) == ["part"]


def test_several_datasets_are_prepared_before_the_first_appears(tmp_path):
    with IndexedDatasetWriter(tmp_path / "a", "<u2") as a, IndexedDatasetWriter(tmp_path / "b", "<u2") as b:
        a.add_document([1])
        b.add_document([2])
        a.prepare()
        b.prepare()
        assert not [name for name in leftovers(tmp_path) if name[0] != "."]
    assert leftovers(tmp_path) == ["a.bin", "a.idx", "b.bin", "b.idx"]


def test_a_given_folder_is_written_in_and_removed(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", "<u2", scratch=tmp_path / "work" / "out") as writer:
        writer.add_document([1])
        assert leftovers(tmp_path) == ["work"]
    assert leftovers(tmp_path / "work") == []
    assert leftovers(tmp_path) == ["work", "x.bin", "x.idx"]


def test_a_sequence_longer_than_the_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_writer, "MAX_LENGTH", 2)
    for add in (
        lambda writer: writer.add_document([1, 2, 3]),
        lambda writer: writer.add_documents([1, 2, 3], [3]),
        lambda writer: writer.add_ranges(file_range(writer.scratch / "p", bytes(6)), np.array([3]), ends=np.array([1])),
    ):
        with (
            pytest.raises(UserError, match=r"of 3 tokens .* limit of 2"),
            IndexedDatasetWriter(tmp_path / "x", "<u2") as w,
        ):
            add(w)
    assert leftovers(tmp_path) == []


def test_write_index_makes_each_sequence_a_document(tmp_path):
    np.arange(6, dtype="<i4").tofile(tmp_path / "x.bin")
    digest = write_index(tmp_path / "x.idx", "<i4", np.array([1, 2, 3]))
    assert read_megatron(tmp_path / "x").documents == [[[0]], [[1, 2]], [[3, 4, 5]]]
    assert digest == xxhash.xxh3_128_hexdigest((tmp_path / "x.idx").read_bytes())


def test_tokens_that_do_not_fit_are_refused(tmp_path):
    for tokens, lengths in (([65536], [1]), ([-1], [1]), ([1, 2], [1]), ([1, 2], [3, -1])):
        with (
            pytest.raises(ValueError, match=r"do not fit|lengths sum to"),
            IndexedDatasetWriter(tmp_path / "x", "<u2") as writer,
        ):
            writer.add_documents(tokens, lengths)
    assert leftovers(tmp_path) == []


def test_dtype_is_megatrons_choice():
    assert best_dtype(65499) == np.uint16
    assert best_dtype(65500) == np.int32


def test_failure_leaves_nothing_and_keeps_the_old_dataset(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", "<u2") as writer:
        writer.add_document([1])
    with pytest.raises(RuntimeError), IndexedDatasetWriter(tmp_path / "x", "<u2", overwrite=True) as writer:
        writer.add_document([2, 3])
        assert IndexedDataset(tmp_path / "x").tokens(0, 1).tolist() == [1]
        raise RuntimeError
    assert leftovers(tmp_path) == ["x.bin", "x.idx"]
    assert IndexedDataset(tmp_path / "x").tokens(0, 1).tolist() == [1]


@pytest.mark.parametrize("end", [".bin", ".idx", ".json", ".mask.bin", ".metadata.jsonl"])
def test_a_file_of_others_is_never_replaced(tmp_path, end):
    (tmp_path / f"x{end}").write_text("mine")
    for overwrite in (False, True):
        with (
            pytest.raises(UserError, match=f"x{end}: exists and is not recognised"),
            IndexedDatasetWriter(tmp_path / "x", "<u2", overwrite=overwrite),
        ):
            pass
    assert leftovers(tmp_path) == [f"x{end}"]
    assert (tmp_path / f"x{end}").read_text() == "mine"


@pytest.mark.parametrize("deaths", range(9))
def test_a_death_amid_the_renames_leaves_no_mixture(tmp_path, monkeypatch, deaths):
    """Same sizes before and after, so that new tokens under the old index could not be told from a whole dataset; and
    the sidecar, mask and metadata go and come with their tokens."""
    texts = {}
    for name, tokens, lengths in (("old", [1, 2, 3], [1, 2]), ("new", [4, 5, 6], [2, 1])):
        with IndexedDatasetWriter(tmp_path / name, "<u2", mask=True, metadata=True) as writer:
            writer.add_documents(tokens, lengths, mask=np.array(tokens) % 2, metadata=[b"[%d]" % t for t in tokens[:2]])
            writer.sidecar = replace(SIDECAR, tokenizer=name)
        texts[name] = {path.name[3:]: path.read_bytes() for path in tmp_path.glob(f"{name}.*")}
        for path in tmp_path.glob(f"{name}.*"):
            if name == "old":
                path.rename(tmp_path / f"x{path.name[3:]}")
    steps = 0

    def dying(original):
        def call(*arguments, **keywords):
            nonlocal steps
            steps += 1
            if steps > deaths:
                raise KeyboardInterrupt
            return original(*arguments, **keywords)

        return call

    with (
        pytest.raises(KeyboardInterrupt),
        IndexedDatasetWriter(tmp_path / "x", "<u2", overwrite=True, mask=True, metadata=True) as writer,
    ):
        writer.add_documents([4, 5, 6], [2, 1], mask=[0, 1, 0], metadata=[b"[4]", b"[5]"])
        writer.sidecar = replace(SIDECAR, tokenizer="new")
        writer.prepare()
        monkeypatch.setattr(os, "replace", dying(os.replace))
        monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    found = {path.name[1:]: path.read_bytes() for path in tmp_path.glob("x.*")}
    if deaths == 0:
        assert found == texts["old"]
    else:
        with pytest.raises(UserError, match=r"x.idx: no such file"):
            IndexedDataset(tmp_path / "x")


def test_sidecar_is_completed_by_the_writer_and_removed_with_its_dataset(tmp_path):
    with IndexedDatasetWriter(tmp_path / "x", "<u2") as writer:
        writer.add_documents([7, 9, 8], [1, 2])
        writer.sidecar = SIDECAR
    read = Sidecar.read(tmp_path / "x")
    assert read == replace(
        SIDECAR,
        dtype="uint16",
        documents=2,
        tokens=3,
        max_token_id=9,
        bin_xxh3_128=xxhash.xxh3_128_hexdigest((tmp_path / "x.bin").read_bytes()),
        idx_xxh3_128=xxhash.xxh3_128_hexdigest((tmp_path / "x.idx").read_bytes()),
    )
    assert json.loads((tmp_path / "x.json").read_bytes())["sources"][0]["name"] == "天/*.jsonl"
    with IndexedDatasetWriter(tmp_path / "x", "<u2", overwrite=True) as writer:
        writer.add_document([1])
    assert Sidecar.read(tmp_path / "x") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: "{", "not valid JSON"),
        (lambda r: "[]", "not a dataset's sidecar"),
        (lambda r: json.dumps({**r, "format_version": 9}), "format_version 9, but only 2"),
        (lambda r: json.dumps({k: v for k, v in r.items() if k != "eod_id"}), "has no eod_id"),
        (lambda r: json.dumps({**r, "colour": 1}), "unknown colour"),
        (lambda r: json.dumps({**r, "vocab_size": "400"}), "vocab_size is '400', not int"),
        (lambda r: json.dumps({**r, "vocab_size": True}), "vocab_size is True, not int"),
        (lambda r: json.dumps({**r, "sources": [{"name": "a", "files": 1}]}), "has no bytes, documents"),
        (lambda r: json.dumps({**r, "sources": [{**r["sources"][0], "left_out": {"a": "1"}}]}), "left_out is"),
        (lambda r: json.dumps({**r, "options": []}), r"options is \[\], not dict"),
        (lambda r: json.dumps({**r, "sources": {}}), "sources is not a list"),
    ],
)
def test_malformed_sidecar_is_refused(tmp_path, change, message):
    path = tmp_path / "x.json"
    path.write_bytes(SIDECAR.to_json())
    assert Sidecar.read(tmp_path / "x") == SIDECAR
    path.write_text(change(json.loads(SIDECAR.to_json())))
    with pytest.raises(UserError, match=message) as caught:
        Sidecar.read(tmp_path / "x")
    assert str(caught.value).startswith(str(path))


def test_sidecar_holds_paths_that_are_not_utf8(tmp_path):
    source = replace(SIDECAR.sources[0], name=os.fsdecode(b"caf\xe9.jsonl"))
    (tmp_path / "x.json").write_bytes(replace(SIDECAR, sources=(source,)).to_json())
    sidecar = Sidecar.read(tmp_path / "x")
    assert sidecar is not None
    assert os.fsencode(sidecar.sources[0].name) == b"caf\xe9.jsonl"
