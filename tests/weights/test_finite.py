"""NaN and infinite weights in a source are named and refused, unless they are asked for."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest
import torch
from converting import SINGLE, Copy, Run, convert_back, convert_there, edit_tensors
from safetensors.torch import load_file
from tiny_models import assert_refused

from retemper.checkpoint_convert import dcp_to_hf, hf_to_dcp, to_megatron
from retemper.engine.errors import UserError
from retemper.engine.weights import block_copy
from retemper.engine.weights.conversion.checkpoint_files import CheckpointPlan
from retemper.engine.weights.finite import all_finite, require_finite
from retemper.engine.weights.hugging_face.initial import load_hf_tensors, open_weights

NAME = "model.layers.1.mlp.down_proj.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finds_any_value_at_any_place(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = torch.tensor([0.0, -0.0, info.max, info.min, info.tiny, info.smallest_normal / 2], dtype=dtype).repeat(50)
    assert all_finite(values) and all_finite(values[:0]) and all_finite(values.view(10, -1).t())
    for place in (0, 1, 17, 255, 299):
        for wrong in (math.nan, math.inf, -math.inf):
            spoilt = values.clone()
            spoilt[place] = wrong
            assert not all_finite(spoilt), (place, wrong)
            with pytest.raises(UserError, match=rf"^w holds 1 values .* the first is {wrong}; "):
                require_finite("w", spoilt)


def spoil(folder: Path, wrong: float, dtype: torch.dtype) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[NAME][-1, -1] = wrong

    edit_tensors(folder / SINGLE, change)


@pytest.mark.parametrize(
    ("wrong", "dtype"), [(math.nan, torch.float32), (math.inf, torch.bfloat16), (-math.inf, torch.float16)]
)
def test_a_source_is_refused_or_copied_as_asked(
    copy_model: Copy,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    wrong: float,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(block_copy, "BLOCK_BYTES", 512)  # so that the value is not in a tensor's first block
    folder, checkpoint = copy_model("qwen3"), tmp_path / "checkpoint"
    spoil(folder, wrong, dtype)
    for tool, name in ((hf_to_dcp, NAME), (to_megatron, "decoder.layers.mlp.linear_fc2.weight[1]")):
        refused = run(tool, "--hf", folder, "--output", checkpoint)
        assert_refused(refused, f"{name} holds 1 values", f"the first is {wrong}", "--allow-nonfinite")
        assert [path.name for path in tmp_path.iterdir()] == ["qwen3"], "neither output nor leftovers"
    assert run(hf_to_dcp, "--hf", folder, "--output", checkpoint, "--allow-nonfinite").status == 0
    assert_refused(run(dcp_to_hf, "--checkpoint", checkpoint, "--output", tmp_path / "back"), NAME, "--allow-nonfinite")
    convert_back(checkpoint, tmp_path / "back", allow_nonfinite=True)
    before, after = load_file(folder / SINGLE), load_file(tmp_path / "back" / SINGLE)
    assert all(torch.equal(value.view(torch.uint8), after[name].view(torch.uint8)) for name, value in before.items())


def test_files_that_were_copied_with_the_option_are_not_taken_up_without_it(
    copy_model: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_model("qwen3")
    spoil(folder, math.nan, torch.float32)

    def full(*_: object) -> None:  # all files with tensors are finished then
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointPlan, "write_table", full)
        with pytest.raises(UserError, match="finished files are kept"):
            convert_there(folder, tmp_path / "checkpoint", allow_nonfinite=True)
    with pytest.raises(UserError, match=f"{NAME} holds 1 values"):
        convert_there(folder, tmp_path / "checkpoint")
    convert_there(folder, tmp_path / "checkpoint", allow_nonfinite=True)


def test_logits_that_are_not_finite_prove_nothing(copy_model: Copy, tmp_path: Path) -> None:
    folder = copy_model("qwen3")
    spoil(folder, math.nan, torch.float32)
    with pytest.raises(UserError, match="--verify"):
        convert_there(folder, tmp_path / "checkpoint", verify=True, allow_nonfinite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["qwen3"]


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_a_run_that_starts_from_a_folder_refuses_them(copy_model: Copy, target: torch.dtype) -> None:
    """Also where values are cast, block by block."""
    folder = copy_model("qwen3")
    spoil(folder, math.inf, torch.float32)
    model = open_weights(folder)
    tensors = {name: torch.empty(stored.shape, dtype=target) for name, stored in model.parameters.tensors.items()}
    with pytest.raises(UserError, match=rf"{NAME} holds 1 values .*hf_to_dcp\.py --allow-nonfinite$"):
        load_hf_tensors(model, tensors, distributed=False)
    # A rank that holds other rows has nothing to refuse.
    load_hf_tensors(model, {name: value for name, value in tensors.items() if name != NAME}, distributed=False)
