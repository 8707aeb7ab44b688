"""What is no longer as it was written is refused, naming the file; a table or header from anyone is one line."""

from __future__ import annotations

import json
import random
import shutil
import struct

import pytest
import shard_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retemper.engine.errors import UserError
from retemper.engine.files.hashing import record_file
from retemper.engine.weights.checkpoint.manifest import Manifest, write_manifest
from retemper.engine.weights.checkpoint.tensors import load_tensors, stored_tensors
from retemper.engine.weights.checkpoint.verify import find_damage
from retemper.engine.weights.damage import DamagedCheckpoint

FIRST, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"


@pytest.fixture(scope="module")
def saved(two_ranks, tmp_path_factory):
    """A checkpoint of two ranks."""
    folder = tmp_path_factory.mktemp("saved") / "step"
    folder.mkdir()
    two_ranks.run(shard_cases.save, folder, "rows of 2")
    write_manifest(folder, Manifest(kind="training", step=1))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of :func:`saved`."""
    return shutil.copytree(saved, tmp_path / "step")


def load(folder):
    """All that ``folder`` holds."""
    tensors = {name: torch.empty(item.shape, dtype=item.dtype) for name, item in stored_tensors(folder).items()}
    load_tensors(folder, tensors, distributed=False)
    return tensors


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGE = {
    "missing": None,
    "empty": lambda data: b"",
    "truncated": lambda data: data[:-1],
    "extended": lambda data: data + b"\0",
    "cut in the header": lambda data: data[:40],
}


@pytest.mark.parametrize("file", [FIRST, SECOND, "tensors.json"])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_is_named_by_verification_and_by_loading_alone(folder, file, how):
    change, path = DAMAGE[how], folder / file
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    assert any(str(path) in damage.what for damage in find_damage(folder)[1])
    with pytest.raises(UserError, match=rf"^{path}: [^\n]*$"):
        load(folder)


@pytest.mark.parametrize("file", [FIRST, SECOND, "tensors.json"])
def test_a_flipped_bit_anywhere_is_found_by_verification(folder, file):
    path, whole = folder / file, (folder / file).read_bytes()
    for place in {0, 7, 8, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 20)}:
        path.write_bytes(flipped(whole, place))
        [damage] = find_damage(folder)[1]
        assert damage.file == file and "damaged, its xxh3_128 is" in damage.what
    path.write_bytes(whole)
    assert find_damage(folder)[1] == []


def test_a_stale_file_is_named_and_its_values_are_not_taken(folder):
    before = load(folder)
    shutil.copy(folder / FIRST, folder / "rank-00002.safetensors")
    [damage] = find_damage(folder)[1]
    assert "rank-00002.safetensors: not part of the checkpoint when it was written" in damage.what
    assert all(torch.equal(load(folder)[name].float(), before[name].float()) for name in before if name != "nan")


def test_files_that_have_changed_places_are_refused(folder):
    """Each is whole, but the rows of one rank are not those of the other."""
    (folder / FIRST).rename(folder / "other")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "other").rename(folder / SECOND)
    assert {damage.file for damage in find_damage(folder)[1]} == {FIRST, SECOND}
    with pytest.raises(UserError, match=r"rank-0000\d.safetensors: \S* is .* there, tensors.json says .*; use another"):
        load(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../x", "x\0", "", 3, None, "link"])
def test_a_table_names_no_file_outside(folder, tmp_path, name):
    shutil.copy(folder / FIRST, tmp_path / "outside")
    (folder / "link").symlink_to(tmp_path / "outside")
    edit(folder, lambda table: table["files"].__setitem__(0, name))
    with pytest.raises(DamagedCheckpoint, match=r"names a file .*; use another checkpoint"):
        stored_tensors(folder)


def edit(folder, change):
    path = folder / "tensors.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


@pytest.mark.parametrize(
    "text",
    ["", "3", "[]", "{}", '{"files": [], "tensors": []}', "[" * 100_000, '{"files": 1, "tensors": {}}', "NaN", "\0"],
)
def test_a_table_that_is_none_is_a_line(folder, text):
    (folder / "tensors.json").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=rf"^{folder}/tensors.json: damaged [^\n]*; use another checkpoint$"):
        stored_tensors(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


def places(value, at=()):
    """Every place in a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def put(value, place, new):
    """``value`` with ``new`` at ``place``."""
    if not place:
        return new
    inside = value
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = new
    return value


def use(folder):
    try:
        load(folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_table_with_anything_anywhere_is_a_line_or_works(saved, data):
    path, whole = saved / "tensors.json", (saved / "tensors.json").read_text()
    place = data.draw(st.sampled_from([*places(json.loads(whole))]))
    value = data.draw(JSON | st.sampled_from([-1, 2**31, 2**70, True, [2**40], [0, 0], "F32", "BOOL"]))
    try:
        path.write_text(json.dumps(put(json.loads(whole), place, value)))
        if _is_modest(path):
            use(saved)
    finally:
        path.write_text(whole)


def _is_modest(path):
    """The test's own tensors, as large as the table says, must fit in memory."""
    try:
        return all(item.num_bytes < 1 << 24 for item in stored_tensors(path.parent).values())
    except UserError as error:
        assert "\n" not in str(error)
        return False


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_header_with_anything_anywhere_is_a_line_or_works(saved, data):
    path, whole = saved / FIRST, (saved / FIRST).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    place = data.draw(st.sampled_from([*places(header)]))
    value = data.draw(JSON | st.sampled_from([-1, 2**31, 2**70, True, [0, 2**40], [0, 0], "F32"]))
    text = json.dumps(put(header, place, value)).encode()
    try:
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
        use(saved)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("length", [0, 7, 2**40, 2**64 - 1])
def test_the_length_of_a_header_is_checked_before_it_is_read(folder, length):
    path, whole = folder / FIRST, (folder / FIRST).read_bytes()
    path.write_bytes(struct.pack("<Q", length) + whole[8:])
    with pytest.raises(UserError, match=rf"^{path}: truncated or not a safetensors file \([^\n]*; use another"):
        load(folder)


def test_tensors_that_overlap_or_leave_a_gap_are_refused(folder):
    path, whole = folder / FIRST, (folder / FIRST).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for shift in (-4, 4):
        header = json.loads(whole[8 : 8 + length])
        entry = header["vector" if "vector" in header else next(k for k in header if k != "__metadata__")]
        entry["data_offsets"] = [place + shift for place in entry["data_offsets"]]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
        with pytest.raises(UserError, match=rf"^{path}: truncated or not a safetensors file [^\n]* comes next"):
            load(folder)


def test_a_tensor_of_another_size_than_its_shape_is_refused(folder):
    path, whole = folder / FIRST, (folder / FIRST).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    first, second = sorted((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"])[:2]
    header[first]["data_offsets"][1] -= 4
    header[second]["data_offsets"][0] -= 4
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    with pytest.raises(UserError, match=rf"^{path}: truncated or not a safetensors file [^\n]* bytes\)"):
        load(folder)


def test_the_manifest_has_the_hash_of_every_file(saved):
    manifest, damage = find_damage(saved)
    assert damage == [] and manifest is not None
    names = {path.name for path in saved.iterdir()} - {"manifest.json"}
    assert manifest.records == {name: record_file(saved / name) for name in names}
