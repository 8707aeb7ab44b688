"""PyTorch's distributed checkpoint (DCP) reads our checkpoints; for layouts see test_saving_and_loading.py."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import saved_runs
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from retemper.engine.errors import UserError
from retemper.engine.weights.checkpoint.tensors import load_tensors, stored_tensors
from retemper.engine.weights.conversion.dcp_reader import CheckpointReader

GUIDE = (Path(__file__).parents[3] / "docs" / "reliability.md").read_text(encoding="utf-8")
NO_GROUP = "ignore:torch.distributed is (disabled|unavailable)"


@pytest.fixture
def checkpoint(one_rank, tmp_path):
    saved_runs.save(one_rank, tmp_path / "run", 4)
    return tmp_path / "run" / "checkpoints" / "step-00000004"


def loaded_by_us(folder):
    tensors = {name: torch.empty(item.shape, dtype=item.dtype) for name, item in stored_tensors(folder).items()}
    load_tensors(folder, tensors, distributed=False)
    return tensors


def load(folder, **options):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in loaded_by_us(folder).items()}
    dcp.load(tensors, storage_reader=CheckpointReader(folder, **options), no_dist=True)
    return tensors


@pytest.mark.filterwarnings(NO_GROUP)
def test_a_checkpoint_is_loaded_by_dcp_as_by_us(checkpoint):
    expected = loaded_by_us(checkpoint)
    found = load(checkpoint)
    assert expected and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    name = next(name for name, tensor in expected.items() if tensor.dtype == torch.float32 and tensor.dim() == 2)
    cast = {name: torch.zeros(expected[name].shape, dtype=torch.bfloat16)}
    dcp.load(cast, storage_reader=CheckpointReader(checkpoint), no_dist=True)
    assert torch.equal(cast[name], expected[name].bfloat16())


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def hole(path):
    table = json.loads((path.parent / "tensors.json").read_text())
    next(iter(table["tensors"].values()))["parts"].pop()
    (path.parent / "tensors.json").write_text(json.dumps(table))


@pytest.mark.filterwarnings(NO_GROUP)
@pytest.mark.parametrize(
    ("damage", "verify", "problem"),
    [
        (flip, True, "rank-00000.safetensors: damaged, its xxh3_128 is"),
        (os.unlink, True, "rank-00000.safetensors: missing"),
        (os.unlink, False, "rank-00000.safetensors: cannot be read: No such file"),
        (lambda path: os.truncate(path, path.stat().st_size - 1), False, "truncated or not a safetensors file"),
        (hole, False, "its shards"),
    ],
)
def test_damage_is_an_error(checkpoint, damage, verify, problem):
    tensors = {name: torch.zeros_like(tensor) for name, tensor in loaded_by_us(checkpoint).items()}
    damage(checkpoint / "rank-00000.safetensors")
    with pytest.raises((UserError, dcp.api.CheckpointException)) as error:
        dcp.load(tensors, storage_reader=CheckpointReader(checkpoint, verify=verify), no_dist=True)
    assert problem in str(error.value)


@pytest.mark.filterwarnings(NO_GROUP)
def test_the_guides_snippet_runs(checkpoint, monkeypatch):
    [snippet] = [code for code in re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL) if "CheckpointReader" in code]
    monkeypatch.chdir(checkpoint.parents[2])
    names: dict = {}
    name = next(iter(stored_tensors(checkpoint)))
    snippet = snippet.replace("runs/x/checkpoints/step-00001000", "run/checkpoints/step-00000004")
    shape = list(stored_tensors(checkpoint)[name].shape)
    snippet = snippet.replace("model.norm.weight", name).replace("torch.empty(4096)", f"torch.empty({shape})")
    exec(snippet, names)
    expected = loaded_by_us(checkpoint)
    assert torch.equal(names["tensors"][name], expected[name])
    some = _load_state_dict_from_keys({name}, storage_reader=CheckpointReader(checkpoint))
    assert some.keys() == {name} and torch.equal(some[name], expected[name])
