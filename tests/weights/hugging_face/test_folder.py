"""Reading and writing the weights of Hugging Face folders."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, read_folder, read_safetensors

from retemper.engine.errors import UserError
from retemper.engine.weights.block_copy import copy_files
from retemper.engine.weights.hugging_face.folder import INDEX_FILE, WEIGHTS_FILE, HfWeights
from retemper.engine.weights.hugging_face.shards import ShardPlan
from retemper.engine.weights.hugging_face.weight_options import parse_shard_size
from retemper.engine.weights.tensor_source import ReadRows, StoredTensor, rows_of

COUNTING = {name: torch.arange(start, start + 6, dtype=torch.float32).view(2, 3) for start, name in enumerate("abc")}


def write_indexed(folder: Path) -> Path:
    """Tensors a and b in one file, c in another, with their index."""
    folder.mkdir()
    save_file({name: COUNTING[name] for name in "ab"}, folder / "first.safetensors")
    save_file({"c": COUNTING["c"]}, folder / "second.safetensors")
    weight_map = {"a": "first.safetensors", "b": "first.safetensors", "c": "second.safetensors"}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_reads_what_the_index_lists(tmp_path: Path) -> None:
    weights = HfWeights(write_indexed(tmp_path / "hf"))
    assert weights.tensors == dict.fromkeys("abc", StoredTensor((2, 3), torch.float32))
    assert all(torch.equal(weights.read(name), COUNTING[name]) for name in "abc")
    assert weights.ignored_files == []


def test_reads_a_single_file_without_index(tmp_path: Path) -> None:
    save_file(COUNTING, tmp_path / WEIGHTS_FILE)
    weights = HfWeights(tmp_path)
    assert list(weights.tensors) == list("abc")
    assert torch.equal(weights.read("b"), COUNTING["b"])


def test_files_that_the_index_does_not_list_are_ignored(tmp_path: Path) -> None:
    folder = write_indexed(tmp_path / "hf")
    save_file({"a": torch.zeros(2, 3), "old": torch.zeros(1)}, folder / "model-00001-of-00009.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    (folder / "training_args.bin").write_bytes(b"no weights")
    weights = HfWeights(folder)
    assert list(weights.tensors) == list("abc")
    assert torch.equal(weights.read("a"), COUNTING["a"])
    assert weights.ignored_files == ["model-00001-of-00009.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize(
    "file", ["../other/first.safetensors", "/first.safetensors", "sub/x", "..", "a\\b", "", 7, None]
)
def test_index_entries_stay_in_the_folder(tmp_path: Path, file: object) -> None:
    folder = write_indexed(tmp_path / "hf")
    # The place that the entry points to exists, so that only the check stands in the way.
    save_file(COUNTING, write_indexed(tmp_path / "other") / "first.safetensors")
    edit_json(folder / INDEX_FILE, lambda index: index["weight_map"].update(a=file))
    with pytest.raises(UserError, match="not the name of a file next to it") as error:
        HfWeights(folder)
    assert INDEX_FILE in str(error.value) and repr(file) in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_refuses_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    folder = write_indexed(tmp_path / "hf")
    (folder / INDEX_FILE).write_text(content)
    with pytest.raises(UserError, match=INDEX_FILE):
        HfWeights(folder)


def test_refuses_a_missing_file_and_a_missing_tensor(tmp_path: Path) -> None:
    folder = write_indexed(tmp_path / "hf")
    edit_json(folder / INDEX_FILE, lambda index: index["weight_map"].update(d="first.safetensors"))
    with pytest.raises(UserError, match=r"first\.safetensors: holds no d"):
        HfWeights(folder)
    (folder / "first.safetensors").unlink()
    with pytest.raises(UserError, match=r"first\.safetensors: missing"):
        HfWeights(folder)


@pytest.mark.parametrize("file", ["second.safetensors", INDEX_FILE])
def test_a_file_that_this_user_may_not_read_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    folder, unguarded = write_indexed(tmp_path / "hf"), os.open

    def guarded(path: Any, *arguments: Any, **options: Any) -> int:  # permissions would not stop root
        if Path(path).name == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return unguarded(path, *arguments, **options)

    monkeypatch.setattr(os, "open", guarded)
    with pytest.raises(UserError, match=rf"^{folder / file}: cannot be read: Permission denied; make it readable$"):
        HfWeights(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        lambda data: (2**62).to_bytes(8, "little") + data[8:],
    ],
    ids=["empty", "short", "half a header", "a byte less", "a byte more", "git lfs pointer", "huge header"],
)
def test_refuses_damaged_files(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    folder = write_indexed(tmp_path / "hf")
    damaged = folder / "second.safetensors"
    damaged.write_bytes(spoil(damaged.read_bytes()))
    with pytest.raises(UserError, match=r"second\.safetensors: truncated or not a safetensors file"):
        HfWeights(folder)


def header_of(*places: tuple[int, int], shape: tuple[int, ...] = (2, 3), size: int = 48) -> bytes:
    """A file with float32 tensors at ``places``, written after the published layout, and ``size`` bytes of values."""
    entries = {f"t{number}": {"dtype": "F32", "shape": shape, "data_offsets": at} for number, at in enumerate(places)}
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize(
    "content",
    [
        header_of((0, 24), (16, 40), size=40),
        header_of((0, 24), (24, 72)),
        header_of((0, 24), (2**40, 2**40 + 24)),
        header_of((0, 24), (-24, 0), size=24),
        header_of((0, 24), shape=(2, 4), size=24),
        header_of((8, 32), size=32),
        (100_000_001).to_bytes(8, "little"),
    ],
    ids=["overlap", "beyond the file", "far beyond", "negative", "other shape", "hole", "header above the limit"],
)
def test_refuses_places_that_cannot_be(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(content)
    if len(content) == 8:  # long enough for its header, and sparse
        os.truncate(path, 100_000_100)
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or not a safetensors file"):
        HfWeights(tmp_path)


def test_rows_are_read_from_their_places(tmp_path: Path) -> None:
    weights = HfWeights(write_indexed(tmp_path / "hf"))
    for name, expected in COUNTING.items():
        with weights.rows(name) as read:
            for first, last in ((0, 2), (1, 2), (0, 1)):
                rows = torch.empty(last - first, 3)
                read(first, rows)
                assert torch.equal(rows, expected[first:last])
    cut = tmp_path / "hf" / "second.safetensors"
    os.truncate(cut, cut.stat().st_size - 1)
    with weights.rows("c") as read, pytest.raises(UserError, match=r"second\.safetensors: ends before byte"):
        read(0, torch.empty(2, 3))


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_refuses_pickled_weights(tmp_path: Path, pickled: str) -> None:
    (tmp_path / pickled).write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="save_pretrained") as error:
        HfWeights(tmp_path)
    assert pickled in str(error.value)


def test_refuses_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither"):
        HfWeights(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        HfWeights(tmp_path / "absent")


class InMemory:
    """A source of the tensors that it is given."""

    def __init__(self, values: dict[str, torch.Tensor]):
        self.values = values
        self.tensors = {name: StoredTensor(tuple(value.shape), value.dtype) for name, value in values.items()}

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        value = self.values[name].reshape(rows_of(self.tensors[name].shape))
        yield lambda first, rows: rows.copy_(value[first : first + rows.shape[0]])


def write_tensors(folder: Path, values: dict[str, torch.Tensor], max_shard_size: int) -> None:
    source = InMemory(values)
    plan = ShardPlan(source.tensors, max_shard_size)
    copy_files(folder, plan.files, source)
    plan.write_index(folder)


def write_counting(folder: Path, max_shard_size: int) -> list[list[str]]:
    """Write COUNTING (24 bytes a tensor); returns the groups of names that share a file."""
    write_tensors(folder, COUNTING, max_shard_size)
    return [list(load_file(path)) for path in sorted(folder.glob("*.safetensors"))]


def test_shards_are_named_and_indexed_as_on_the_hub(tmp_path: Path) -> None:
    assert write_counting(tmp_path, 50) == [["a", "b"], ["c"]]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert json.loads((tmp_path / INDEX_FILE).read_text()) == {
        "metadata": {"total_size": 72},
        "weight_map": {"a": first, "b": first, "c": second},
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first, second, INDEX_FILE])
    for file in (first, second):
        _, metadata = read_safetensors(tmp_path / file)
        assert metadata == {"format": "pt"}
        assert (tmp_path / file).stat().st_mode == (tmp_path / INDEX_FILE).stat().st_mode
    written = read_folder(tmp_path)
    assert {name: tensor.data for name, tensor in written.items()} == {
        name: value.numpy().tobytes() for name, value in COUNTING.items()
    }
    assert {(tensor.dtype, tensor.shape) for tensor in written.values()} == {("F32", (2, 3))}


def test_files_are_those_of_the_library(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float16, torch.bfloat16, torch.float32]
    tensors = {
        f'{letter}."é"': torch.randn(shape, generator=generator).to(dtype)
        for letter, shape, dtype in zip("cebadf", [(3, 1), (5,), (2, 2), (), (0, 4), (7,)], 2 * dtypes, strict=True)
    }
    save_file(tensors, tmp_path / "library", metadata={"format": "pt"})
    write_tensors(tmp_path, tensors, 10**6)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (tmp_path / "library").read_bytes()


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    assert write_counting(tmp_path, 72) == [["a", "b", "c"]]
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]


def test_a_tensor_above_the_limit_gets_its_own_file(tmp_path: Path) -> None:
    assert write_counting(tmp_path, 10) == [["a"], ["b"], ["c"]]


def test_shard_sizes() -> None:
    sizes = {"5GB": 5 * 10**9, "1.5 kb": 1500, "200MB": 2 * 10**8, "1tb": 10**12}
    assert {size: parse_shard_size(size) for size in sizes} == sizes
    for wrong in ("", "5", "5GiB", "-1GB", "0GB", "GB", "5 G B", "nanGB", "1e3GB"):
        with pytest.raises(UserError, match="--max-shard-size"):
            parse_shard_size(wrong)
