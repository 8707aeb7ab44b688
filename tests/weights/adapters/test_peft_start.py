"""The adapter of a folder of PEFT under the names of a run, and folders with another adapter than that of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import export, peft_model, random_adapter, stored_adapter, tensors_of
from converting import edit_tensors
from family_models import hf_config, hf_model
from library_models import library_model
from safetensors.torch import load_file
from tiny_models import edit_json

from retemper.engine.config.settings import AdapterConfig
from retemper.engine.errors import UserError
from retemper.engine.model.adapters import LORA_A, LORA_B, adapter_parameters
from retemper.engine.weights.adapters.peft import PEFT_WEIGHTS
from retemper.engine.weights.adapters.peft_config import PeftConfig
from retemper.engine.weights.adapters.peft_start import PeftStart, open_peft_start, require_values
from retemper.engine.weights.hugging_face.model import HfModel, open_hf_model


def lora(**settings: object) -> AdapterConfig:
    return AdapterConfig(**{"kind": "lora", "rank": 4, "alpha": 12, **settings})


def base_of(name: str, tmp_path: Path) -> HfModel:
    (library_model(name) if name == "olmoe" else hf_model(hf_config(name))).save_pretrained(tmp_path / "base")
    return open_hf_model(tmp_path / "base")


def opened(folder: Path, base: HfModel, config: AdapterConfig) -> PeftStart:
    """The folder as a run with the adapter ``config`` opens it."""
    peft = PeftConfig(adapter_parameters(base.architecture, config), base.architecture, base.layout)
    start = open_peft_start(folder, peft, base.config)
    require_values(start, peft)
    return start


def values(start: PeftStart) -> dict[str, torch.Tensor]:
    return {name: start.parameters.read(name) for name in start.parameters.tensors}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


EXPORTS = {
    "plain": ("llama", lora(targets=["*.q_proj", "*.layers.1.mlp.up_proj"], rslora=True)),
    "tied embedding": ("qwen2 tied", lora(dora=True, modules_to_save=["*embed_tokens*", "model.norm"])),
    "fused": ("phi3", lora(dora=True, targets=["*.q_proj", "*.v_proj", "*.layers.1.*"])),
    "interleaved heads": ("gpt_neox", lora(rslora=True, targets=["*.q_proj", "*.v_proj", "*.layers.1.*"])),
    "modules of transformers": ("olmoe", lora(targets=["*.q_proj", "*.o_proj"])),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_an_export_is_opened_and_exported_again_bit_for_bit(tmp_path: Path, case: str) -> None:
    name, config = EXPORTS[case]
    base = base_of(name, tmp_path)
    tensors = random_adapter(base.architecture, config)
    _, folder = export(base, stored_adapter(tmp_path / "step", base.architecture, config, tensors), tmp_path / "peft")
    found = values(opened(folder, base, config))
    assert_same(found, tensors)
    again = stored_adapter(tmp_path / "again", base.architecture, config, found)
    assert_same(load_file(export(base, again, tmp_path / "out")[1] / PEFT_WEIGHTS), load_file(folder / PEFT_WEIGHTS))


def test_boxes_of_fused_projections_are_those_of_whole_tensors(tmp_path: Path) -> None:
    """What ranks read that share a matrix."""
    base, config = base_of("phi3", tmp_path), lora()
    tensors = random_adapter(base.architecture, config)
    _, folder = export(base, stored_adapter(tmp_path / "step", base.architecture, config, tensors), tmp_path / "peft")
    parameters = opened(folder, base, config).parameters
    for kind, offsets in ((LORA_A, (1, 7)), (LORA_B, (5, 2))):
        name = f"model.layers.1.self_attn.v_proj.{kind}"
        box = torch.empty(2, 2)
        parameters.read_box(name, offsets, box)
        assert torch.equal(box, tensors[name][offsets[0] : offsets[0] + 2, offsets[1] : offsets[1] + 2])


@pytest.mark.parametrize("dora", [False, True])
def test_a_folder_of_peft_is_opened(tmp_path: Path, dora: bool) -> None:
    base = base_of("qwen2 untied", tmp_path)
    config = lora(dora=dora, targets=["*.q_proj", "*.down_proj"], modules_to_save=["lm_head", "model.norm"])
    theirs = peft_model(hf_model(hf_config("qwen2 untied")), config, ["q_proj", "down_proj"], ["lm_head", "model.norm"])
    theirs.save_pretrained(tmp_path / "peft")
    assert_same(values(opened(tmp_path / "peft", base, config)), tensors_of(theirs))


def test_layers_of_a_fused_projection_share_the_matrix_that_peft_gave_it(tmp_path: Path) -> None:
    base, config = base_of("phi3", tmp_path), lora(targets=["*.q_proj", "*.k_proj", "*.v_proj"])
    theirs = peft_model(hf_model(hf_config("phi3")), config, ["qkv_proj"], [])
    theirs.save_pretrained(tmp_path / "peft")
    found, stored = values(opened(tmp_path / "peft", base, config)), tensors_of(theirs)
    module = "model.layers.1.self_attn"
    assert all(torch.equal(found[f"{module}.{x}_proj.{LORA_A}"], stored[f"{module}.qkv_proj.{LORA_A}"]) for x in "qkv")
    rows = torch.cat([found[f"{module}.{x}_proj.{LORA_B}"] for x in "qkv"])
    assert torch.equal(rows, stored[f"{module}.qkv_proj.{LORA_B}"])
    with pytest.raises(UserError, match=r"qkv_proj has an adapter for more than .*q_proj of this run; add the other"):
        opened(tmp_path / "peft", base, lora(targets=["*.q_proj"]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[HfModel, Path]:
    """A base, and a folder of PEFT for it with rank 4, alpha 12, at q_proj and v_proj, and the last norm."""
    folder = tmp_path_factory.mktemp("plain")
    base = base_of("llama", folder)
    theirs = peft_model(hf_model(hf_config("llama")), lora(), ["q_proj", "v_proj"], ["model.norm"])
    theirs.save_pretrained(folder / "peft")
    return base, folder / "peft"


SAME: dict[str, Any] = {"targets": ["*.q_proj", "*.v_proj"], "modules_to_save": ["model.norm"]}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"rank": 8}, "adapter.rank is 8 here and 4 there; set adapter.rank to 4"),
        ({"alpha": 16}, "adapter.alpha is 16 here and 12 there; set adapter.alpha to 12"),
        ({"rslora": True}, "adapter.rslora is true here and false there; set adapter.rslora to false"),
        ({"dora": True}, "adapter.dora is true here and false there; set adapter.dora to false"),
        (
            {"targets": ["*"]},
            "adapter.targets is [*] here and 6 layers (without model.layers.0.mlp.down_proj) there; "
            "set adapter.targets to ['*.q_proj', '*.v_proj']",
        ),
        (
            {"targets": ["*.layers.0.*.q_proj"]},
            "adapter.targets is [*.layers.0.*.q_proj] here and 6 layers (with model.layers.0.self_attn.v_proj) there; "
            "set adapter.targets to ['*.q_proj', '*.v_proj']",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            "adapter.modules_to_save is [lm_head] here and [model.norm.weight] there; "
            "set adapter.modules_to_save to [model.norm.weight]",
        ),
        (
            {"rank": 8, "alpha": 16},
            "adapter.rank is 8 here and 4 there, adapter.alpha is 16 here and 12 there; "
            "set adapter.rank to 4 and adapter.alpha to 12",
        ),
    ],
)
def test_every_setting_that_differs_is_named_with_both_values(plain, settings, line) -> None:
    base, folder = plain
    opened(folder, base, lora(**SAME))
    with pytest.raises(UserError) as caught:
        opened(folder, base, lora(**{**SAME, **settings}))
    assert str(caught.value) == f"adapter.initialize_from: {folder}: holds another adapter than this run: {line}"


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"peft_type": "LOHA"}, "peft_type is LOHA, and a run trains LORA"),
        ({"bias": "all"}, "bias is all, and biases do not train here"),
        ({"target_parameters": ["experts"]}, "has target_parameters, which is not implemented here"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is pissa_niter_4, with which PEFT changes"),
        ({"alpha_pattern": {"1.self_attn.q_proj": 3}}, "adapter.alpha is 12 here and 3 or 12 there, and a run has one"),
    ],
)
def test_what_a_run_cannot_train_is_refused(plain, tmp_path, change, fragment) -> None:
    base, folder = plain
    copy = copied(folder, tmp_path)
    edit_json(copy / "adapter_config.json", lambda content: content.update(change))
    with pytest.raises(UserError) as caught:
        opened(copy, base, lora(**SAME))
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def copied(folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "copy").mkdir()
    for path in folder.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "copy"


def test_damaged_and_foreign_folders_are_refused(plain, tmp_path) -> None:
    base, folder = plain

    def refusal(where: Path) -> str:
        with pytest.raises(UserError) as caught:
            opened(where, base, lora(**SAME))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no folder with adapter_config.json" in refusal(tmp_path / "nothing")
    copy = copied(folder, tmp_path)
    first = f"base_model.model.model.layers.0.self_attn.q_proj.{LORA_B}"
    edit_tensors(copy / PEFT_WEIGHTS, lambda tensors: tensors.pop(first))
    assert "does not fit the adapter of this run: missing model.layers.0.self_attn.q_proj" in refusal(copy)
    edit_tensors(copy / PEFT_WEIGHTS, lambda tensors: tensors.update({"base_model.model.model.new": torch.ones(1)}))
    assert "holds model.new, which is neither" in refusal(copy)
    edit_tensors(copy / PEFT_WEIGHTS, lambda tensors: tensors.update({"foreign": torch.ones(1)}))
    assert "holds foreign, and names of PEFT begin with" in refusal(copy)
    (copy / PEFT_WEIGHTS).rename(copy / "adapter_model.bin")
    assert "only pickled weights" in refusal(copy)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
