"""Tensors are saved from any layout and loaded into any other, bit for bit; the safetensors library reads the files."""

from __future__ import annotations

import json

import pytest
import shard_cases
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.tensors import load_tensors, open_tensors
from retemper.engine.weights.saving import save_tensors

RANKS = {name: torch.Size(shape).numel() for name, (shape, _) in shard_cases.LAYOUTS.items()}


@pytest.fixture(scope="module")
def run(one_rank, two_ranks, four_ranks):
    """Runs a case on as many ranks as a layout has; the results by rank."""
    runners = {1: lambda function, *arguments: [function(one_rank, *arguments)], 2: two_ranks.run, 4: four_ranks.run}
    return lambda function, folder, layout: runners[RANKS[layout]](function, folder, layout)


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """A folder for each layout, with the tensors that were saved from it."""
    folders = {}
    for layout in shard_cases.LAYOUTS:
        folders[layout] = tmp_path_factory.mktemp("saved")
        run(shard_cases.save, folders[layout], layout)
    return folders


@pytest.mark.parametrize("into", shard_cases.LAYOUTS)
@pytest.mark.parametrize("layout", shard_cases.LAYOUTS)
def test_any_layout_is_loaded_into_any_other(layout, into, saved, run):
    assert run(shard_cases.load, saved[layout], into) == [[]] * RANKS[into]


@pytest.mark.parametrize(("layout", "into"), [("whole", "2 x 2"), ("2 x 2", "whole"), ("strided", "columns of 2")])
def test_dcp_loads_any_layout_into_any_other(layout, into, saved, run):
    assert run(shard_cases.load_with_dcp, saved[layout], into) == [[]] * RANKS[into]


@pytest.mark.parametrize("layout", shard_cases.LAYOUTS)
def test_converters_read_the_same_row_by_row(layout, saved):
    source = open_tensors(saved[layout])
    source.require_full_coverage()
    for name, tensor in shard_cases.whole_tensors().items():
        rows = torch.empty(tensor.shape or (1,), dtype=tensor.dtype)
        with source.rows(name) as read:
            for first in range(0, len(rows), 3):
                read(first, rows[first : first + 3])
        found, expected = (t.contiguous().reshape(-1).view(torch.uint8) for t in (rows, tensor))
        assert torch.equal(found, expected), name


@pytest.mark.parametrize("layout", ["rows of 2", "2 x 2", "copies of rows"])
def test_every_file_is_one_of_the_safetensors_library(layout, saved, tmp_path):
    files = sorted(saved[layout].glob("*.safetensors"))
    assert len(files) == RANKS[layout], "every rank writes, also of what several hold"
    elements = dict.fromkeys(shard_cases.whole_tensors(), 0)
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        save_file(tensors, tmp_path / "again", {"format": "pt"})
        assert file.read_bytes() == (tmp_path / "again").read_bytes(), "aligned, ordered and padded alike"
        for name, tensor in tensors.items():
            elements[name] += tensor.numel()
    assert elements == {name: tensor.numel() for name, tensor in shard_cases.whole_tensors().items()}, "each once"


def test_what_one_rank_cannot_do_is_said_by_all(two_ranks, tmp_path):
    for failing in range(2):
        for lines in two_ranks.run(shard_cases.refusals, tmp_path, failing):
            writing, reading = lines
            assert "nowhere: cannot be written: No such file" in writing
            assert "nowhere/tensors.json: missing; use another checkpoint" in reading


def test_ranks_that_disagree_about_a_shape_save_nothing(two_ranks, tmp_path):
    for line in two_ranks.run(shard_cases.disagreement, tmp_path):
        assert "a: (3,) of torch.float32 on rank 1 cannot be saved" in line
    assert not any(tmp_path.iterdir())


def test_loading_casts_and_names_what_does_not_fit(tmp_path):
    save_tensors(tmp_path, {"a": torch.randn(4, 3), "b": torch.ones(2)}, distributed=False)
    source, cast = torch.zeros(4, 3), torch.zeros(3, 4, dtype=torch.bfloat16).t()
    load_tensors(tmp_path, {"a": source}, distributed=False)
    load_tensors(tmp_path, {"a": cast}, distributed=False)
    assert torch.equal(cast, source.bfloat16())
    with pytest.raises(UserError, match=r"1 tensors are missing, such as c; is it the same model\?"):
        load_tensors(tmp_path, {"a": source, "c": source}, distributed=False)
    with pytest.raises(UserError, match=r"b has shape \[2\], the model needs \[3\]"):
        load_tensors(tmp_path, {"b": torch.ones(3)}, distributed=False)


def test_a_stale_file_is_never_opened(tmp_path):
    """A rank of a former save may have left one of the same tensor."""
    save_tensors(tmp_path, {"a": torch.ones(4)}, distributed=False)
    save_file({"a": torch.zeros(4)}, tmp_path / "rank-00001.safetensors")
    found = {"a": torch.zeros(4)}
    load_tensors(tmp_path, found, distributed=False)
    assert torch.equal(found["a"], torch.ones(4))
    assert json.loads((tmp_path / "tensors.json").read_text())["files"] == ["rank-00000.safetensors"]


def test_only_the_part_of_a_rank_is_read(tmp_path, monkeypatch):
    from retemper.engine.weights import raw_bytes

    sizes, read = [], raw_bytes.read_into
    monkeypatch.setattr(raw_bytes, "read_into", lambda *a: (sizes.append(len(a[2])), read(*a)))
    save_tensors(tmp_path, {"a": torch.randn(8, 6)}, distributed=False)
    rows = torch.empty(2, 6)
    with open_tensors(tmp_path).rows("a") as read_rows:
        read_rows(3, rows)
    assert sizes == [2 * 6 * 4]
