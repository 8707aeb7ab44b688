"""Nothing in a checkpoint of DCP's format is executed, and nothing outside its folder is read.

The canary is a file that the pickles would make, were they executed.
"""

from __future__ import annotations

import gc
import io
import os
import pathlib
import pickle
import pickletools
import shutil
import struct

import pytest
import saved_runs
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint import manifest as manifests
from retemper.engine.weights.checkpoint.tensors import load_tensors, stored_tensors
from retemper.engine.weights.checkpoint.verify import find_damage
from retemper.engine.weights.conversion.dcp_to_hf import convert
from retemper.engine.weights.damage import brief, file_inside
from retemper.engine.weights.dcp_metadata import (
    Refused,
    check_pickle_size,
    placeholder_class,
    read_metadata,
    unpickle_metadata,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(saved, tmp_path):
    """A checkpoint of format 1: no hash tells that something has been changed."""
    copy = saved_runs.copy_of(saved / "checkpoints" / "step-00000004", tmp_path / "step")
    saved_runs.rewrite_manifest(copy, lambda content: None, version=1)
    return copy


class Call:
    """Pickled, it is a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def load(folder):
    load_tensors(folder, saved_runs.tensors_at(0), distributed=False)


READERS = {
    "names": stored_tensors,
    "values": load,
    "verification": lambda folder: _raise_first(find_damage(folder)[1]),
    "converter": lambda folder: convert(folder, folder.parent / "hf", say=lambda line: None),
}


def _raise_first(damage):
    if damage:
        raise UserError(damage[0].what)


def _payload(kind, canary):
    call = Call(os.mkdir, str(canary))
    loaded = Metadata({"x": call}) if kind == "inside metadata" else None
    return {
        "a call": lambda: pickle.dumps(call),
        "protocol 0": lambda: pickle.dumps(call, protocol=0),
        "inside metadata": lambda: pickle.dumps(loaded),
        "eval": lambda: pickle.dumps(Call(eval, f"__import__('os').mkdir({str(canary)!r})")),
        "path": lambda: pickle.dumps(Call(pathlib.Path.mkdir, pathlib.Path(canary))),
        "torch.load": lambda: pickle.dumps(Call(torch.load, io.BytesIO(pickle.dumps(call)))),
        # A dotted name under a module that is known.
        "dotted": lambda: b"\x80\x04\x8c\x05torch\x8c\x08os.mkdir\x93\x8c" + struct.pack("B", len(str(canary)))
        + str(canary).encode() + b"\x85R.",
    }[kind]()  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["a call", "protocol 0", "inside metadata", "eval", "path", "torch.load", "dotted"])
def test_a_pickle_in_the_metadata_is_not_executed(folder, tmp_path, kind, reader):
    canary = tmp_path / "canary"
    (folder / ".metadata").write_bytes(_payload(kind, canary))
    with pytest.raises(UserError) as error:
        READERS[reader](folder)
    assert not canary.exists() and "\n" not in str(error.value)


def test_the_canary_would_sing(tmp_path):
    pickle.loads(_payload("a call", tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


def test_values_that_are_a_pickle_are_not_executed(folder, tmp_path, monkeypatch):
    canary = tmp_path / "canary"
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file = io.BytesIO()
    torch.save(Call(os.mkdir, str(canary)), file)
    metadata = read_metadata(folder)
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "__0_0.distcp").write_bytes(file.getvalue())
    with pytest.raises(UserError, match="damaged"):
        load(folder)
    assert not canary.exists()
    torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert canary.exists()


def test_items_that_are_no_tensors_are_never_unpickled(tmp_path):
    canary, folder = tmp_path / "canary", tmp_path / "step"
    writer = dcp.FileSystemWriter(str(folder))
    dcp.save({"x": Call(os.mkdir, str(canary)), "y": torch.ones(2)}, storage_writer=writer, no_dist=True)
    assert list(stored_tensors(folder)) == ["y"]
    with pytest.raises(UserError, match="1 tensors are missing"):
        load_tensors(folder, {"x": torch.ones(2)}, distributed=False)
    assert not canary.exists()
    dcp.load({"x": 0}, storage_reader=dcp.FileSystemReader(str(folder)), no_dist=True)
    assert canary.exists()


def test_metadata_cannot_change_classes(folder):
    # Metadata.canary = 1, as the state (None, {"canary": 1}) of the class itself.
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (folder / ".metadata").write_bytes(b"\x80\x04" + name + b"N}X\x06\0\0\0canaryK\x01s\x86b.")
    with pytest.raises(UserError, match="changes PyTorch's classes"):
        read_metadata(folder)
    assert not hasattr(Metadata, "canary")


@pytest.mark.parametrize(
    "name", ["../outside.distcp", "/absolute", "a/../../outside.distcp", "link", "x\0", "\ud800", "", 3, "."]
)
def test_a_path_that_leaves_the_folder_is_refused(folder, tmp_path, name):
    shutil.copy(folder / "__0_0.distcp", tmp_path / "outside.distcp")
    (folder / "link").symlink_to(tmp_path / "outside.distcp")
    name = str(tmp_path / "outside.distcp") if name == "/absolute" else name
    metadata = read_metadata(folder)
    for place in metadata.storage_data.values():
        place.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match="names a file"):
        load(folder)
    # The same name in a manifest.
    (folder / "link").rename(tmp_path / "link")
    manifests.write_manifest(folder, saved_runs.manifest_at(4))
    (tmp_path / "link").rename(folder / "link")
    files = {str(name): {"bytes": 1, "xxh3_128": "0" * 32}}
    saved_runs.rewrite_manifest(folder, lambda content: content["files"].update(files))
    assert find_damage(folder)[1]


def test_a_link_inside_and_a_folder_that_is_a_link_are_fine(folder, tmp_path):
    (folder / "__0_0.distcp").rename(folder / "other")
    (folder / "__0_0.distcp").symlink_to("other")
    (tmp_path / "link").symlink_to(folder)
    load(tmp_path / "link")


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: setattr(metadata, "storage_data", None),
        lambda metadata: setattr(metadata, "state_dict_metadata", [1]),
        lambda metadata: metadata.state_dict_metadata.update(x=3),
        lambda metadata: [setattr(item, "size", (1, 2)) for item in metadata.state_dict_metadata.values()],
        lambda metadata: [setattr(item, "chunks", 3) for item in metadata.state_dict_metadata.values()],
        lambda metadata: [setattr(item, "offset", -1) for item in metadata.storage_data.values()],
        lambda metadata: [setattr(item, "length", "1") for item in metadata.storage_data.values()],
        lambda metadata: [setattr(item, "transform_descriptors", ["z"]) for item in metadata.storage_data.values()],
        lambda metadata: metadata.storage_data.clear(),
    ],
)
def test_metadata_of_wrong_types_is_a_line(folder, change):
    metadata = read_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError):
        load(folder)
    if metadata.storage_data:
        with pytest.raises(UserError, match="damaged"):
            read_metadata(folder)


def test_damaged_metadata_is_a_line(folder):
    data = (folder / ".metadata").read_bytes()
    for place in range(0, len(data), 11):
        for broken in (data[:place], data[:place] + bytes([data[place] ^ 0x15]) + data[place + 1 :]):
            (folder / ".metadata").write_bytes(broken)
            try:
                stored_tensors(folder)
            except UserError as error:
                assert "\n" not in str(error)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def unpickled(head):
    """Unpickles ``head``, which begins with an empty list or the like; nothing else of it is valid metadata."""
    return unpickle_metadata(io.BytesIO(b"\x80\x04" + head + b"."))


@pytest.mark.parametrize(
    "put",
    [b"r" + struct.pack("<I", 1_000_000), b"p1000000\n", b"p" + b"9" * 400 + b"\n"],
    ids=["binary", "text", "big"],
)
def test_a_number_that_makes_the_unpickler_reserve_memory_is_refused(folder, put):
    with pytest.raises(Refused, match="remembers"):
        unpickled(b"]" + put)
    whole = (folder / ".metadata").read_bytes()
    assert whole[:2] == b"\x80\x04"
    (folder / ".metadata").write_bytes(b"\x80\x04]" + put + b"0" + whole[2:])
    with pytest.raises(UserError, match="remembers"):
        read_metadata(folder)
    (folder / ".metadata").write_bytes(b"\x80\x04]0" + whole[2:])
    read_metadata(folder)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_of_python_is_modest(protocol):
    """Whatever instructions it has, and whatever bytes its strings have, which may look like instructions."""
    content = [
        *(f"r\xff\xff\xff\xff{i}\n" for i in range(70_000)),
        {"a": (1, -(2**300), 2.5, None, True, b"r" + b"\xff" * 300, "p999999\n" * 90), "b": {1, 2}},
        Metadata({}, {}, {}),
        bytearray(b"r\xff\xff\xff\xff" * 60),
    ]
    saved = pickle.dumps(content, protocol)
    check_pickle_size(saved)
    check_pickle_size(saved + b"\xff\xff")  # What follows is not read.
    check_pickle_size(pickletools.optimize(saved[:0] + pickle.dumps(content[:300], protocol)))
    for stop in (0, 1, 2, 11, len(saved) // 2, len(saved) - 1):
        with pytest.raises(Refused, match="does not end"):
            check_pickle_size(saved[:stop])


@pytest.mark.parametrize("code", [b"\x8d", b"\x8e", b"\x96", b"X", b"T", b"B", b"\x8b"])
def test_a_string_longer_than_the_file_is_refused(code):
    lengths = {b"\x8d": "<Q", b"\x8e": "<Q", b"\x96": "<Q"}
    with pytest.raises(Refused, match="does not end"):
        unpickled(code + struct.pack(lengths.get(code, "<I"), 10_000_000) + b"x")


def test_paths_and_shapes_that_grow_are_refused():
    path = b"cpathlib\nPurePosixPath\n"
    with pytest.raises(Refused, match="not a path"):
        unpickled(path + b"q\x00h\x00h\x00\x8c\x01a\x85R\x85R")
    with pytest.raises(Refused, match="not a path"):
        unpickled(path + b"(" + b"\x8c\x01a" * 40_000 + b"tR")
    with pytest.raises(Refused, match="65 dimensions"):
        unpickled(b"ctorch\nSize\n(" + b"K\x01" * 65 + b"t\x85R")
    with pytest.raises(Refused, match="it holds a Size"):
        unpickled(b"ctorch\nSize\n(" + b"K\x01" * 64 + b"t\x85R")


def test_one_state_for_many_objects_is_not_copied():
    inert, state = placeholder_class(), {"x": 1}
    objects = [inert(), inert()]
    for item in objects:
        item.__setstate__(state)
    assert all(vars(item) is state for item in objects)


def test_errors_are_short_whatever_they_are_about(folder):
    nested = []
    for _ in range(18):
        nested = [nested, nested]
    for value in (nested, "x" * 10**6, 10**5000, {1: nested}, [nested], ("a",) * 1000):
        assert len(brief(value)) < 250
    with pytest.raises(UserError) as error:
        file_inside(folder, nested)
    assert len(str(error.value)) < 1000
    metadata = read_metadata(folder)
    for change in ("offset", "relative_path", "transform_descriptors"):
        changed = pickle.loads(pickle.dumps(metadata))
        for place in changed.storage_data.values():
            setattr(place, change, nested)
        (folder / ".metadata").write_bytes(pickle.dumps(changed))
        with pytest.raises(UserError) as error:
            read_metadata(folder)
        assert len(str(error.value)) < 1000


def test_garbage_collection_goes_on_afterwards(folder):
    assert gc.isenabled()
    read_metadata(folder)
    assert gc.isenabled()
    with pytest.raises(Refused):
        unpickled(b"]")
    assert gc.isenabled()
    gc.disable()
    try:
        read_metadata(folder)
        assert not gc.isenabled()
    finally:
        gc.enable()
